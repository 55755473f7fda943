"""What is read off a model is tried, not guessed: off models that were patched, wrapped, or are not all there."""

import pytest
import torch
from transformers import CONFIG_MAPPING, LlamaForCausalLM

from custom_generate.generate import CACHE, SinkCache, generate
from tests.support.helpers import SMALL, changing, left_padded, prompt, remembering, small_model, stream
from tests.support.oracle import difference, oracle

pytestmark = pytest.mark.newest_only


def error(model, reference=None) -> float:
    """How far a stream of `model` past its window is from the oracle on `reference`, by default on itself."""
    output = stream(model, prompt(3))
    expected = oracle(model if reference is None else reference, output.sequences[0].tolist(), 16, 4)
    return difference(torch.cat(output.logits), expected[2:-1])


# --- a forward that hands on whatever it gets


class HandsOn(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class HandsOnByName(LlamaForCausalLM):
    def forward(self, input_ids=None, past_key_values=None, **kwargs):
        return super().forward(input_ids=input_ids, **{CACHE: past_key_values}, **kwargs)


def with_forward(forward):
    """A small Llama whose forward is `forward(its own, *args, **kwargs)`."""
    model = small_model()
    own = model.forward
    model.forward = lambda *args, **kwargs: forward(own, *args, **kwargs)
    return model


def of_class(cls):
    model = small_model()
    model.__class__ = cls
    return model


WRAPPED = {
    "patched": lambda: with_forward(lambda own, *args, **kwargs: own(*args, **kwargs)),
    "a subclass": lambda: of_class(HandsOn),
    "a subclass that names some": lambda: of_class(HandsOnByName),
}


@pytest.mark.parametrize("build", WRAPPED.values(), ids=WRAPPED.keys())
def test_a_forward_that_hands_on_what_it_gets(build):
    model = build()
    assert error(model, small_model()) < 1e-5
    rows = [prompt(3), prompt(9, seed=1)]
    settings = dict(max_new_tokens=40, do_sample=False)
    tokens = generate(model, 16, 4, **left_padded(rows), **settings)
    for row, ids in zip(tokens, rows):
        assert torch.equal(row[-40:], generate(small_model(), 16, 4, input_ids=ids, **settings)[0, -40:])


def drops_positions():
    return with_forward(lambda own, *args, position_ids=None, **kwargs: own(*args, **kwargs))


def takes_no_positions():
    model = small_model()
    own = model.forward

    def forward(input_ids, past_key_values=None, use_cache=None):
        return own(input_ids=input_ids, use_cache=use_cache, **{CACHE: past_key_values})

    model.forward = forward
    return model


@pytest.mark.parametrize("build", [drops_positions, takes_no_positions])
def test_a_forward_that_makes_nothing_of_positions_is_refused(build):
    with pytest.raises(ValueError, match="`model`.*its forward takes no `position_ids`, or makes nothing of them"):
        generate(build(), 16, 4, input_ids=prompt(3), max_new_tokens=5)


# --- numbers of several dtypes, and none


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_embeddings_in_a_narrower_dtype(dtype, attention):
    model = small_model(attn_implementation=attention)
    model.get_input_embeddings().to(dtype)
    # The oracle on the same weights, whose angles are not rounded to `dtype`.
    wide = small_model()
    wide.get_input_embeddings().weight.data = model.get_input_embeddings().weight.data.float()
    assert error(model, wide) < 2 * torch.finfo(dtype).eps
    rows = [prompt(3), prompt(9, seed=1)]
    settings = dict(max_new_tokens=40, do_sample=False)
    tokens = generate(model, 16, 4, **left_padded(rows), **settings)
    for row, ids in zip(tokens, rows):
        assert torch.equal(row[-40:], generate(model, 16, 4, input_ids=ids, **settings)[0, -40:])


def with_weights(change):
    model = small_model()
    with torch.no_grad():
        change(model)
    return model


def ruling_out(value: float):
    """A small Llama that rules every other token out, as some do with those of images."""
    model = small_model()
    changing(model.lm_head, lambda logits: logits.index_fill(-1, torch.arange(0, 211, 2), value))
    return model


@pytest.mark.parametrize(
    "build",
    [
        lambda: with_weights(lambda model: model.lm_head.weight.zero_()),
        lambda: with_weights(lambda model: model.model.layers[1].self_attn.k_proj.weight.zero_()),
        lambda: with_weights(lambda model: model.model.layers[1].self_attn.k_proj.weight[:16].zero_()),
        lambda: ruling_out(-torch.inf),
        lambda: ruling_out(torch.finfo(torch.float32).min),
    ],
    ids=["no head", "a layer without keys", "a head without keys", "-inf", "the least number"],
)
def test_zeros_and_tokens_ruled_out(build):
    model = build()
    output = stream(model, prompt(3))
    expected = oracle(model, output.sequences[0].tolist(), 16, 4)[2:-1]
    assert torch.allclose(torch.cat(output.logits), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "build",
    [
        lambda: with_weights(lambda model: model.lm_head.weight.zero_()),
        lambda: ruling_out(-torch.inf),
        lambda: ruling_out(torch.finfo(torch.float32).min),
    ],
)
def test_queries_that_grow_are_seen_behind_zeros_and_tokens_ruled_out(build):
    model = scaling_queries(build())
    with pytest.raises(ValueError, match="changes when all move by the same distance.*positions up to 511 differs by"):
        generate(model, 16, 4, input_ids=prompt(3), max_new_tokens=5)


def scaling_queries(model, scale=lambda positions: (1 + positions / 2048) ** 0.1):
    rotary = model.model.rotary_emb
    remembering(rotary)
    for layer in model.model.layers:
        changing(layer.self_attn.q_proj, lambda queries: queries * scale(rotary.latest[..., None]))
    return model


@pytest.mark.parametrize(
    "change, seen",
    [
        (lambda model: model.lm_head.weight.fill_(torch.nan), "its logits are NaN or infinite"),
        (
            lambda model: model.model.layers[1].self_attn.v_proj.weight.fill_(torch.nan),
            "of its layer 1 are NaN or infinite",
        ),
        (lambda model: model.get_input_embeddings().weight.fill_(torch.inf), "of its layer 0 are NaN or infinite"),
    ],
    ids=["head", "values", "embeddings"],
)
def test_a_model_that_gives_no_numbers_is_told_so(change, seen):
    with pytest.raises(ValueError, match=f"`model`.*can't be streamed: .*{seen}.*Look at its weights"):
        generate(with_weights(change), 16, 4, input_ids=prompt(3), max_new_tokens=5)


def test_where_no_rotation_is_found_no_cause_is_named():
    model = small_model()
    # As anything that is not the same twice.
    changing(model.model.layers[1].self_attn.k_proj, lambda keys: keys + torch.randn_like(keys))
    with pytest.raises(ValueError, match=r"keys of its layer 1 change.*leaves \S+ of their length") as raised:
        generate(model, 16, 4, input_ids=prompt(3), max_new_tokens=5)
    assert "learned" not in str(raised.value) and "RoPE" not in str(raised.value)


# --- as far as positions will go


def ministral(beta: float = 0.5):
    if "ministral3" not in CONFIG_MAPPING:
        pytest.skip("Ministral 3 came with transformers 5")
    rope = dict(
        rope_type="yarn",
        rope_theta=1e4,
        factor=16.0,
        original_max_position_embeddings=16,
        max_position_embeddings=256,
        llama_4_scaling_beta=beta,
        beta_fast=32.0,
        beta_slow=1.0,
        mscale=1.0,
        mscale_all_dim=1.0,
    )
    return small_model(CONFIG_MAPPING["ministral3"](**{**SMALL, "head_dim": 16, "rope_parameters": rope}))


def scales_past(length: int):
    """A small Llama that scales its queries by whole lengths, as Ministral 3, which its configuration names."""
    model = small_model()
    model.config.original_max_position_embeddings = length
    return scaling_queries(model, lambda positions: 1 + 0.5 * (1 + positions // length).log())


@pytest.mark.parametrize(
    "build, unscaled",
    [(ministral, lambda: ministral(0.0)), (lambda: scales_past(16), small_model)],
    ids=["Ministral 3", "a patched Llama"],
)
def test_a_window_past_which_queries_are_scaled(build, unscaled):
    model = build()
    assert error(model, unscaled()) < 1e-5  # in a window of 16 no query ever is
    for window_length in (17, 24, 64):
        cache = SinkCache(window_length, 4)
        with pytest.raises(ValueError, match=f"`window_length` must be at most 16, got {window_length}"):
            generate(model, input_ids=prompt(3), past_key_values=cache, max_new_tokens=5)
        assert not cache.is_bound
    assert error(model, unscaled()) < 1e-5


def turns_otherwise_from(position: int):
    """A small Llama that changes its frequencies at a position which its configuration does not name."""
    model = small_model(max_position_embeddings=8192)
    rotary = model.model.rotary_emb
    forward, frequencies = rotary.forward, rotary.inv_freq.clone()

    def changing(x, position_ids, *args, **kwargs):
        rotary.inv_freq = frequencies / (1 if position_ids.max() < position else 2)
        return forward(x, position_ids, *args, **kwargs)

    rotary.forward = changing
    return model


def scales_unnamed(length: int):
    model = small_model(max_position_embeddings=8192)
    return scaling_queries(model, lambda positions: 1 + 0.5 * (1 + positions // length).log())


@pytest.mark.parametrize(
    "build, seen",
    [
        (lambda: turns_otherwise_from(2000), "at position 4095 the keys of its layer 0 are rotated otherwise"),
        (lambda: scales_unnamed(2000), "changes when all move by the same distance.*up to 4095"),
    ],
    ids=["other frequencies", "other queries"],
)
def test_what_changes_before_positions_come_back(build, seen):
    with pytest.raises(ValueError, match=f"^`model`.*can't be streamed: .*{seen}"):
        generate(build(), 16, 4, input_ids=prompt(3), max_new_tokens=5)


def test_positions_of_a_long_window_are_tried_once():
    model, runs = small_model(), []
    changing(model.lm_head, lambda logits: runs.append(True) or logits)
    SinkCache(600, 4).bind(model)  # longer than the trained length of 512
    needed = len(runs)
    SinkCache(600, 4).bind(model)
    SinkCache(16, 4).bind(model)
    assert len(runs) == needed > 0
