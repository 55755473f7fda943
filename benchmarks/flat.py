"""Whether time and memory stay what they are over a long stream, and what of it piles up in `generate` itself.

    make flat                                               a tiny model over a million tokens
    make flat ARGS="--model smollm2 --tokens 20000"         the real one
    make flat ARGS="--generate"                             in one call of `generate`, and not in a loop of one's own

For each tenth of the stream: the median time of a token, and what the process (or the GPU) holds at its end. A call of
`generate` keeps all ids: how much of what it hands to a step grows has a column of its own.
"""

import argparse
import functools
import statistics
import time
from array import array
from typing import Optional

import torch
from measure import MODELS, Table, described, held, load, parsed
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from custom_generate.generate import SinkCache, generate


class Tenths(BaseStreamer):
    """Takes the prompt, then token by token, once they are on the CPU; holds no more at the end than at the start."""

    def __init__(self, tokens: int, device: torch.device, table: Table):
        self.device, self.table, self.progress = device, table, tqdm(total=tokens, unit="token")
        self.seconds, self.count, self.latest = array("d", bytes(8 * (tokens // 10))), 0, None
        self.kept_by_generate: Optional[int] = None  # bytes
        self.figures: list[tuple[float, float]] = []  # ms and MiB of each tenth

    def put(self, value: torch.Tensor) -> None:
        now, before = time.perf_counter(), self.latest
        self.latest = now
        if before is None:  # the prompt
            return
        self.seconds[self.count % len(self.seconds)] = now - before
        self.count += 1
        self.progress.update()
        if self.count % len(self.seconds) == 0:
            self.figures.append((1000 * statistics.median(self.seconds), held(self.device)))
            (ms, mib), kib = self.figures[-1], self.kept_by_generate and self.kept_by_generate / 1024
            self.table.add(**{"tokens": self.count, "ms a token": ms, "held, MiB": mib, "of it generate's, KiB": kib})
            self.latest = time.perf_counter()

    def end(self) -> None:
        self.progress.close()


def weigh(model: PreTrainedModel, tenths: Tenths) -> None:
    """Have `tenths` know how much `generate` hands to each step of what it keeps."""
    prepare = model.prepare_inputs_for_generation

    @functools.wraps(prepare)  # `generate` looks up the arguments that it takes
    def weighed(input_ids: torch.Tensor, *args, **kwargs) -> dict:
        tensors = [value for value in (input_ids, *kwargs.values()) if isinstance(value, torch.Tensor)]
        tenths.kept_by_generate = sum(tensor.nbytes for tensor in tensors)
        return prepare(input_ids, *args, **kwargs)

    model.prepare_inputs_for_generation = weighed


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--window-length", type=int, default=256)
    parser.add_argument("--num-sink-tokens", type=int, default=4)
    parser.add_argument("--generate", action="store_true", help="in one call of `generate`")
    arguments = parsed(parser)
    model = load(arguments.model, arguments.device, arguments.dtype)
    machine = f"{arguments.model}, window {arguments.window_length}: {described(arguments.device, arguments.dtype)}"
    driven = "generate" if arguments.generate else "loop"
    table = Table(f"flat-{driven}-{arguments.model}-{arguments.device.type}", machine)
    cache = SinkCache(arguments.window_length, arguments.num_sink_tokens).bind(model)
    tenths = Tenths(arguments.tokens, arguments.device, table)
    ids = torch.ones(1, 1, dtype=torch.long, device=arguments.device)

    if arguments.generate:
        weigh(model, tenths)
        generate(model, input_ids=ids, past_key_values=cache, max_new_tokens=arguments.tokens, streamer=tenths)
    else:
        tenths.put(ids)
        for _ in range(arguments.tokens):
            ids = model(**cache.prepare_inputs(ids)).logits[:, -1:].argmax(-1)
            tenths.put(ids.cpu())  # which waits for the device
        tenths.end()

    first = -(-arguments.window_length // len(tenths.seconds))  # the first tenth on a full window
    (ms, mib), (last_ms, last_mib) = tenths.figures[first], tenths.figures[-1]
    print(f"\nThe last tenth took {last_ms / ms:.3f} times as long as the one after filling, ", end="")
    print(f"and at its end {last_mib - mib:+.1f} MiB were held.")


if __name__ == "__main__":
    main()
