"""An interrupt at any line of the cache leaves what the next call goes on from rightly, or refuses by name."""

import copy
import sys

import pytest
import torch

from custom_generate.generate import CACHE, Caller, SinkCache
from tests.support.helpers import prompt as random_tokens
from tests.support.helpers import small_model
from tests.support.oracle import difference, oracle

TOKENS = random_tokens(60)
FILE = SinkCache.update.__code__.co_filename


def cut_at_each_line(start, operation):
    """Copies of `start`, with `operation` cut short at one line of the file after the other; the last one is whole."""
    line = whole = 0
    while not whole:
        cache, left = copy.deepcopy(start), line

        def trace(frame, event, argument):
            nonlocal left
            if frame.f_code.co_filename != FILE:
                return None
            if event == "line":
                left -= 1
                if left < 0:
                    sys.settrace(None)
                    raise KeyboardInterrupt
            return trace

        sys.settrace(trace)
        try:
            operation(cache)
            whole = 1
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        yield cache
        line += 1
    assert line > 20


def feed(model, cache, tokens: torch.Tensor, compiled: bool = False) -> torch.Tensor:
    """Let the model read these tokens in one update; its logits, `[rows, length, vocabulary]`."""
    with torch.no_grad():
        if not compiled:
            return model(**cache.prepare_inputs(tokens)).logits
        cache.held.begin(len(tokens), cache.held.pads)
        inputs = {"input_ids": tokens, CACHE: cache}
        logits = model(**cache.held.inputs_for_step(model, inputs, Caller.GENERATE, compiled=True)).logits
        cache.held.finish_update()
        return logits


def stream_of(model, tokens: torch.Tensor, mask=None) -> SinkCache:
    """A cache of a window of 8 with 2 sinks that has seen these tokens, four in each update."""
    cache = SinkCache(8, 2).bind(model)
    with torch.no_grad():
        for end in range(4, tokens.shape[1] + 4, 4):
            start, end = cache.get_seq_length(), min(end, tokens.shape[1])
            given = None if mask is None else mask[:, :end]
            model(**cache.prepare_inputs(tokens[:, start:end], given))
    return cache


def goes_on_rightly(model, cache, expected: torch.Tensor, reached: set[int]) -> None:
    """Some updates more, of one token and of several, give what is `expected` of all tokens."""
    start = copy.deepcopy(cache).get_seq_length()  # of a copy, on which no model is at work
    reached.add(start)
    for length in (1, 3, 1, 1):
        logits = feed(model, cache, TOKENS[:, start : start + length])[0]
        assert difference(logits, expected[start : start + length]) < 1e-5
        start += length


MODELS = {"rotated": dict(num_hidden_layers=2), "lowered": dict(num_hidden_layers=2, max_position_embeddings=12)}


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("length", [1, 5])
def test_an_update(name, length, compiled):
    if compiled and length > 1:
        pytest.skip("compiled steps have one token")
    model = small_model(**MODELS[name])
    expected, reached = oracle(model, TOKENS[0, :40].tolist(), 8, 2), set()
    seen = 20 if name == "rotated" else 23 if length > 1 else 22  # where positions are lowered, with a ceiling of 12
    start = stream_of(model, TOKENS[:, :seen])
    update = TOKENS[:, seen : seen + length]
    offsets = start.held.offsets
    for cache in cut_at_each_line(start, lambda cache: feed(model, cache, update, compiled)):
        goes_on_rightly(model, cache, expected, reached)
    assert reached == {seen, seen + length}
    assert (name == "lowered") == (cache.held.offsets != offsets)
