"""An unbound `SinkCache` is the class of transformers<4.53, bit for bit."""

import warnings
from collections.abc import Callable

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import Cache

from custom_generate.generate import CACHE, SinkCache
from tests.support import ROOT
from tests.support.helpers import prompt, seeded, small_model, with_the_old_class

pytestmark = pytest.mark.ends_only

FIXTURE = ROOT / "tests/fixtures/unbound.safetensors"
WINDOW, SINKS, HEADS, HEAD_DIM, LAYERS = 12, 3, 1, 8, 2


def numbers(*shape: int, seed: int) -> torch.Tensor:
    """Float32 in [-1, 1) from integers alone, so that every platform makes the same."""
    count = torch.arange(torch.Size(shape).numel(), dtype=torch.int64) + 7919 * seed
    return ((count * 2654435761 % 2**24) / 2**23 - 1).view(shape)


def run(
    new_cache: Callable[[int, int], Cache],
    updates: list[int],
    dtype=torch.float32,
    rotary_dim=HEAD_DIM,
    table=False,
    beams=1,
) -> list[torch.Tensor]:
    """Drive a cache through `updates` (tokens in each) as the models of 4.52 did; return all that it returned."""
    cache = new_cache(WINDOW, SINKS)
    outputs = []
    seen = 0
    for step, length in enumerate(updates):
        cos, sin = (numbers(1, seen + length, rotary_dim, seed=seed).to(dtype) for seed in (1, 2))
        if table:  # two dimensions: all positions of the window at once
            cos, sin = (numbers(WINDOW, rotary_dim, seed=seed).to(dtype) for seed in (1, 2))
        else:
            cos, sin = cos[:, seen:], sin[:, seen:]
        kwargs = {"cos": cos, "sin": sin}
        if rotary_dim < HEAD_DIM:
            kwargs["partial_rotation_size"] = rotary_dim
        for layer in range(LAYERS):
            keys, values = (
                numbers(beams, HEADS, length, HEAD_DIM, seed=10 * step + 2 * layer + part).to(dtype) for part in (3, 4)
            )
            outputs += cache.update(keys, values, layer, kwargs)
            assert cache.get_seq_length(layer) == outputs[-1].shape[-2]
        seen += length
        if beams > 1:
            cache.reorder_cache(torch.arange(beams - 1, -1, -1) // (1 + step % 2))
    assert cache.get_max_cache_shape() == WINDOW
    return outputs + list(cache.key_cache) + list(cache.value_cache)


PROGRAMS = {
    "one by one": dict(updates=[1] * 20),
    "exactly full at once": dict(updates=[12, 1, 1]),
    "prompt": dict(updates=[5] + [1] * 15),
    "bfloat16": dict(updates=[5] + [1] * 15, dtype=torch.bfloat16),
    "float16": dict(updates=[7] + [1] * 9, dtype=torch.float16),
    "several tokens": dict(updates=[4, 3, 2, 5, 1, 3, 3, 2, 4]),
    "several tokens, bfloat16": dict(updates=[4, 8, 2, 5, 1, 3], dtype=torch.bfloat16),
    "partial rotation": dict(updates=[5] + [1] * 12, rotary_dim=4),
    "table": dict(updates=[5] + [1] * 12, table=True),
    "table, partial, several": dict(updates=[5, 3, 4, 2, 1, 1], table=True, rotary_dim=4),
    "beams": dict(updates=[5] + [1] * 12, beams=3),
    "beams, several, bfloat16": dict(updates=[5, 2, 6, 3, 1], beams=3, dtype=torch.bfloat16),
}


def old_class(window_length: int, num_sink_tokens: int) -> Cache:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return transformers.SinkCache(window_length, num_sink_tokens)


def assert_identical(got: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(got) == len(expected)
    for ours, theirs in zip(got, expected):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


@with_the_old_class
@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS.keys())
def test_every_tensor_is_that_of_the_old_class(program):
    assert_identical(run(SinkCache, **program), run(old_class, **program))


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_tensor_is_that_which_the_old_class_once_returned(name):
    got = run(SinkCache, **PROGRAMS[name])
    assert_identical([torch.cat(got, dim=2)], [load_file(FIXTURE)[name]])


@with_the_old_class
@pytest.mark.parametrize(
    "dtype, settings",
    [(torch.bfloat16, dict(do_sample=False)), (torch.float32, dict(do_sample=False, num_beams=3))],
    ids=["greedy", "beams"],
)
def test_plain_generate_makes_the_same_tokens_with_either_class(dtype, settings):
    model = small_model().to(dtype)

    def tokens(cache: Cache) -> torch.Tensor:
        with seeded():
            return model.generate(prompt(5), **{CACHE: cache}, max_new_tokens=40, **settings)

    ours, theirs = tokens(SinkCache(16, 4)), tokens(old_class(16, 4))
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, model.generate(prompt(5), max_new_tokens=40, **settings))


def test_without_angles_it_holds_what_fits_and_refuses_to_evict():
    cache = SinkCache(WINDOW, SINKS)
    keys = numbers(1, HEADS, WINDOW, HEAD_DIM, seed=1)
    for token in keys.split(1, dim=2):
        got, _ = cache.update(token, token, 0)
    assert torch.equal(got, keys)
    with pytest.raises(ValueError, match=r"13 tokens.*`cache\.bind\(model\)`"):
        cache.update(token, token, 0)
    assert cache.get_seq_length() == WINDOW and torch.equal(cache.key_cache[0], keys)


def test_reset_forgets():
    cache = SinkCache(WINDOW, SINKS)
    cache.update(numbers(1, 1, 3, 4, seed=1), numbers(1, 1, 3, 4, seed=2), 0)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.key_cache == []


if __name__ == "__main__":  # with transformers 4.52: write what its class returns
    save_file({name: torch.cat(run(old_class, **program), dim=2) for name, program in PROGRAMS.items()}, FIXTURE)
