"""Images anywhere in a stream: in prompts of any length, in any turn, and as they leave the window."""

import copy
import itertools

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module

from custom_generate.generate import CACHE, SinkCache, generate
from tests.support.helpers import at_the_ends, on_the_newest, prompt
from tests.support.oracle import difference, oracle_with_images
from tests.test_synced import Others
from tests.test_towers import IMAGE, TYPED, WITH_AXES, images_of, model_with_a_tower, typed

WINDOW = dict(window_length=16, num_sink_tokens=4)
CALL = dict(max_new_tokens=12, do_sample=False, suppress_tokens=[0, 208, 209, 210])
CALL |= dict(return_dict_in_generate=True, output_logits=True)
NAMES = ["llava", "mistral3", *TYPED, *WITH_AXES]


def text(length: int, seed: int = 0) -> torch.Tensor:
    """Tokens that stand for no image: `[1, length]`."""
    return prompt(length, seed=seed).clamp(2, 200)


def joined(*images: dict) -> dict:
    return {key: torch.cat([image[key] for image in images]) for key in images[0]}


def assert_exact(model, name, output, images, start):
    """The logits of all steps since `start` tokens were there are those of the oracle."""
    ids = output.sequences
    expected = oracle_with_images(model, ids, 16, 4, **images, **typed(ids, name))
    assert difference(torch.cat(output.logits), expected[start - 1 : -1]) < 1e-5


# Each in chunks as by default, and in smaller ones; between the ends one of each way that a model hands images down.
LEAN = ("gemma3", "qwen3_vl")
CHUNKS = [(name, None) if name in LEAN else at_the_ends(name, None) for name in NAMES]
CHUNKS += map(at_the_ends, NAMES, itertools.cycle([1, 3]))


@pytest.mark.parametrize("name, chunk_size", CHUNKS)
def test_images_in_each_turn_past_the_window(name, chunk_size):
    model, cache = model_with_a_tower(name), SinkCache(16, 4)
    ids, image, other = images_of(model, name)
    call = CALL | dict(past_key_values=cache, prefill_chunk_size=chunk_size)

    # A prompt longer than the window, with an image among the sinks and one behind them.
    said = torch.cat([ids[:, 3:], text(7), ids, text(5)], dim=1)
    output = generate(model, input_ids=said, **call, **joined(image, other), **typed(said, name))
    assert_exact(model, name, output, joined(image, other), said.shape[1])

    # Another image, with all of the conversation, and then one with the new tokens alone.
    said = torch.cat([output.sequences, ids], dim=1)
    images = joined(image, other, image)
    output = generate(model, input_ids=said, **call, **images, **typed(said, name))
    assert_exact(model, name, output, images, said.shape[1])
    said = torch.cat([output.sequences, text(2), ids], dim=1)
    new = said[:, cache.get_seq_length() :]
    call |= dict(attention_mask=torch.ones_like(said))
    output = generate(model, input_ids=new, **call, **other, **typed(new, name))
    images = joined(images, other)
    said = torch.cat([said, output.sequences[:, new.shape[1] :]], dim=1)
    expected = oracle_with_images(model, said, 16, 4, **images, **typed(said, name))
    assert difference(torch.cat(output.logits), expected[-13:-1]) < 1e-5

    # And text alone, first with all images of before, then without.
    call.pop("attention_mask")
    for again in (images, {}):
        said = torch.cat([said, text(3)], dim=1)
        output = generate(model, input_ids=said, **call, **again, **typed(said, name))
        assert_exact(model, name, output, images, said.shape[1])
        said = output.sequences


def whole(model, name, said, images, **settings):
    """What plain generation gives with all of the conversation and its images."""
    return model.generate(input_ids=said, **(CALL | dict(max_new_tokens=5) | settings), **images, **typed(said, name))


def ours(model, name, said, cache, images=None, **settings):
    settings = CALL | dict(max_new_tokens=5, past_key_values=cache) | settings
    return generate(model, input_ids=said, **settings, **(images or {}), **typed(said, name))


def assert_same(output, expected):
    assert difference(torch.cat(output.logits), torch.cat(expected.logits)) < 1e-5


