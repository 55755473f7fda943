"""Models with a tower for images beside the language model: their text. `test_pictures.py` has images."""

import functools

import pytest
import torch
from packaging.version import Version
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText
from transformers import Blip2ForConditionalGeneration as Blip2
from transformers import InstructBlipForConditionalGeneration as InstructBlip

from custom_generate.generate import CACHE, SinkCache, generate, read_model
from tests.support import ROOT, helpers
from tests.support.helpers import RELEASE, SMALL, at_the_ends, loadable, prompt, seeded, sharpened
from tests.support.oracle import difference, oracle

IMAGE = 210  # the token that an image's features take the place of
VISION = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
TEXT = {**SMALL, "head_dim": 16}
SLIDING = dict(layer_types=["sliding_attention", "full_attention"], sliding_window=10)
MROPE = {"type": "mrope", "mrope_section": [2, 3, 3], "rope_type": "default", "rope_theta": 10000.0}
TOWERS = {
    "llava": dict(
        vision_config=dict(model_type="clip_vision_model", image_size=4, patch_size=2, projection_dim=32, **VISION),
        text_config=dict(model_type="llama", **TEXT),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
    ),
    "mistral3": dict(
        vision_config=dict(model_type="pixtral", image_size=8, patch_size=2, head_dim=16, **VISION),
        text_config=dict(model_type="mistral", **TEXT, sliding_window=None),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
    ),
    "qwen2_vl": dict(
        vision_config=dict(embed_dim=32, hidden_size=64, depth=1, num_heads=2, patch_size=2, mlp_ratio=1),
        image_token_id=IMAGE,
        vision_start_token_id=209,
        vision_end_token_id=208,
        **(
            dict(text_config={**SMALL, "rope_parameters": MROPE})
            if RELEASE >= Version("5.0")
            else {**SMALL, "rope_scaling": MROPE}
        ),
    ),
    "gemma3": dict(
        vision_config=dict(image_size=8, patch_size=2, **VISION),
        text_config=dict(**TEXT, **SLIDING),
        image_token_index=IMAGE,
        boi_token_index=209,
        eoi_token_index=208,
        mm_tokens_per_image=4,
    ),
    "qwen3_vl": dict(
        vision_config=dict(
            depth=1,
            hidden_size=32,
            out_hidden_size=64,
            num_heads=2,
            patch_size=2,
            intermediate_size=32,
            deepstack_visual_indexes=[0],
            num_position_embeddings=16,
        ),
        image_token_id=IMAGE,
        vision_start_token_id=209,
        vision_end_token_id=208,
        text_config={**TEXT, "rope_parameters": {**MROPE, "mrope_interleaved": True}},
    ),
    "llama4": dict(
        vision_config=dict(
            image_size=8,
            patch_size=2,
            vision_output_dim=32,
            projector_input_dim=32,
            projector_output_dim=32,
            pixel_shuffle_ratio=0.5,
            **VISION,
        ),
        text_config=dict(
            **TEXT,
            layer_types=["chunked_attention", "full_attention"],
            attention_chunk_size=10,
            num_local_experts=2,
            num_experts_per_tok=1,
            intermediate_size_mlp=64,
        ),
        image_token_index=IMAGE,
        boi_token_index=209,
        eoi_token_index=208,
    ),
    "gemma4": dict(
        vision_config=dict(
            **VISION,
            num_key_value_heads=2,
            head_dim=16,
            global_head_dim=16,
            patch_size=2,
            position_embedding_size=16,
            pooling_kernel_size=2,
            default_output_length=4,
        ),
        text_config=dict(
            **TEXT,
            **SLIDING,
            global_head_dim=16,
            hidden_size_per_layer_input=0,
            vocab_size_per_layer_input=211,
            num_kv_shared_layers=0,
            use_bidirectional_attention="vision",
        ),
        image_token_id=IMAGE,
        audio_config=None,
    ),
    "mllama": dict(  # with a layer that attends to images alone
        vision_config=dict(
            num_global_layers=1,
            attention_heads=2,
            image_size=8,
            patch_size=2,
            vision_output_dim=64,
            intermediate_layers_indices=[0],
            supported_aspect_ratios=[[1, 1]],
            max_num_tiles=1,
            **VISION,
        ),
        text_config=dict(**SMALL | dict(num_hidden_layers=3), cross_attention_layers=[1]),
        image_token_index=IMAGE,
    ),
}
if RELEASE < Version("4.56"):  # where layers of several kinds are refused
    del TOWERS["gemma3"]
if RELEASE < Version("5.3"):  # where these are missing, or broken
    del TOWERS["llama4"], TOWERS["qwen3_vl"], TOWERS["mllama"]
