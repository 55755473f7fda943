"""Models whose own code asks the cache what transformers' models don't: how much it can hold, or give, and has seen."""

import pytest
import torch

from custom_generate.generate import SinkCache
from tests.support.helpers import left_padded, prompt, seeded, sharpened, stream
from tests.support.modeling_backwards import BackwardsConfig
from tests.support.modeling_older import OlderForCausalLM
from tests.support.oracle import difference, oracle


def built(inverts: bool = False):
    with seeded():
        model = sharpened(OlderForCausalLM(BackwardsConfig()).eval())
    model.inverts = inverts
    return model


def error(output, row: int = 0, first: int = 0) -> float:
    """By how much the logits of a row's answer are off, behind `first` columns of padding."""
    logits, tokens = torch.stack([step[row] for step in output.logits]), output.sequences[row, first:].tolist()
    return difference(logits, oracle(built(), tokens, 16, 4)[-len(logits) - 1 : -1])


@pytest.mark.parametrize("inverts", [False, True], ids=["adds masks", "inverts masks"])
@pytest.mark.parametrize("length, chunk_size", [(5, None), (40, None), (40, 1)])
def test_a_prompt_and_a_second_turn(length, chunk_size, inverts):
    model, cache = built(inverts), SinkCache(16, 4)
    first = stream(model, prompt(length), 20, past_key_values=cache, prefill_chunk_size=chunk_size)
    assert error(first) < 1e-5
    ids = torch.cat([first.sequences, prompt(7, seed=3)], dim=1)
    mask = torch.ones_like(ids)
    assert error(stream(model, ids, 20, past_key_values=cache, attention_mask=mask)) < 1e-5


@pytest.mark.parametrize("inverts", [False, True], ids=["adds masks", "inverts masks"])
@pytest.mark.parametrize("length", [9, 30])
def test_padded_rows(length, inverts):
    batch = left_padded([prompt(5), prompt(length, seed=2)])
    output = stream(built(inverts), batch["input_ids"], 30, attention_mask=batch["attention_mask"])
    assert error(output, 0, first=length - 5) < 1e-5 and error(output, 1) < 1e-5


def test_masks_of_another_kind_are_refused():
    model = built()
    model.causal_mask = lambda mask, *args: (
        OlderForCausalLM.causal_mask(model, None, *args) / (1 if mask is None else -4)
    )
    with pytest.raises(ValueError, match="OlderForCausalLM.*its code makes something else of a mask over keys"):
        stream(model, prompt(5), 5)
    model = built()
    model.causal_mask = lambda mask, *args: OlderForCausalLM.causal_mask(
        model, mask if mask is None else mask[0], *args
    )
    with pytest.raises(ValueError, match="its code takes no mask over keys"):
        stream(model, prompt(5), 5)