@pytest.mark.ends_only
@pytest.mark.parametrize("name", NAMES)
def test_images_that_come_again(name):
    """Processors of the whole conversation hand over all images in each turn, and some clients only the new one."""
    model, cache = model_with_a_tower(name), SinkCache(64, 4)
    ids, image, other = images_of(model, name)
    said = torch.cat([ours(model, name, ids, cache, image).sequences, text(3)], dim=1)
    with pytest.raises(ValueError, match="Images .* are not those that the `SinkCache` in .* was given before"):
        ours(model, name, said, cache, other)
    output = ours(model, name, said, cache, image)
    assert_same(output, whole(model, name, said, image))
    said = torch.cat([output.sequences, ids], dim=1)
    expected = whole(model, name, said, joined(image, other))
    assert_same(ours(model, name, said, cache, joined(image, other)), expected)
    if name not in TYPED:  # which can't take back: the last token again, then the image too, and a part of it
        for end in (said.shape[1], said.shape[1] - 8, said.shape[1] - 4):
            cache.crop(max_length=end)
            assert_same(ours(model, name, said, cache, joined(image, other)), expected)
        cache.crop(max_length=said.shape[1] - 8)
        assert_same(ours(model, name, said, cache, other), expected)


@pytest.mark.ends_only
@pytest.mark.parametrize("name", NAMES)
def test_images_in_rows_of_two_lengths(name):
    """Each has padding of its own, and the first another number of tokens before its image."""
    model, cache = model_with_a_tower(name), SinkCache(16, 4)
    ids, image, other = images_of(model, name)
    rows = [torch.cat([text(3), ids, text(9, seed=1)], dim=1), torch.cat([text(6), ids, text(11, seed=2)], dim=1)]
    padded = torch.cat([torch.nn.functional.pad(rows[0], (5, 0)), rows[1]])
    output = ours(model, name, padded, cache, joined(image, other), attention_mask=(padded != 0).long())
    logits = torch.stack(output.logits, dim=1)
    for row, images in enumerate((image, other)):
        said = torch.cat([rows[row], output.sequences[row : row + 1, padded.shape[1] :]], dim=1)
        expected = oracle_with_images(model, said, 16, 4, **images, **typed(said, name))
        assert difference(logits[row], expected[-6:-1]) < 1e-5


@pytest.mark.ends_only
@pytest.mark.parametrize("name", WITH_AXES)
def test_rows_whose_images_have_other_grids(name):
    """Then tokens of the same number have other positions in each row."""
    model, cache = model_with_a_tower(name), SinkCache(16, 4)
    ids, image, _ = images_of(model, name)
    wide = dict(image_grid_thw=torch.tensor([[1, 2, 8]]), pixel_values=image["pixel_values"].flip(0))
    both, said = joined(image, wide), torch.cat([ids, text(8)], dim=1).repeat(2, 1)
    for new in (0, 4):
        said = torch.cat([said, text(new + 1)[:, 1:].repeat(2, 1)], dim=1)
        output = ours(model, name, said, cache, both if new == 0 else None, max_new_tokens=20)
        logits = torch.stack(output.logits, dim=1)
        for row, images in enumerate((image, wide)):
            ids = output.sequences[row : row + 1]
            expected = oracle_with_images(model, ids, 16, 4, **images, **typed(ids, name))
            assert difference(logits[row], expected[-21:-1]) < 1e-5
        said = output.sequences


@pytest.mark.ends_only
@pytest.mark.parametrize("name", NAMES)
def test_a_saved_conversation_with_images(name, tmp_path):
    model, cache = model_with_a_tower(name), SinkCache(16, 4)
    ids, image, other = images_of(model, name)
    said = torch.cat([text(9), ids, text(8)], dim=1)
    said = torch.cat([ours(model, name, said, cache, image, max_new_tokens=20).sequences, text(3)], dim=1)
    cache.save(tmp_path / "conversation")
    cache = SinkCache.load(tmp_path / "conversation", model)
    with pytest.raises(ValueError, match="Images .* are not those"):
        ours(model, name, said, cache, other)
    output = ours(model, name, said, cache, max_new_tokens=20)
    expected = oracle_with_images(model, output.sequences, 16, 4, **image, **typed(output.sequences, name))
    assert difference(torch.cat(output.logits), expected[-21:-1]) < 1e-5


