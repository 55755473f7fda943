"""The latest tokens can be taken back: what a cache holds then is what it would if they had never been said."""

import contextlib
import copy
import itertools

import pytest
import torch
from packaging.version import Version
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.generation.streamers import BaseStreamer

from custom_generate.generate import CROP_ARGUMENT, SinkCache, generate
from tests.support.helpers import RELEASE, left_padded, on_the_newest, prompt, small_model
from tests.support.oracle import difference, oracle


def feed(model, cache, tokens: torch.Tensor, updates: list[int]) -> torch.Tensor:
    """The logits of `tokens` (`[rows, length]`), which go in by `updates` of so many: `[rows, length, vocab_size]`."""
    with torch.no_grad():
        return torch.cat([model(**cache.prepare_inputs(ids)).logits for ids in tokens.split(updates, dim=1)], dim=1)


NOT_FULL, FULL, ONE_BY_ONE = [9, 3], [30], [12, *[1] * 20]


# `test_programs` tries any others.
@pytest.mark.parametrize(
    "window, before, length, taken",
    [
        ((16, 4), FULL, 6, 4),
        ((16, 4), ONE_BY_ONE, 19, 13),
        on_the_newest((16, 4), NOT_FULL, 6, 6),
        on_the_newest((16, 4), ONE_BY_ONE, 1, 1),
        on_the_newest((16, 0), FULL, 19, 19),
        on_the_newest((16, 0), NOT_FULL, 19, 13),
        on_the_newest((16, 15), FULL, 6, 1),
        on_the_newest((16, 15), ONE_BY_ONE, 6, 6),
        on_the_newest((12, 1), FULL, 1, 1),
        on_the_newest((12, 1), NOT_FULL, 6, 4),
    ],
    ids=str,
)
def test_cropped_after_an_eviction(window, before, length, taken):
    model = small_model(max_position_embeddings=40)
    before = [part for total in before for part in [20] * (total // 20) + [total % 20] if part]
    said, unsaid, then = prompt(sum(before)), prompt(length, seed=1), prompt(40, seed=2)
    cache = SinkCache(*window).bind(model)
    feed(model, cache, said, before)
    feed(model, cache, unsaid, [length])
    cache.crop(-taken)
    tokens = torch.cat([said, unsaid[:, : length - taken], then], dim=1)
    assert cache.get_seq_length() == tokens.shape[1] - 40
    logits = feed(model, cache, then, [3, 1, 1, 15, 1, 10, 9])
    assert difference(logits[0], oracle(model, tokens[0].tolist(), *window)[-40:]) < 1e-5


def test_cropped_rows_of_a_padded_batch():
    model = small_model(max_position_embeddings=40)
    prompts = [prompt(length, seed=length) for length in (3, 12, 30)]
    inputs, then = left_padded(prompts), prompt(20, rows=3, seed=1)
    cache, settings = SinkCache(16, 4).bind(model), dict(updates=[5, 1, 14])
    with torch.no_grad():
        model(**cache.prepare_inputs(**inputs))
    feed(model, cache, prompt(9, rows=3, seed=2), [9])
    cache.crop(-7)
    logits = feed(model, cache, then, **settings)
    for row, ids in enumerate(prompts):
        tokens = torch.cat([ids[0], prompt(9, rows=3, seed=2)[row, :2], then[row]])
        assert difference(logits[row], oracle(model, tokens.tolist(), 16, 4)[-20:]) < 1e-5


def test_cropped_in_several_steps_and_no_further_than_the_last_update():
    model, cache, tokens = small_model(), SinkCache(16, 4).bind(small_model()), prompt(48)
    cache = SinkCache(16, 4).bind(model)
    feed(model, cache, tokens[:, :40], [30, 10])
    for taken in (3, 2):
        cache.crop(-taken)
    before = copy.deepcopy(cache)
    with pytest.raises(ValueError, match=f"`{CROP_ARGUMENT}` can forget 5 of the 35 tokens seen, got -6.*`reset"):
        cache.crop(-6)
    for resumed in (before, cache):  # nothing was lost by that
        resumed.crop(-5)
        logits = feed(model, resumed, tokens[:, 40:], [8])
        expected = oracle(model, tokens[0, :30].tolist() + tokens[0, 40:].tolist(), 16, 4)
        assert difference(logits[0], expected[-8:]) < 1e-5


@pytest.mark.parametrize("updates", [on_the_newest([1] * 7), [2, 1, 3, 1], on_the_newest([7])], ids=str)
def test_recorded_tokens_can_be_taken_back_together(updates):
    model, tokens = small_model(max_position_embeddings=40), prompt(60)
    cache = SinkCache(16, 4).bind(model)
    feed(model, cache, tokens[:, :33], [30, *[1] * 3])
    cache.activate_past_recording()
    feed(model, cache, tokens[:, 33:40], updates)
    cache.crop(-6)
    with pytest.raises(ValueError, match="can forget 0 of the 34 tokens"):  # a crop settles what was recorded
        cache.crop(-1)
    feed(model, cache, tokens[:, 34:50], [1] * 16)
    size = cache.nbytes
    feed(model, cache, tokens[:, 50:], [1] * 10)
    assert cache.nbytes == size  # at most a window is recorded
    logits = feed(model, cache, prompt(5, seed=3), [5])
    expected = oracle(model, tokens[0].tolist() + prompt(5, seed=3)[0].tolist(), 16, 4)
    assert difference(logits[0], expected[-5:]) < 1e-5


def test_the_argument_of_crop_is_the_release_s():
    assert (CROP_ARGUMENT == "tokens_to_remove") == (RELEASE > Version("5.9"))
    model, tokens = small_model(), prompt(30)
    for seen in (10, 30):
        cache = SinkCache(16, 4).bind(model)
        feed(model, cache, tokens[:, :seen], [seen - 5, 5])
        for nothing in ([], [0])[CROP_ARGUMENT == "tokens_to_remove"], [seen], [seen + 9]:
            for argument in nothing:
                cache.crop(argument)
                assert cache.get_seq_length() == seen
        cache.crop(tokens_to_remove=0)
        cache.crop(tokens_to_remove=-2)
        assert cache.get_seq_length() == seen - 2
        cache.crop(torch.tensor(seen - 3))
        cache.crop(max_length=seen - 4)
        assert cache.get_seq_length() == seen - 4
        cache.crop(max_length=0) if CROP_ARGUMENT == "tokens_to_remove" else cache.crop(0)
        assert cache.get_seq_length() == 0 and cache.is_bound
    for arguments, named in (
        ((), {}),
        ((1,), dict(max_length=3)),
        ((), dict(length=3)),
        ((1.5,), {}),
        ((torch.tensor(1.5),), {}),
        ((True,), {}),
    ):
        with pytest.raises(TypeError, match="crop|must be an int"):
            cache.crop(*arguments, **named)


# --- a step that was cut short


class Cut(Exception):
    """What stands for an error or an interrupt."""


def conversation(prompt_length: int):
    """A model, the conversation so far, a cache that saw it but for the last token, and what greedy decoding says."""
    model, cache = small_model(max_position_embeddings=40), SinkCache(16, 4)
    said = generate(model, input_ids=prompt(5), past_key_values=cache, max_new_tokens=30, do_sample=False)
    said = torch.cat([said, prompt(prompt_length, seed=1)], dim=1)
    settings = dict(max_new_tokens=20, do_sample=False)
    expected = generate(model, input_ids=said, past_key_values=copy.deepcopy(cache), **settings)
    return model, cache, said, expected, settings


def cut_before(module):
    """Have `module` raise when it is run next."""

    def cut(*args):
        raise Cut

    return module.register_forward_pre_hook(cut)


# The layer before which it is cut, or after the last one; and what it was to take in: a token, an update, or chunks.
@pytest.mark.parametrize(
    "prompt_length, layer_idx",
    [(9, 1), (0, None), *(on_the_newest(*case) for case in [(0, 0), (0, 1), (9, None), (40, 0), (40, 1), (40, None)])],
)
def test_a_step_cut_short_between_two_layers(prompt_length, layer_idx):
    model, cache, said, expected, settings = conversation(prompt_length)
    hook = cut_before(model.lm_head if layer_idx is None else model.model.layers[layer_idx])
    with pytest.raises(Cut):
        generate(model, input_ids=said, past_key_values=cache, **settings)
    hook.remove()
    assert torch.equal(generate(model, input_ids=said, past_key_values=cache, **settings), expected)


class CutBeforeWrite(TorchDispatchMode):
    """Raises before the torch operation that would write into a tensor for the time `number`, from 0 on."""

    def __init__(self, number: int):
        super().__init__()
        self.left = number

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.is_mutable:
            self.left -= 1
            if self.left < 0:
                raise Cut
        return function(*args, **(kwargs or {}))


def cut_before_write(function, number: int):
    """`function`, cut short in its first call before it writes into a tensor for the time `number`, from 0 on."""
    calls = []

    def cut(*args):
        calls.append(args)
        with CutBeforeWrite(number) if len(calls) == 1 else contextlib.nullcontext():
            return function(*args)

    return cut


@pytest.mark.ends_only
@pytest.mark.parametrize("layer_idx", [0, on_the_newest(1)])
@pytest.mark.parametrize("prompt_length", [on_the_newest(0), 9])
def test_a_step_cut_short_within_a_layer(prompt_length, layer_idx):
    # Before each write of the layer's update: as the sinks are moved, between keys and values, and so on.
    model, whole, said, expected, settings = conversation(prompt_length)
    for number in itertools.count():
        cache = copy.deepcopy(whole)
        layer = cache.layers[layer_idx]
        layer.update = cut_before_write(layer.update, number)
        try:
            generate(model, input_ids=said, past_key_values=cache, prefill_chunk_size=6, **settings)
        except Cut:
            del layer.update
            assert torch.equal(generate(model, input_ids=said, past_key_values=cache, **settings), expected)
        else:
            break
    assert number >= 2  # keys and values at least


@pytest.mark.parametrize("tokens", [1, *map(on_the_newest, (2, 15))])
def test_the_conversation_goes_on_where_a_stream_broke_off(tokens):
    # The token was in all layers, and the last one that came out is in none.
    class Breaks(BaseStreamer):
        put_tokens: list = []

        def put(self, value):
            if len(self.put_tokens) == tokens:
                raise Cut
            self.put_tokens = [*self.put_tokens, value]

        def end(self):
            pass

    model, cache, said, expected, settings = conversation(9)
    streamer = Breaks()
    with pytest.raises(Cut):
        generate(model, input_ids=said, past_key_values=cache, streamer=streamer, **settings)
    so_far = torch.cat([part.flatten() for part in streamer.put_tokens])[None]
    rest = generate(
        model, input_ids=so_far, past_key_values=cache, max_new_tokens=said.shape[1] + 20 - so_far.shape[1],
        do_sample=False,
    )  # fmt: skip
    assert torch.equal(rest, expected)


def test_a_loop_of_ones_own_and_a_file_after_a_step_cut_short(tmp_path):
    model, cache, said, expected, settings = conversation(4)
    new = said[:, cache.get_seq_length() :]
    again = copy.deepcopy(cache)
    logits = feed(model, again, new, [5])
    hook = cut_before(model.model.layers[1])
    with pytest.raises(Cut):
        feed(model, cache, new, [5])
    hook.remove()
    cache.save(tmp_path / "conversation")
    for resumed in (copy.deepcopy(cache), SinkCache.load(tmp_path / "conversation", model), cache):
        assert difference(feed(model, resumed, new, [5])[0], logits[0]) < 1e-6


def test_the_same_conversation_again_says_the_same_again():
    model, cache, said, expected, settings = conversation(9)
    first = generate(model, input_ids=said, past_key_values=cache, max_new_tokens=1, do_sample=False)
    assert torch.equal(first, expected[:, : said.shape[1] + 1])
    assert cache.get_seq_length() == said.shape[1]
    assert torch.equal(generate(model, input_ids=said, past_key_values=cache, **settings), expected)


def test_a_message_edited_within_the_last_update():
    model, cache, said, _, settings = conversation(5)
    generate(model, input_ids=said, past_key_values=cache, max_new_tokens=1, prefill_chunk_size=6)
    edited = torch.cat([said[:, :-3], prompt(6, seed=5)], dim=1)
    expected = generate(model, 16, 4, input_ids=edited, **settings)
    assert torch.equal(generate(model, input_ids=edited, past_key_values=cache, **settings), expected)