if RELEASE < Version("5.8"):
    del TOWERS["gemma4"]
if RELEASE >= Version("5.24"):  # where its forward asks for an output that it doesn't have, with any cache
    del TOWERS["llama4"]


def model_with_a_tower(name: str):
    with seeded():
        model = AutoModelForImageTextToText.from_config(CONFIG_MAPPING[name](**TOWERS[name])).eval().float()
        if name == "gemma3":  # which begins with features of nothing but zeros
            torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)
    return model if name == "gemma4" else sharpened(model)  # whose scores are not divided by a square root


# Of text alone: neither padding nor what stands for an image.
stream = functools.partial(helpers.stream, suppress_tokens=[0, 208, 209, 210])


def an_image(model, name: str) -> tuple[torch.Tensor, dict]:
    """A prompt of ten tokens, four of them an image's, and the image."""
    ids, pixels = prompt(10).clamp(max=200), torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    ids[0, 4:8] = IMAGE
    if name in ("qwen2_vl", "qwen3_vl"):  # four by four patches of two by two pixels each, twice, merged two by two
        ids[0, 3] = 209
        image = dict(pixel_values=pixels.repeat(1, 1, 2, 4).reshape(16, 24), image_grid_thw=torch.tensor([[1, 4, 4]]))
        return ids, image | (dict(mm_token_type_ids=(ids == IMAGE).long()) if RELEASE >= Version("5.3") else {})
    if name == "mistral3":
        return ids, dict(pixel_values=pixels.repeat(1, 1, 2, 2), image_sizes=torch.tensor([[8, 8]]))
    if name == "gemma4":  # four by four patches, merged two by two
        places = torch.tensor([[[column, row] for row in range(4) for column in range(4)]])
        image = dict(pixel_values=pixels.repeat(1, 1, 2, 2).reshape(1, 16, 12), image_position_ids=places)
        return ids, image | dict(mm_token_type_ids=(ids == IMAGE).long())
    if name == "gemma3":
        return ids, dict(pixel_values=pixels.repeat(1, 1, 2, 2), token_type_ids=(ids == IMAGE).long())
    return ids, dict(pixel_values=pixels)


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("length", [at_the_ends(3), 40])
def test_text(name, length):
    model = model_with_a_tower(name)
    output = stream(model, prompt(length).clamp(max=200), 40)
    expected = oracle(model, output.sequences[0].tolist(), 16, 4)[length - 1 : -1]
    assert difference(torch.cat(output.logits), expected) < 1e-5


@pytest.mark.parametrize("name", [name if name == "qwen2_vl" else at_the_ends(name) for name in TOWERS])
def test_turns_and_a_saved_conversation(name, tmp_path):
    model = model_with_a_tower(name)
    first = stream(model, prompt(3).clamp(max=200), 20)
    first[CACHE].save(tmp_path / "conversation")
    said = torch.cat([first.sequences, prompt(5).clamp(max=200)], dim=1)
    for cache in (first[CACHE], SinkCache.load(tmp_path / "conversation", model)):
        output = stream(model, said, 20, past_key_values=cache, prefill_chunk_size=1)
        assert difference(torch.cat(output.logits), oracle(model, output.sequences[0].tolist(), 16, 4)[27:-1]) < 1e-5


@pytest.mark.skipif("mllama" not in TOWERS, reason="broken in this release")
def test_drafts_and_a_layer_that_attends_to_images_alone():
    model, call = model_with_a_tower("mllama"), dict(max_new_tokens=40, do_sample=False, suppress_tokens=[0, IMAGE])
    call |= dict(input_ids=prompt(30).clamp(max=200), eos_token_id=IMAGE)  # 5.3's prompt lookup asks for one
    expected = generate(model, 16, 4, **call)
    assert torch.equal(generate(model, 16, 4, prompt_lookup_num_tokens=4, **call)[:, :70], expected)


WITH_AXES = [name for name in ("qwen2_vl", "qwen3_vl") if name in TOWERS]
TYPED = [name for name in ("gemma3", "gemma4") if name in TOWERS]


