"""What a prompt of many windows takes, in chunks and in one forward pass: its time, and its peak memory.

    make prefill ARGS="--model qwen3-0.6b --window-length 1024"

Both are those of a call of `generate` for one token: with this cache, by its default chunks and by given ones, and with
the `DynamicCache` that it takes by itself. Memory is what a call holds at most, above what was held before it, after a
call with a prompt of one token: the model and all that is made once are not in it.
"""

import argparse
from argparse import Namespace
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from statistics import median
from typing import Optional

import torch
from transformers import PreTrainedModel

from benchmarks.measure import MODELS, Table, described, forget_peak, held, in_turns, load, now, parsed, ratio
from custom_generate.generate import generate

PLAIN = "one forward pass"


def prefill(model: PreTrainedModel, arguments: Namespace, contestant: str, length: int) -> list[float]:
    """The seconds that `generate` takes for a token after a prompt of `length` tokens."""
    ids = torch.randint(1, model.config.vocab_size, (1, length), device=model.device)
    settings = dict(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=1)
    start = now(model.device)
    if contestant == PLAIN:
        model.generate(**settings)
    else:
        chunk = contestants(arguments)[contestant]
        generate(model, arguments.window_length, arguments.num_sink_tokens, prefill_chunk_size=chunk, **settings)
    return [now(model.device) - start]


def contestants(arguments: Namespace) -> dict[str, Optional[int]]:
    """The size of chunks of each, None for the default."""
    return {"default chunks": None, **{f"chunks of {size}": size for size in arguments.chunk_size}, PLAIN: None}


def peak(arguments: Namespace, contestant: str, length: int) -> float:
    """MiB, to be run in a process of its own: what an earlier call let go of hides what the next one takes."""
    model = load(arguments.model, arguments.device, arguments.dtype)
    prefill(model, arguments, contestant, 1)
    forget_peak(arguments.device)
    before = held(arguments.device, peak=True)
    prefill(model, arguments, contestant, length)
    return held(arguments.device, peak=True) - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="qwen3-0.6b")
    parser.add_argument("--window-length", type=int, default=1024)
    parser.add_argument("--num-sink-tokens", type=int, default=4)
    parser.add_argument("--windows", type=int, nargs="+", default=[4, 16], help="how many of them the prompt is long")
    parser.add_argument("--chunk-size", type=int, nargs="+", default=[64, 512], help="`prefill_chunk_size`s to try")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parsed(parser)
    lengths = [windows * arguments.window_length for windows in arguments.windows]
    name = f"prefill-{arguments.model}-{arguments.device.type}"
    machine = f"{arguments.model}, window {arguments.window_length}: {described(arguments.device, arguments.dtype)}"
    table, peaks = Table(name, machine), {}
    # Before the model is loaded here, where it would take memory from them.
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as processes:
        for length in lengths:
            for contestant in contestants(arguments):
                peaks[contestant, length] = processes.submit(peak, arguments, contestant, length).result()
    model = load(arguments.model, arguments.device, arguments.dtype)
    for length in lengths:
        turns = {name: partial(prefill, model, arguments, name, length) for name in contestants(arguments)}
        seconds = in_turns(turns, arguments.rounds, warm_up=1)
        for name in turns:
            row = {"prompt": length, "prefill": name, "ms": median(seconds[name])}
            row |= {"of one pass": ratio(seconds, name, PLAIN), "peak, MiB": peaks[name, length]}
            table.add(**row)


if __name__ == "__main__":
    main()