@pytest.mark.ends_only
@pytest.mark.parametrize("name", ["llava", *WITH_AXES])
def test_beams_and_drafts_after_an_image(name):
    model = model_with_a_tower(name)
    ids, image, _ = images_of(model, name)
    said = torch.cat([ids, text(5), ids[:, :3], text(5)], dim=1)
    images = image
    call = CALL | dict(max_new_tokens=20, eos_token_id=IMAGE)
    expected = generate(model, 16, 4, input_ids=said, **call, **images, **typed(said, name))
    drafted = generate(model, 16, 4, input_ids=said, prompt_lookup_num_tokens=3, **call, **images, **typed(said, name))
    assert torch.equal(drafted.sequences[:, : expected.sequences.shape[1]], expected.sequences)
    beams = dict(num_beams=3, num_return_sequences=1)
    output = generate(model, 64, 4, input_ids=said, **call, **beams, **images, **typed(said, name))
    plain = model.generate(input_ids=said, **call, **beams, **images, **typed(said, name))
    assert torch.equal(output.sequences, plain.sequences)


@pytest.mark.ends_only
@pytest.mark.parametrize("name", WITH_AXES)
def test_positions_stay_below_their_ceiling_after_images(name):
    model, cache = model_with_a_tower(name), SinkCache(16, 4)
    ids, image, other = images_of(model, name)
    cache.bind(model).held.ceiling = 24
    said = torch.cat([ids, text(11), ids, text(4)], dim=1)
    output = ours(model, name, said, cache, joined(image, other), max_new_tokens=60)
    assert max(cache.held.offsets) > 24
    expected = oracle_with_images(
        model, output.sequences, 16, 4, **joined(image, other), **typed(output.sequences, name)
    )
    assert difference(torch.cat(output.logits), expected[-61:-1]) < 1e-5


@pytest.mark.ends_only
@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_with_images_that_is_cut_short(name):
    """It goes on where it was interrupted, in whatever chunk that was."""
    model = model_with_a_tower(name)
    ids, image, other = images_of(model, name)
    said, images = torch.cat([ids, text(9), ids, text(4)], dim=1), joined(image, other)
    expected = ours(model, name, said, SinkCache(16, 4), images)
    layers = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)][-1]
    for number, layer in zip(range(2, 6), (0, -1, 0, -1)):
        cache, calls = SinkCache(16, 4), []

        def interrupt(module, args, calls=calls, number=number):
            calls.append(1)
            if len(calls) == number:
                raise KeyboardInterrupt

        hook = layers[layer].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            ours(model, name, said, cache, images, prefill_chunk_size=3)
        hook.remove()
        kept = copy.deepcopy(cache)
        try:
            output = ours(model, name, said, cache, images)
        except ValueError as error:
            assert not cache.held.can_undo and "reset" in str(error)
            continue
        assert_same(output, expected)
        # Or with text in place of what was not read yet.
        read = said[:, : kept.get_seq_length()]
        if read.numel() > 0 and (read == IMAGE).sum() % 4 == 0:
            instead = torch.cat([read, text(6)], dim=1)
            seen = {4: image, 8: images}.get(int((read == IMAGE).sum()))
            assert_same(ours(model, name, instead, kept), ours(model, name, instead, SinkCache(16, 4), seen))


@pytest.mark.parametrize("name", ["llava", *map(at_the_ends, NAMES[1:])])
def test_kept_conversations_with_images(name):
    """A client sends all of the conversation each time. What of it is known with its images is not read again."""
    model, read = model_with_a_tower(name), []
    ids, image, other = images_of(model, name)
    layers = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)][-1]
    layers[0].register_forward_pre_hook(lambda module, args: read.append(args[0].shape[1]))
    call = CALL | dict(window_length=16, num_sink_tokens=4, kept_conversations=3)

    def turn(said, images):
        read.clear()
        output = generate(model, input_ids=said, **call, **images, **typed(said, name))
        number = sum(read) - 11  # and the answer's
        expected = oracle_with_images(model, output.sequences, 16, 4, **images, **typed(output.sequences, name))
        assert difference(torch.cat(output.logits), expected[-13:-1]) < 1e-5
        return output.sequences, number

    first = torch.cat([text(7), ids, text(20)], dim=1)
    said, number = turn(first, image)
    assert number >= first.shape[1]
    said = torch.cat([said, text(2), ids, text(3)], dim=1)
    _, number = turn(said, joined(image, other))
    assert number < 20
    _, number = turn(said, joined(image, other))  # the same again
    assert number < 25
    _, number = turn(said, joined(other, other))  # with another image in the first turn
    assert number >= said.shape[1]


def with_code_of_others(model, of: str) -> None:
    """Have what is around the decoder run code that knows the model's own modules."""
    if of == "accelerate":
        for module in model.modules():
            add_hook_to_module(module, AlignDevicesHook("cpu", io_same_device=True))
    elif of == "forward":
        model.forward = torch.compile(model.forward, backend="eager")
    elif of == "inside":
        model.model.compile(backend="eager")
    else:
        model.model.language_model = torch.compile(model.model.language_model, backend="eager")


