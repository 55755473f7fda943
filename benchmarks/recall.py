"""What a window forgets: questions about lines some way back, asked all along a stream (arXiv:2309.17453, section 4.4).

    make recall
    make recall ARGS="--model Qwen/Qwen3-0.6B --window-length 1024 --lines 380"

Each line of the stream says one thing, `The code of the red lantern is 4821.`, and no two lines the same. Every few
lines the stream is asked for the code that it was told so many lines ago, for each of the given distances, and each
time on a copy of its cache, so that no question helps the next. An answer counts if each of its tokens is the one that
the model finds most likely.
"""

import argparse
import copy
import random
import re
import statistics
from pathlib import Path

import plot
import torch
from measure import Table, described, load_with_tokenizer, parsed
from perplexity import NAMES, SMOLLM2, Reader
from tqdm import tqdm

COLORS = "red blue green black white golden silver purple orange brown grey pink yellow crimson violet".split()
THINGS = "lantern anchor barrel kettle ladder mirror candle basket hammer bottle compass blanket whistle".split()
THINGS += "drum rope saddle pillow feather bucket carpet".split()


def lines(number: int) -> list[tuple[str, str]]:
    """So many things, none twice, and the code of each."""
    random.seed(0)
    names = [f"{color} {thing}" for color in COLORS for thing in THINGS]
    return [(name, f"{random.randrange(1000, 10000)}") for name in random.sample(names, number)]


def answered(reader: Reader, tokens: torch.Tensor, question: torch.Tensor, answer: torch.Tensor) -> bool:
    """Whether the model gives `answer` to `question` after `tokens`, which the reader has read; it stays as it is."""
    reader = copy.copy(reader)
    reader.cache = copy.deepcopy(reader.cache)
    whole = torch.cat([tokens, question, answer])
    for position in range(len(tokens), len(whole) - 1):
        best = reader.read(whole, position).argmax()
        if position + 1 >= len(tokens) + len(question) and best != whole[position + 1]:
            return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help=f"a model id or folder (default: {SMOLLM2})")
    parser.add_argument("--caches", nargs="+", choices=NAMES, default=["full", "sink", "window"])
    parser.add_argument("--window-length", type=int, default=512)
    parser.add_argument("--num-sink-tokens", type=int, default=4)
    parser.add_argument("--lines", type=int, default=300, help="of the stream, at most 300")
    parser.add_argument("--every", type=int, default=4, help="lines between two moments of asking")
    parser.add_argument("--back", type=int, nargs="+", default=[1, 5, 10, 20, 30, 40, 60, 100], help="lines")
    arguments = parsed(parser)
    model, tokenizer = load_with_tokenizer(arguments.model, arguments.device, arguments.dtype)

    def ids(text: str) -> torch.Tensor:
        return tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0].to(arguments.device)

    said = lines(arguments.lines)
    ends, stream = [], ids("Remember all of these codes.\n")
    for name, code in said:
        stream = torch.cat([stream, ids(f"The code of the {name} is {code}.\n")])
        ends.append(len(stream))
    a_line = statistics.fmean(end - before for before, end in zip(ends, ends[1:]))
    slug = re.sub(r"\W+", "-", Path(arguments.model or SMOLLM2).name.lower())
    table = Table(f"recall-{slug}-{arguments.device.type}", described(arguments.device, arguments.dtype))
    shares: dict[str, list[float]] = {}
    for kind in arguments.caches:
        reader = Reader(kind, model, arguments.window_length, arguments.num_sink_tokens if kind == "sink" else 0)
        right: dict[int, list[bool]] = {back: [] for back in arguments.back}
        start = 0
        for number, end in enumerate(tqdm(ends, desc=kind, unit="line", leave=False), start=1):
            for position in range(start, end):
                reader.read(stream, position)
            start = end
            if number < max(arguments.back) or number % arguments.every:
                continue
            for back, of_it in right.items():
                name, code = said[number - back]
                question, answer = ids(f"The code of the {name} is"), ids(f" {code}")
                of_it.append(answered(reader, stream[:end], question, answer))
        for back, of_it in right.items():
            row = {"cache": NAMES[kind], "window": arguments.window_length, "lines back": back}
            row |= {"tokens back": round(a_line * back), "asked": len(of_it), "right": sum(of_it)}
            table.add(**row)
        shares[NAMES[kind]] = [100 * statistics.fmean(of_it) for of_it in right.values()]
    if plot.CAN_DRAW:
        figure, axes = plot.panels(1, 6)
        for name, values in shares.items():
            axes[0].plot(
                [a_line * back for back in arguments.back], values, label=name, marker="o", **plot.STYLES[name]
            )
        axes[0].axvline(arguments.window_length, color="#777777", linestyle=":")
        axes[0].set_ylim(-5, 105)
        axes[0].set_title("right answers, %", loc="left", fontweight="bold")
        axes[0].set_xlabel(f"tokens since it was said (dotted: the window, {arguments.window_length:,})")
        figure.suptitle(f"{Path(arguments.model or SMOLLM2).name}, {arguments.num_sink_tokens} sinks")
        plot.finish(figure, axes, table.path.with_suffix(".png"))


if __name__ == "__main__":
    main()
