"""The rotation is read off the model, without knowing its architecture and without leaving a trace."""

import gc
import weakref

import pytest
import torch
from transformers import CONFIG_MAPPING, CohereConfig, GPTNeoXConfig, PhiConfig

from custom_generate.generate import SinkCache, generate, read_model
from tests.support.helpers import SMALL, prompt, small_model

pytestmark = pytest.mark.newest_only


def rotations_of(model) -> list:
    """How each layer of `model` rotates its keys."""
    return [rotation for rotation, _ in read_model(model).rotations]


@pytest.mark.parametrize(
    "config, layout",
    [
        (CONFIG_MAPPING["llama"](**SMALL), dict(start=0, interleaved=False, pairs=8)),
        (PhiConfig(**SMALL, partial_rotary_factor=0.5), dict(start=0, interleaved=False, pairs=4)),
        (GPTNeoXConfig(**SMALL, rotary_pct=0.25), dict(start=0, interleaved=False, pairs=2)),
        (CohereConfig(**SMALL), dict(start=0, interleaved=True, pairs=8)),
    ],
    ids=["whole head", "half", "quarter", "interleaved"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_layouts(config, layout, dtype):
    model = small_model(config).to(dtype)
    rotations = rotations_of(model)
    assert len(rotations) == 2
    for rotation in rotations:
        assert (rotation.start, rotation.interleaved) == (layout["start"], layout["interleaved"])
        assert rotation.frequencies.shape == (layout["pairs"],) and rotation.frequencies[0] == 1


def test_a_model_that_turns_backwards():
    model = small_model()
    rotary = model.model.rotary_emb
    forward = rotary.forward

    def backwards(*args, **kwargs):
        cos, sin = forward(*args, **kwargs)
        return cos, -sin

    rotary.forward = backwards
    assert torch.equal(rotations_of(model)[0].frequencies, -rotary.inv_freq.double())


def test_frequencies_that_are_kept_in_another_order():
    model = small_model()
    rotary = model.model.rotary_emb
    used, forward = rotary.inv_freq.clone(), rotary.forward
    rotary.inv_freq = rotary.original_inv_freq = torch.cat([used[::2], used[1::2]])

    def in_order(*args, **kwargs):
        places = torch.arange(8).view(2, 4).T.flatten().repeat(2) + torch.arange(0, 16, 8).repeat_interleave(8)
        return tuple(part[..., places] for part in forward(*args, **kwargs))

    rotary.forward = in_order
    assert torch.equal(rotations_of(model)[0].frequencies, used.double())


@pytest.mark.parametrize("rope_type", ["yarn", "llama3"])
def test_scaled_frequencies_are_those_in_use(rope_type):
    # The scaled frequencies differ from the plain ones in the slow pairs only.
    scaling = {"rope_type": rope_type, "factor": 8.0, "original_max_position_embeddings": 64}
    if rope_type == "llama3":
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    plain, scaled = small_model(), small_model(rope_scaling=scaling)
    found = rotations_of(scaled)[0].frequencies
    assert torch.equal(found, scaled.model.rotary_emb.inv_freq.double())
    assert found[0] == rotations_of(plain)[0].frequencies[0] and found[-1] < rotations_of(plain)[0].frequencies[-1]


def test_frequencies_not_in_use_are_passed_over():
    model = small_model(max_position_embeddings=2048)
    used = model.model.rotary_emb.inv_freq
    for name, decoy in {"nearly": used * (1 - 1e-4), "other": used.flip(0), "same": used.clone()}.items():
        model.register_buffer(name, decoy)
    assert all(torch.equal(rotation.frequencies, used.double()) for rotation in rotations_of(model))


def test_layers_without_positions():
    # As every fourth of SmolLM3.
    model = small_model(num_hidden_layers=3)
    attention = model.model.layers[1].self_attn
    forward = attention.forward

    def unturned(*args, **kwargs):
        cos, sin = kwargs["position_embeddings"]
        return forward(*args, **{**kwargs, "position_embeddings": (torch.ones_like(cos), torch.zeros_like(sin))})

    attention.forward = unturned
    first, second, third = rotations_of(model)
    assert second is None and first is third is not None


def test_it_runs_a_few_tokens_and_never_again():
    model = small_model()
    passes, own = [], model.model.embed_tokens.forward

    def forward(input_ids):
        passes.append(input_ids.shape)
        return own(input_ids)

    model.model.embed_tokens.forward = forward
    SinkCache(16, 4).bind(model)
    assert passes == [(4, 1), (4, 1), (4, 4), (4, 4), (4, 4), (3, 2)]
    SinkCache(32, 8).bind(model)
    assert len(passes) == 6


def test_a_cast_model_is_read_again():
    model = small_model()
    before = rotations_of(model)[0].frequencies
    after = rotations_of(model.bfloat16())[0].frequencies
    assert torch.equal(after, model.model.rotary_emb.inv_freq.double()) and not torch.equal(before, after)


def test_neither_the_cache_nor_what_was_read_keeps_the_model_alive():
    model = small_model()
    alive = weakref.ref(model)
    cache = SinkCache(16, 4).bind(model)
    generate(model, input_ids=prompt(5), past_key_values=cache, max_new_tokens=5)
    del model
    gc.collect()
    assert alive() is None and cache.is_bound