@pytest.mark.parametrize(
    "of", [at_the_ends("accelerate"), *(on_the_newest(of) for of in ("forward", "inside", "decoder"))]
)
def test_images_through_code_of_others(of):
    model = model_with_a_tower("llava")
    ids, image, _ = images_of(model, "llava")
    said = torch.cat([ids, text(9)], dim=1)
    expected = ours(model, "llava", said, SinkCache(16, 4), image)
    with_code_of_others(model, of)
    assert_same(ours(model, "llava", said, SinkCache(16, 4), image), expected)


@pytest.mark.newest_only
@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_images_while_other_ranks_have_longer_prompts(name, monkeypatch):
    model = model_with_a_tower(name)
    ids, image, _ = images_of(model, name)
    said = torch.cat([ids, text(9)], dim=1)
    expected = ours(model, name, said, SinkCache(16, 4), image)
    Others(monkeypatch, steps=9, prompt_passes=9)
    assert_same(ours(model, name, said, SinkCache(16, 4), image, synced_gpus=True), expected)


@pytest.mark.ends_only
@pytest.mark.parametrize("name", TYPED)
def test_text_whose_types_are_passed_goes_in_by_chunks(name):
    """What is around the decoder makes no mask for all of a long text, nor for all of its conversation."""
    model, cache, read = model_with_a_tower(name), SinkCache(16, 4), []
    model.get_input_embeddings().register_forward_pre_hook(lambda module, args: read.append(args[0].shape[1]))
    said = text(200)
    for _ in range(2):
        output = ours(model, name, said, cache, prefill_chunk_size=8)
        assert max(read) <= 16
        said = torch.cat([output.sequences, text(9)], dim=1)
        read.clear()


@pytest.mark.ends_only
@pytest.mark.parametrize("name", TYPED)
def test_types_that_are_alike_and_see_later_ones(name):
    model, said = model_with_a_tower(name), text(30)
    types = {key: torch.ones_like(value) for key, value in typed(said, name).items()}
    output = generate(model, 16, 4, input_ids=said, **CALL | types)
    types = {key: torch.nn.functional.pad(value, (0, 12)) for key, value in types.items()}
    expected = oracle_with_images(model, output.sequences, 16, 4, **types)
    assert difference(torch.cat(output.logits), expected[-13:-1]) < 1e-5


@pytest.mark.ends_only
@pytest.mark.parametrize("name", TYPED)
def test_text_whose_types_are_passed_in_a_window_up_to_the_ceiling(name):
    """As where the window is as long as the model was trained to: all that it holds goes in at once."""
    model, cache = model_with_a_tower(name), SinkCache(64, 4)
    cache.bind(model).held.ceiling = 64
    ids, image, _ = images_of(model, name)
    for said, images in ((text(80), None), (torch.cat([ids, text(70)], dim=1), image)):
        assert_same(ours(model, name, said, cache, images), ours(model, name, said, SinkCache(64, 4), images))
        cache.reset()
        cache.held.ceiling = 64


@pytest.mark.ends_only
@pytest.mark.parametrize("name", TYPED)
def test_an_image_whose_tokens_do_not_see_each_other_would_be_seen(name):
    """A control: a causal mask over an image changes logits by far more than rounding."""
    model, (ids, image, _) = model_with_a_tower(name), images_of(model_with_a_tower(name), name)
    said = torch.cat([text(3), ids, text(8)], dim=1)
    output = ours(model, name, said, SinkCache(16, 4), image, max_new_tokens=12)
    assert_exact(model, name, output, image, said.shape[1])
    causal = {key: torch.zeros_like(value) for key, value in typed(output.sequences, name).items()}
    expected = oracle_with_images(model, output.sequences, 16, 4, **image, **causal)
    assert difference(torch.cat(output.logits), expected[said.shape[1] - 1 : -1]) > 1e-3


@pytest.mark.parametrize("name", ["llava", *map(at_the_ends, NAMES[1:])])
def test_images_that_are_not_as_many_as_their_tokens(name):
    """The message has what was passed, by its names, also where transformers encodes it before the loop."""
    model = model_with_a_tower(name)
    ids, image, other = images_of(model, name)
    with pytest.raises(ValueError, match=r"makes nothing of the prompt and \['pixel_values'"):
        ours(model, name, torch.cat([ids, text(9)], dim=1), SinkCache(16, 4), joined(image, other))


