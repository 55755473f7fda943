"""What is read off a model is tried, not guessed: off models that were patched, wrapped, or are not all there."""

import pytest
import torch
from helpers import answer, difference, left_padded, oracle, prompt, small_model, stream
from transformers import LlamaForCausalLM

from custom_generate.generate import generate


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
        return super().forward(input_ids=input_ids, past_key_values=past_key_values, **kwargs)


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
        return own(input_ids=input_ids, past_key_values=past_key_values, use_cache=use_cache)

    model.forward = forward
    return model


@pytest.mark.parametrize("build", [drops_positions, takes_no_positions])
def test_a_forward_that_makes_nothing_of_positions_is_refused(build):
    with pytest.raises(ValueError, match="`model`.*its forward takes no `position_ids`, or makes nothing of them"):
        generate(build(), 16, 4, input_ids=prompt(3), max_new_tokens=5)
