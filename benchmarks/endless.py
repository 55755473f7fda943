"""A stream of a million tokens ends where a fresh one of its last few dozen does.

    make endless

Nothing older than (layers x window) tokens can reach a model's last logits but through the sinks. So the stream is
compared with one that was fed the same sinks and only that many of its last tokens. They agree to rounding, or errors
pile up in what is kept.
"""

import argparse
import time

import torch

from custom_generate.generate import SinkCache
from tests.support.helpers import SMALL, small_model
from tests.support.oracle import difference

WINDOW, SINKS, LAYERS = 16, 4, 2


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1_000_000, help="past the window")
    parser.add_argument("--dtype", default="float32", help="of the model")
    arguments = parser.parse_args()
    model = small_model(num_hidden_layers=LAYERS).to(getattr(torch, arguments.dtype))
    tokens = torch.randint(
        2, SMALL["vocab_size"], (WINDOW + arguments.tokens,), generator=torch.Generator().manual_seed(0)
    )
    recent = torch.cat([tokens[:SINKS], tokens[-LAYERS * WINDOW - WINDOW :]])

    def stream(tokens: torch.Tensor) -> torch.Tensor:
        """The logits of the last window, token by token: `[WINDOW, vocab_size]`."""
        cache, latest, start = SinkCache(WINDOW, SINKS).bind(model), [], time.perf_counter()
        for seen, token in enumerate(tokens.tolist(), 1):
            logits = model(**cache.prepare_inputs(torch.tensor([[token]]))).logits[0, -1]
            latest = [*latest[-WINDOW + 1 :], logits]
            if seen % 100_000 == 0:
                print(f"{seen:>12,} tokens, {(time.perf_counter() - start) / seen * 1000:.2f} ms each", flush=True)
        return torch.stack(latest)

    error = difference(stream(tokens).float(), stream(recent).float())
    print(
        f"{arguments.dtype}, {LAYERS} layers, window {WINDOW}: {len(tokens):,} tokens, and a stream of {len(recent)}:"
    )
    print(f"largest relative difference of the last {WINDOW} logits: {error:.1e}")


if __name__ == "__main__":
    main()