@pytest.mark.parametrize("name", WITH_AXES)
def test_positions_that_a_model_keeps_of_another_conversation(name):
    model = model_with_a_tower(name)
    kept = model.model.rope_deltas = torch.tensor([[-7], [-7], [-7]])  # as after three rows with images
    said, cache = prompt(3).clamp(max=200), None
    for new in (0, 5, 1):  # the last answer's last token alone is new in the third turn
        said = torch.cat([said, prompt(new, seed=1).clamp(max=200)[:, 1:]], dim=1)
        output = stream(model, said, 20, **({} if cache is None else {"past_key_values": cache}))
        expected = oracle(model, output.sequences[0].tolist(), 16, 4)[said.shape[1] - 1 : -1]
        assert difference(torch.cat(output.logits), expected) < 1e-5
        said, cache = output.sequences, output[CACHE]
    own, logits = SinkCache(16, 4).bind(model), []
    for token in said[0, :30, None, None]:
        with torch.no_grad():
            logits.append(model(**own.prepare_inputs(token)).logits[0, -1])
    assert difference(torch.stack(logits), oracle(model, said[0, :30].tolist(), 16, 4)) < 1e-5
    assert model.model.rope_deltas is kept


@pytest.mark.skipif(RELEASE < Version("5.15"), reason="until then models with such states are refused")
def test_a_reading_is_not_told_the_positions_of_another_conversation():
    text = dict(
        **TEXT,
        rope_parameters={**MROPE, "mrope_interleaved": True, "partial_rotary_factor": 1.0},
        layer_types=["linear_attention", "full_attention"],
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
    )
    settings = {name: value for name, value in TOWERS["qwen3_vl"].items() if name != "text_config"}
    with seeded():
        model = AutoModelForImageTextToText.from_config(CONFIG_MAPPING["qwen3_5"](text_config=text, **settings))
    kept = model.model.rope_deltas = torch.tensor([[-7]])
    assert read_model(model.eval().float()).continues_positions
    assert model.model.rope_deltas is kept


def typed(ids: torch.Tensor, name: str) -> dict[str, torch.Tensor]:
    """The types of these tokens, as processors give them."""
    names = {"gemma3": "token_type_ids", "gemma4": "mm_token_type_ids"}
    if RELEASE >= Version("5.3"):
        names |= dict.fromkeys(("qwen2_vl", "qwen3_vl"), "mm_token_type_ids")
    return {names[name]: (ids == IMAGE).long()} if name in names else {}


def images_of(model, name: str) -> tuple[torch.Tensor, dict, dict]:
    """The tokens of an image, that image, and another of the same size."""
    ids, image = an_image(model, name)
    image = {key: value for key, value in image.items() if "type_ids" not in key}
    other = {key: value.flip(-1) if value.is_floating_point() else value for key, value in image.items()}
    return ids, image, other


def turn(model, name: str, ids: torch.Tensor, cache=None, **inputs):
    settings = dict(max_new_tokens=5, min_new_tokens=5, return_dict_in_generate=True, output_logits=True)
    settings |= dict(suppress_tokens=[0, 208, 209, 210]) | typed(ids, name) | inputs
    if cache is None:
        return model.generate(input_ids=ids, do_sample=False, **settings)
    return generate(model, input_ids=ids, do_sample=False, past_key_values=cache, **settings)


def assert_same(output, expected):
    assert difference(torch.cat(output.logits), torch.cat(expected.logits)) < 1e-5


@pytest.mark.parametrize("name", ["blip-2", "instructblip"])
def test_a_model_that_generates_inside_by_each_door(name):
    sizes = {key: value for key, value in VISION.items() if key != "projection_dim"}
    config = CONFIG_MAPPING[name](
        vision_config=dict(image_size=4, patch_size=2, **sizes),
        qformer_config=dict(encoder_hidden_size=32, vocab_size=211, **sizes),
        text_config=dict(model_type="llama", **TEXT),
        num_query_tokens=4,
        image_token_index=IMAGE,
    )
    with seeded():
        model = sharpened((Blip2 if name == "blip-2" else InstructBlip)(config).eval().float())
    ids, image = prompt(10).clamp(max=200), torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    ids[0, :4] = IMAGE
    inputs = dict(pixel_values=image, input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=30)
    inputs |= dict(qformer_input_ids=prompt(5), qformer_attention_mask=torch.ones(1, 5)) if name != "blip-2" else {}
    window = dict(window_length=16, num_sink_tokens=4)
    expected = model.generate(**inputs, **window, custom_generate=loadable(ROOT), trust_remote_code=True)
    assert not torch.equal(expected, model.generate(**inputs))
    assert torch.equal(generate(model, 16, 4, **inputs), expected)
    assert "generate" not in vars(model.language_model)
    model.generation_config.window_length, model.generation_config.num_sink_tokens = 16, 4
    model.generate = functools.partial(generate, model=model)  # as of a folder that carries the code
    cache = SinkCache(16, 4)
    assert torch.equal(model.generate(**inputs), expected)
    assert torch.equal(model.generate(**inputs, **{CACHE: cache}), expected)
    assert cache.get_seq_length() == 39
