"""Model classes with a `generate` of their own, as LLaVA's: it runs once, however the stream was asked for."""

import functools
import itertools
import types

import pytest
import torch
from transformers import GenerationMixin, LlamaForCausalLM, LogitsProcessor

from custom_generate.generate import SinkCache, generate
from tests.support import ROOT
from tests.support.helpers import loadable, prompt, seeded, sharpened, small_model

pytestmark = pytest.mark.newest_only

SETTINGS = dict(max_new_tokens=24, do_sample=False)
WINDOW = dict(window_length=16, num_sink_tokens=4)


def asked_for() -> dict:
    """The arguments of `generate` that ask for a stream."""
    return dict(custom_generate=loadable(ROOT), trust_remote_code=True, **WINDOW)


class Trimmed(LlamaForCausalLM):
    """Returns the new tokens only."""

    def generate(self, inputs, **kwargs):
        return super().generate(inputs, **kwargs)[:, inputs.shape[1] :]


class Extended(Trimmed):
    """Puts three tokens before the prompt, and one behind the answer."""

    @torch.no_grad()
    def generate(self, inputs, **kwargs):
        tokens = super().generate(torch.cat([prompt(3, seed=7), inputs], dim=1), **kwargs)
        return torch.cat([tokens, torch.tensor([[9]])], dim=1)


class Embedded(LlamaForCausalLM):
    """Makes embeddings of its prompt, of which a token may take several."""

    def generate(self, inputs=None, **kwargs):
        embeddings = self.get_input_embeddings()(inputs.repeat_interleave(2, dim=1))
        return super().generate(inputs_embeds=embeddings, position_ids=None, **kwargs)


class Streaming(LlamaForCausalLM):
    """Asks for a stream by itself."""

    def generate(self, inputs, **kwargs):
        return super().generate(inputs, **{**asked_for(), **kwargs})[:, inputs.shape[1] :]


class StreamingByHand(LlamaForCausalLM):
    def generate(self, inputs, **kwargs):
        return self._stream(inputs, **kwargs)[:, inputs.shape[1] :]

    def _stream(self, inputs, **kwargs):
        return generate(self, **{**WINDOW, "inputs": inputs, **kwargs})


def undocumented(function):
    """A decorator that doesn't say what it decorates."""

    def decorated(*args, **kwargs):
        return function(*args, **kwargs)

    return decorated


class Decorated(LlamaForCausalLM):
    @undocumented
    def generate(self, inputs, **kwargs):
        return super().generate(inputs, **kwargs)[:, inputs.shape[1] :]


class Unreached:
    def generate(self, *args, **kwargs):
        raise AssertionError("transformers' own comes before it")


class WithAnother(Trimmed, Unreached):
    """Has a base with a `generate` behind transformers' own."""


def trimming(base):
    """A class made by a function, so that all of them share one code."""

    class Again(base):
        def generate(self, inputs, **kwargs):
            return super().generate(inputs, **kwargs)[:, 1:]

    return Again


def built(model_class):
    """The small Llama, of a class with a `generate` of its own; all of them have the same weights."""
    with seeded():
        model = model_class(small_model().config).eval()
    model.generation_config.pad_token_id = 0
    return sharpened(model)


def streamed(input_ids: torch.Tensor, **settings) -> torch.Tensor:
    """What transformers' own loop makes of a prompt."""
    return _streamed(tuple(input_ids.flatten().tolist()), **settings)


@functools.cache
def _streamed(ids: tuple[int, ...], **settings) -> torch.Tensor:
    return built(LlamaForCausalLM).generate(torch.tensor([ids]), **asked_for() | SETTINGS | settings)


def extended(input_ids: torch.Tensor) -> torch.Tensor:
    tokens = streamed(torch.cat([prompt(3, seed=7), input_ids], dim=1))[:, 8:]
    return torch.cat([tokens, torch.tensor([[9]])], dim=1)


EXPECTED = {
    Trimmed: lambda ids: streamed(ids)[:, 5:],
    Extended: extended,
    Embedded: lambda ids: streamed(ids.repeat_interleave(2, dim=1))[:, 10:],
    Streaming: lambda ids: streamed(ids)[:, 5:],
    StreamingByHand: lambda ids: streamed(ids)[:, 5:],
    WithAnother: lambda ids: streamed(ids)[:, 5:],
    Decorated: lambda ids: streamed(ids)[:, 5:],
    trimming(trimming(LlamaForCausalLM)): lambda ids: streamed(ids)[:, 2:],
}


def by_name(model, inputs, **kwargs):
    return model.generate(inputs, **asked_for() | kwargs)


def by_hand(model, inputs, **kwargs):
    return generate(model, **WINDOW | dict(inputs=inputs) | kwargs)


def by_carrying(model, inputs, **kwargs):
    """What transformers makes of a model that was loaded from a repository with this file."""
    model.generate = functools.partial(generate, model=model)
    return model.generate(inputs, **WINDOW | kwargs)


DOORS = [by_name, by_hand, by_carrying]


# Each class by one way in, and the plainest by all.
WAYS = [*zip(EXPECTED, itertools.cycle(DOORS)), (Trimmed, by_hand), (Trimmed, by_carrying)]


@pytest.mark.parametrize("model_class, door", WAYS, ids=lambda value: value.__name__)
def test_it_runs_once(model_class, door):
    model, expected = built(model_class), EXPECTED[model_class](prompt(5))
    for _ in range(2):
        assert torch.equal(door(model, prompt(5), **SETTINGS), expected)


