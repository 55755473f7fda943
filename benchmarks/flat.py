"""Whether time and memory stay what they are over a long stream, and what of it piles up in `generate` itself.

    make flat                                               a tiny model over a million tokens
    make flat ARGS="--model smollm2 --tokens 20000"         the real one
    make flat ARGS="--generate"                             in one call of `generate`, and not in a loop of one's own

For each tenth of the stream: the median time of a token, and what the process (or the GPU) holds at its end. A call of
`generate` keeps all ids: how much of what it hands to a step grows has a column of its own. A machine may change its
pace over so long a time: after each 20th token a plain step, one token through the model without a cache, is timed as
well, and what counts is the time of a token beside that.
"""

import argparse
import functools
import statistics
from array import array
from collections.abc import Callable
from typing import Optional

import torch
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from benchmarks.measure import MODELS, Table, described, held, load, now, parsed, target
from custom_generate.generate import SinkCache, generate

EVERY = 20  # tokens, of which the last has a plain step beside it


class Tenths(BaseStreamer):
    """Takes the prompt, then token by token, once they are on the CPU; holds no more at the end than at the start."""

    def __init__(self, tokens: int, device: torch.device, table: Table, plain_step: Callable[[], object]):
        self.device, self.table, self.progress = device, table, tqdm(total=tokens, unit="token")
        self.seconds, self.count, self.latest = array("d", bytes(8 * (tokens // 10))), 0, None
        self.plain_step, self.ratios = plain_step, array("d", bytes(8 * (tokens // 10 // EVERY)))
        self.kept_by_generate: Optional[int] = None  # bytes
        self.figures: list[tuple[float, float]] = []  # of each tenth: a token's time, in plain steps, and MiB

    def put(self, value: torch.Tensor) -> None:
        came = now(self.device)
        if self.latest is not None:  # it is no prompt
            self.seconds[self.count % len(self.seconds)] = came - self.latest
            self.count += 1
            self.progress.update()
            if self.count % EVERY == 0:
                self.compare(came - self.latest)
            if self.count % len(self.seconds) == 0:
                self.conclude()
        self.latest = now(self.device)

    def compare(self, seconds: float) -> None:
        begun = now(self.device)
        self.plain_step()
        self.ratios[(self.count // EVERY - 1) % len(self.ratios)] = seconds / (now(self.device) - begun)

    def conclude(self) -> None:
        ms, ratio = 1000 * statistics.median(self.seconds), statistics.median(self.ratios)
        mib = held(self.device)
        self.figures.append((ratio, mib))
        row = {"tokens": self.count, "ms a token": ms, "of a plain step": ratio, "held, MiB": mib}
        row["of it generate's, KiB"] = self.kept_by_generate and self.kept_by_generate / 1024
        self.table.add(**row)

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
    parser.add_argument("--tokens", type=int, default=1_000_000, help=f"a multiple of {10 * EVERY}")
    parser.add_argument("--window-length", type=int, default=256)
    parser.add_argument("--num-sink-tokens", type=int, default=4)
    parser.add_argument("--generate", action="store_true", help="in one call of `generate`")
    arguments = parsed(parser)
    model = load(arguments.model, arguments.device, arguments.dtype)
    machine = f"{arguments.model}, window {arguments.window_length}: {described(arguments.device, arguments.dtype)}"
    driven = "generate" if arguments.generate else "loop"
    table = Table(f"flat-{driven}-{arguments.model}-{arguments.device.type}", machine)
    cache = SinkCache(arguments.window_length, arguments.num_sink_tokens).bind(model)
    ids = torch.ones(1, 1, dtype=torch.long, device=arguments.device)
    plain_step = functools.partial(model, torch.ones_like(ids), use_cache=False)
    tenths = Tenths(arguments.tokens, arguments.device, table, plain_step)

    if arguments.generate:
        weigh(model, tenths)
        generate(model, input_ids=ids, cache=cache, max_new_tokens=arguments.tokens, streamer=tenths)
    else:
        tenths.put(ids)
        for _ in range(arguments.tokens):
            ids = model(**cache.prepare_inputs(ids)).logits[:, -1:].argmax(-1)
            tenths.put(ids.cpu())  # which waits for the device
        tenths.end()

    first = -(-arguments.window_length // len(tenths.seconds))  # the first tenth on a full window
    (ratio, mib), (last_ratio, last_mib) = tenths.figures[first], tenths.figures[-1]
    target("The last tenth beside the one after filling, both in plain steps", last_ratio / ratio, at_most=1.05)
    print(f"At its end {last_mib - mib:+.1f} MiB were held.")


if __name__ == "__main__":
    main()
