"""What an update of the cache costs, without a model: one token a step, on a full window, in all layers.

    make update

The unbound cache, which is the class of transformers<4.53 and turns all its keys at every step, against a bound one,
which turns its sinks only. The steps of the bound one include the planning of `prepare_inputs`. Once in thousands of
tokens it also shifts all its keys back: what that comes to for each token has a column of its own.
"""

import argparse
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from transformers import PreTrainedModel, Qwen3Config

from benchmarks.measure import Table, described, in_turns, now, parsed, random_model, ratio, target
from custom_generate.generate import SinkCache

LAYERS, HEADS, DIM, SINKS = 28, 8, 128, 4
TIMES_LESS = {256: 8, 4096: 100}  # what it should be, by window
STEPS = 20


class Pair:
    """A bound and an unbound cache, both full."""

    def __init__(self, model: PreTrainedModel, window: int):
        device, dtype = model.device, model.dtype
        self.bound, self.unbound = SinkCache(window, SINKS).bind(model), SinkCache(window, SINKS)
        keys = torch.randn(1, HEADS, window, DIM, device=device, dtype=dtype)
        cos, sin = model.model.rotary_emb(keys, torch.arange(window, device=device)[None])
        self.bound.prepare_inputs(torch.zeros(1, window, dtype=torch.long, device=device))
        for layer in range(LAYERS):
            self.bound.update(keys, keys, layer)
            self.unbound.update(keys, keys, layer, {"cos": cos, "sin": sin})
        self.token = torch.zeros(1, 1, dtype=torch.long, device=device)
        self.new = [torch.randn(2, 1, HEADS, 1, DIM, device=device, dtype=dtype).unbind() for _ in range(LAYERS)]
        self.angles = {"cos": cos[:, -1:], "sin": sin[:, -1:]}
        self.few = STEPS if window <= 1024 else 1  # of the unbound cache, which takes seconds at the longest

    def step_bound(self) -> None:
        self.bound.prepare_inputs(self.token)
        for layer, (key, value) in enumerate(self.new):
            self.bound.update(key, value, layer)

    def step_unbound(self) -> None:
        for layer, (key, value) in enumerate(self.new):
            self.unbound.update(key, value, layer, self.angles)

    def shift_back(self) -> None:
        for ring in self.bound.held.rings:
            ring.lower_positions([ring.lowered.offsets[0] + 1])

    def timed(self, step: Callable[[], None], times: int) -> list[float]:
        """The seconds that each of so many calls of `step` takes."""
        seconds = []
        for _ in range(times):
            start = now(self.token.device)
            step()
            seconds.append(now(self.token.device) - start)
        return seconds


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--window-length", type=int, nargs="+", default=[256, 1024, 4096, 16384])
    parser.add_argument("--rounds", type=int, default=20, help=f"of {STEPS} steps each, where they are short")
    arguments = parsed(parser)
    # The smallest model with such keys. Nothing but its rotation is used.
    sizes = dict(hidden_size=64, vocab_size=100, intermediate_size=8, num_hidden_layers=LAYERS, head_dim=DIM)
    config = Qwen3Config(**sizes, num_attention_heads=8, num_key_value_heads=HEADS, max_position_embeddings=2**20)
    model = random_model(config, arguments.device, arguments.dtype)

    pairs = {window: Pair(model, window) for window in arguments.window_length}
    turns = {("bound", window): partial(pair.timed, pair.step_bound, STEPS) for window, pair in pairs.items()}
    turns |= {("unbound", window): partial(pair.timed, pair.step_unbound, pair.few) for window, pair in pairs.items()}
    medians, shortest = in_turns(turns, arguments.rounds), ("bound", min(pairs))
    table = Table(f"update-{arguments.device.type}", described(arguments.device, arguments.dtype))
    for window, pair in pairs.items():
        bound, unbound = ("bound", window), ("unbound", window)
        row = {"window": window, "unbound, ms": median(medians[unbound]), "bound, ms": median(medians[bound])}
        row |= {
            "times less": ratio(medians, unbound, bound),
            "of the shortest window's": ratio(medians, bound, shortest),
        }
        # Off the medians: it takes too long, and is too rare, for turns.
        shift_back = 1000 * median(pair.timed(pair.shift_back, 5)) / pair.bound.held.ceiling
        table.add(**row, **{"shifting back, ms": shift_back})
    print()
    for window in sorted(pairs.keys() & TIMES_LESS.keys()):
        less = ratio(medians, ("unbound", window), ("bound", window))
        target(f"times less than the unbound cache, at {window}", less, at_least=TIMES_LESS[window])
    growth = ratio(medians, ("bound", max(pairs)), shortest)
    target(f"a step at {max(pairs)} against one at {min(pairs)}", growth, at_most=1.1)


if __name__ == "__main__":
    main()