def test_before_an_eviction_it_gives_what_it_gives_without_a_stream():
    model = built(Trimmed)
    plain = model.generate(prompt(10), max_new_tokens=30, do_sample=False)
    assert plain.shape == (1, 30)
    for door in DOORS:
        assert torch.equal(door(model, prompt(10), window_length=64, max_new_tokens=30, do_sample=False), plain)


@pytest.mark.parametrize("model_class", [Streaming, StreamingByHand])
def test_a_class_that_streams_by_itself(model_class):
    assert torch.equal(built(model_class).generate(prompt(5), **SETTINGS), streamed(prompt(5))[:, 5:])
    wide = streamed(prompt(5), window_length=24)[:, 5:]
    assert not torch.equal(wide, streamed(prompt(5))[:, 5:])
    for door in DOORS:  # the window that is named wins over the class's
        assert torch.equal(door(built(model_class), prompt(5), window_length=24, **SETTINGS), wide)


@pytest.mark.parametrize(
    "model_class, door", [(Trimmed, by_name), (Trimmed, by_hand), (Embedded, by_carrying), (Streaming, by_name)]
)
def test_a_cache_goes_on(model_class, door):
    model, cache = built(model_class), SinkCache(16, 4)
    whole = door(model, prompt(5), **SETTINGS)
    settings = dict(do_sample=False, cache=cache)
    first = door(model, prompt(5), max_new_tokens=14, **settings)
    assert torch.equal(first, whole[:, :14]) and cache.is_bound
    if model_class is not Embedded:
        ids = torch.cat([prompt(5), first], dim=1)
        assert torch.equal(door(model, ids, max_new_tokens=10, **settings), whole[:, 14:])
    cache.reset()
    assert torch.equal(door(model, prompt(5), max_new_tokens=14, **settings), first)


def test_one_that_is_patched_onto_the_instance():
    def of_the_class(self, inputs, **kwargs):
        return type(self).generate(self, inputs, **kwargs)[:, 1:]

    def of_the_instance(generate):
        return lambda inputs, **kwargs: generate(inputs, **kwargs)[:, 1:]

    for model_class, kept in ((LlamaForCausalLM, slice(1, None)), (Trimmed, slice(6, None))):
        expected = streamed(prompt(5))
        for patch in (lambda model: types.MethodType(of_the_class, model), lambda m: of_the_instance(m.generate)):
            model = built(model_class)
            model.generate = patch(model)
            assert torch.equal(by_name(model, prompt(5), **SETTINGS), expected[:, kept])
            # By hand it is passed by, as it may hold the model that the stream stands in for: the class's runs alone.
            assert torch.equal(by_hand(model, prompt(5), **SETTINGS), expected[:, kept.start - 1 :])
    # Patched around what a repository brought.
    model = built(Trimmed)
    model.generate = of_the_instance(functools.partial(generate, model=model))
    assert torch.equal(model.generate(prompt(5), **WINDOW, **SETTINGS), expected[:, 6:])


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("patched", [LlamaForCausalLM, GenerationMixin])
def test_one_that_is_patched_onto_a_class(patched, door, monkeypatch):
    own, expected = patched.generate, streamed(prompt(5))[:, 5:]

    @functools.wraps(own)
    def trimmed(self, inputs, **kwargs):
        return own(self, inputs, **kwargs)[:, inputs.shape[1] :]

    monkeypatch.setattr(patched, "generate", trimmed)
    assert torch.equal(door(built(LlamaForCausalLM), prompt(5), **SETTINGS), expected)


def test_a_generation_within_one_is_whole():
    class Asks(LogitsProcessor):
        def __call__(self, input_ids, scores):
            inner.append(by_hand(model, prompt(5), **SETTINGS))
            return scores

    model, inner = built(Trimmed), []
    expected = streamed(prompt(5))[:, 5:]
    for door in (by_name, by_hand, lambda *args, **kwargs: model.generate(*args[1:], **kwargs)):
        door(model, prompt(5), max_new_tokens=1, logits_processor=[Asks()])
    assert len(inner) == 3 and all(torch.equal(tokens, expected) for tokens in inner)


def test_one_with_a_loop_of_its_own_is_no_stream():
    class Loops(LlamaForCausalLM):
        def generate(self, inputs, **kwargs):
            return torch.cat([inputs, self(input_ids=inputs).logits[:, -1:].argmax(-1)], dim=1)

    for door in (by_hand, by_carrying):
        with pytest.raises(ValueError, match="`model` .Loops. has a `generate` of its own that did not hand"):
            door(built(Loops), prompt(5), **SETTINGS)


def test_a_model_that_has_none():
    with pytest.raises(
        TypeError, match="`model` must be a transformers `PreTrainedModel` that generates, got LlamaModel. Load"
    ):
        by_hand(built(LlamaForCausalLM).model, prompt(5), **SETTINGS)


@pytest.mark.parametrize("door", [by_hand, by_carrying])
def test_one_that_generates_twice_in_a_cache_is_refused(door):
    class Twice(LlamaForCausalLM):
        def generate(self, inputs, **kwargs):
            return torch.cat([super(Twice, self).generate(row[None], **kwargs) for row in inputs])

    assert torch.equal(by_name(built(Twice), prompt(5).repeat(2, 1), **SETTINGS), streamed(prompt(5)).repeat(2, 1))
    with pytest.raises(ValueError, match="`input_ids` must be the whole conversation, longer than the 28 tokens"):
        door(built(Twice), prompt(5).repeat(2, 1), **SETTINGS)
