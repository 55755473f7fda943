"""What a window forgets: lines some way back are asked for all along a stream (arXiv:2309.17453, section 4.4).

    make recall
    make recall ARGS="--model Qwen/Qwen3-0.6B --window-length 1024 --lines 600 --back 1 10 50 70 200"

The stream is lines of the standard library's documentation, shuffled, no two the same. Every few lines it is asked for
some that it was told so many lines ago: a line's first 8 tokens are the question, its next 2 the answer, which must be
those that the model finds most likely. (Small models can't answer more than that: facts of one form they mix up.) Lines
that were never told are asked for too, to know what can be guessed. The window of 8 bits takes as many bytes as one of
16 bits, so it is longer. Each question is asked on a copy of the cache, so
that none helps the next.
"""

import argparse
import copy
import random
import re
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import plot
from benchmarks.bits import same_bytes
from benchmarks.measure import Table, described, load_with_tokenizer, parsed
from benchmarks.perplexity import NAMES, SMOLLM2, Reader, rows_of, text_of

QUESTION, ANSWER = 8, 2  # tokens


def answered(reader: Reader, told: torch.Tensor, line: torch.Tensor) -> bool:
    """Whether the model goes on with `line`'s answer where its question comes after `told`, all that was read so far.

    The reader stays as it is.
    """
    reader = copy.copy(reader)
    reader.cache = copy.deepcopy(reader.cache)
    whole = torch.cat([told, line[: QUESTION + ANSWER]])
    best = [reader.read(whole, position).argmax() for position in range(len(told), len(whole) - 1)]
    return torch.equal(torch.stack(best[QUESTION - 1 :]), whole[-ANSWER:])


def draw(file: Path, title: str) -> None:
    """The share of right answers against how long ago a line was told, off the table in `file`."""
    figure, (panel,) = plot.panels(1, 7)
    rows = rows_of(file)
    untold = [row for row in rows if row["lines back"] == "never told"]
    for name in dict.fromkeys(row["cache"] for row in rows):
        own = [row for row in rows if row["cache"] == name and row not in untold]
        shares = [100 * row["right"] / row["asked"] for row in own]
        panel.plot([row["tokens back"] for row in own], shares, label=name, marker="o", **plot.STYLES[name])
    guessed = 100 * sum(row["right"] for row in untold) / sum(row["asked"] for row in untold)
    panel.axhline(guessed, color="#777777", linestyle="--")
    plot.entitle(panel, "right answers, %", [rows[0]["window"]])
    panel.set_ylim(-5, 105)
    panel.xaxis.set_major_formatter("{x:,.0f}")
    panel.set_xlabel("tokens since (dotted: window; dashed: guessed)")
    figure.suptitle(title)
    plot.finish(figure, [panel], file.with_suffix(".png"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help=f"a model id or folder (default: {SMOLLM2})")
    parser.add_argument("--caches", nargs="+", choices=NAMES, default=["full", "sink", "sink-8-bits", "window"])
    parser.add_argument("--window-length", type=int, default=512)
    parser.add_argument("--num-sink-tokens", type=int, default=4)
    parser.add_argument("--of", default="", metavar="NAME", help="of the table, where it is not of all caches")
    parser.add_argument("--lines", type=int, default=200, help="of the stream")
    parser.add_argument("--every", type=int, default=3, help="lines between two moments of asking")
    parser.add_argument("--back", type=int, nargs="+", default=[1, 5, 10, 20, 25, 30, 40, 60, 100], help="lines")
    arguments = parsed(parser)
    model, tokenizer = load_with_tokenizer(arguments.model, arguments.device, arguments.dtype)

    random.seed(0)
    lines = dict.fromkeys(" ".join(line.split()) for line in text_of(None).split("\n"))
    lines = [line for line in lines if len(line) > 60]
    asked_at = range(max(arguments.back), arguments.lines + 1, arguments.every)
    lines = [
        tokenizer(f"{line}\n", add_special_tokens=False, return_tensors="pt").input_ids[0].to(arguments.device)
        for line in random.sample(lines, arguments.lines + len(asked_at))
    ]
    told, untold = lines[: arguments.lines], lines[arguments.lines :]
    stream = torch.cat(told)
    length = len(stream) / len(told)  # of a line, in the mean

    slug = re.sub(r"\W+", "-", Path(arguments.model or SMOLLM2).name.lower())
    slug += f"-{arguments.of}" if arguments.of else ""
    table = Table(f"recall-{slug}-{arguments.device.type}", described(arguments.device, arguments.dtype))
    for kind in arguments.caches:
        sinks, window = arguments.num_sink_tokens if "sink" in kind else 0, arguments.window_length
        if kind == "sink-8-bits":
            window = same_bytes(copy.deepcopy(model).bfloat16(), window, sinks)
        reader = Reader(kind, model, window, sinks)
        right: dict[int, list[bool]] = {back: [] for back in [*arguments.back, 0]}  # 0: never told
        read, to_come = 0, iter(untold)
        for number, line in enumerate(tqdm(told, desc=kind, unit="line", leave=False), start=1):
            for position in range(read, read + len(line)):
                reader.read(stream, position)
            read += len(line)
            if number in asked_at:
                for back, of_it in right.items():
                    about = told[number - back] if back else next(to_come)
                    of_it.append(answered(reader, stream[:read], about))
        for back, of_it in right.items():
            row = {"cache": NAMES[kind], "window": window, "lines back": back or "never told"}
            row |= {"tokens back": round(length * back), "asked": len(of_it), "right": sum(of_it)}
            table.add(**row)
    if plot.CAN_DRAW:
        draw(table.path, f"{Path(arguments.model or SMOLLM2).name}, window {arguments.window_length:,}")


if __name__ == "__main__":
    main()