def plain(model, name, said, cache, images=None, **settings):
    """A cache bound by hand, and handed to `generate` of transformers."""
    return model.generate(input_ids=said, **CALL | {CACHE: cache} | settings, **(images or {}), **typed(said, name))


@pytest.mark.parametrize("name", NAMES)
def test_an_image_and_a_cache_handed_to_plain_generate(name):
    """It is right where the positions of its tokens are their numbers, and else refused before any logits."""
    model = model_with_a_tower(name)
    cache, passes, (ids, image, _) = SinkCache(16, 4).bind(model), [], images_of(model, name)
    if name in WITH_AXES:
        model.lm_head.register_forward_pre_hook(lambda *args: passes.append(1))
        strip = image | dict(image_grid_thw=torch.tensor([[1, 2, 8]]))  # text after it has its number for a position
        for rows, given in ((1, image), (1, strip), (2, joined(image, strip))):
            with pytest.raises(ValueError, match="can't go on outside .* positions that are not the numbers of tokens"):
                plain(model, name, ids.repeat(rows, 1), cache, given)
        assert cache.get_seq_length() == 0 and passes == []
    else:
        assert_exact(model, name, plain(model, name, ids, cache, image), image, ids.shape[1])
    with pytest.raises(ValueError, match="can't go on outside .* these 22 tokens evict some"):
        plain(model, name, torch.cat([ids, text(12)], dim=1), SinkCache(16, 4).bind(model), image)


@pytest.mark.parametrize("name", WITH_AXES)
def test_plain_turns_after_another_conversation_had_an_image(name):
    """The model keeps a number of it, by which it moves the positions of any later turn."""
    model = model_with_a_tower(name)
    cache, (ids, image, _) = SinkCache(16, 4).bind(model), images_of(model, name)
    said = plain(model, name, text(8), cache).sequences
    output = plain(model, name, said, cache)
    assert_exact(model, name, output, {}, said.shape[1])
    said = output.sequences
    whole(model, name, ids, image)
    with pytest.raises(ValueError, match="`rope_deltas` that it keeps of another conversation.*prepare_inputs"):
        plain(model, name, said, cache)
    assert_exact(model, name, ours(model, name, said, cache, max_new_tokens=12), {}, said.shape[1])


@pytest.mark.newest_only
@pytest.mark.parametrize("name", ["aya_vision", "cohere2_vision", "internvl", "qianfan_ocr"])
def test_sizes_of_images_that_a_model_hands_down_and_does_not_use(name):
    from tools.architectures import WITH_IMAGES, build
    from tools.images import an_image, features

    model = build(name, 512, {}, WITH_IMAGES)
    image, cache = an_image(model, seed=0), SinkCache(16, 4)
    said = torch.cat([text(3), torch.ones(1, features(model, image), dtype=torch.long), text(14)], dim=1)
    given = image | dict(image_sizes=torch.tensor([[28, 28]]))
    for _ in range(2):
        output = generate(model, input_ids=said, cache=cache, **CALL | dict(suppress_tokens=[0, 1]), **given)
        expected = oracle_with_images(model, output.sequences, 16, 4, **image)
        assert difference(torch.cat(output.logits), expected[said.shape[1] - 1 : -1]) < 1e-5
        said = torch.cat([output.sequences, text(3)], dim=1)


@pytest.mark.newest_only
@torch.no_grad()
def test_images_whose_keys_no_rotation_moves():
    """The two dimensions of a pair turn with different axes, which shows in tokens with another position on each."""
    from tools.architectures import WITH_IMAGES, build
    from tools.images import an_image, features, types_of

    rope = dict(rope_type="default", rope_theta=10000.0, mrope_section=[3, 3, 2])
    model = build("hunyuan_vl", 512, {"text_config": dict(head_dim=16, rope_parameters=rope)}, WITH_IMAGES)
    image, cache = an_image(model, seed=0), SinkCache(16, 4)
    said = torch.cat([torch.ones(1, features(model, image), dtype=torch.long), text(14)], dim=1)
    with pytest.raises(ValueError, match="the keys of images, .* do not move by one rotation"):
        generate(model, input_ids=said, cache=cache, **image, **types_of(model, said))
    assert cache.get_seq_length() == 0
    generate(model, input_ids=text(20), cache=cache, max_new_tokens=5)
