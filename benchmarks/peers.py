"""Peers in one run: tokens per second and memory against the length of the stream.

    make peers ARGS="--model smollm2-135m --window-length 1024"

Each contestant is a process of its own, with a random model of a real one's shape: batch 1, greedy. They take turns of
a few tokens, so that what else the machine does hits all alike. Peers that need another release of transformers get an
environment under `.cache/peers`, which shares torch with this one; what can't be measured is a row that says why.

The pace is the median of the times between two tokens. Memory is the most that a process takes while it decodes (of the
GPU if there is one), above what it takes without a cache. Streams get to a length by prompts of random tokens.
"""

import argparse
import csv
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Optional

import torch

from benchmarks import plot
from benchmarks.contestants import CONTESTANTS, ROOT, Sinks, work
from benchmarks.shapes import SHAPES

# What is installed with all it needs, and what without that, which would be another torch or what it runs without.
ENVIRONMENTS = {
    "transformers 4.52.4": (["transformers==4.52.4"], []),
    "attention_sinks 0.4.0": (["transformers==4.34.0", "einops"], ["attention_sinks==0.4.0"]),
    "kvpress 0.5.5": (["transformers==5.2.0", "cachetools<6", "datasets", "fire<0.7"], ["kvpress==0.5.5"]),
}


def environment(name: str, folder: Path) -> Path:
    """The Python of an environment, which is made if need be."""
    folder = folder.resolve() / name.replace(" ", "-")
    python, ready = folder / "bin" / "python", folder / "ready"
    if not ready.exists():
        print(f"making {folder}", file=sys.stderr, flush=True)
        quiet = dict(check=True, capture_output=True, text=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", folder], **quiet)
        # What it doesn't need otherwise, torch above all, it takes from here.
        shared = [path for path in sys.path[1:] if os.path.isdir(path) and not os.path.exists(f"{path}/os.py")]
        next(folder.glob("lib/python*/site-packages")).joinpath("shared.pth").write_text("\n".join(shared))
        pip = [sys.executable, "-m", "pip", "--python", python, "install", "-c", ROOT / "constraints.txt"]
        needs, alone = ENVIRONMENTS[name]
        subprocess.run([*pip, *needs], **quiet)
        if alone:
            subprocess.run([*pip, "--no-deps", *alone], **quiet)
        ready.touch()
    return python


class Worker:
    """A contestant's process; `reason` says why it can't go on."""

    def __init__(self, name: str, arguments: argparse.Namespace):
        self.name, self.reason, self.release = name, "", CONTESTANTS[name][0]
        print(f"starting {name}", file=sys.stderr, flush=True)
        python, variables = sys.executable, dict(os.environ)
        if self.release:
            variables.pop("PYTHONPATH", None)  # it would come before the release of the environment
            try:
                python = environment(self.release, arguments.environments)
            except (subprocess.CalledProcessError, OSError) as error:
                lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
                self.reason = f"no environment: {next((line for line in lines if 'ERROR' in line), lines[-1])[:160]}"
                return
        options = ("model", "dtype", "window_length", "num_sink_tokens")
        given = [f"--{option.replace('_', '-')}={getattr(arguments, option)}" for option in options]
        self.errors = tempfile.TemporaryFile("w+")
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, bufsize=1)
        command = [python, "-m", "benchmarks.peers", f"--worker={name}", *given]
        self.process = subprocess.Popen(command, env=variables, cwd=ROOT, **pipes)
        if answer := self.answer():  # one after the other: together they would be slower
            self.release, self.pace = self.release or f"transformers {answer['transformers']}", answer["pace"]

    def answer(self) -> Optional[dict[str, Any]]:
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": f"ended with {self.process.wait()}"}
        self.reason = answer.get("error", "")
        if self.reason:
            self.stop()
            self.errors.seek(0)
            print(f"{self.name}: {self.errors.read()[-3000:]}", file=sys.stderr)
        return None if self.reason else answer

    def turn(self, length: int, arguments: argparse.Namespace) -> Optional[dict[str, Any]]:
        """Decode as many tokens as fit in the time of a turn, those of all rounds with `length` in their middle."""
        tokens = max(2, min(arguments.tokens, int(arguments.seconds / self.pace)))
        print(json.dumps([length - arguments.rounds * tokens // 2, tokens]), file=self.process.stdin)
        if answer := self.answer():
            self.pace = statistics.median(answer["seconds"])
        return answer

    def stop(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def measure(names: list[str], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each contestant and length, and one for each contestant that can't go on."""
    common = dict(model=arguments.model, dtype=arguments.dtype, window=arguments.window_length)
    common |= dict(sinks=arguments.num_sink_tokens, device=device_name(), threads=torch.get_num_threads())
    common |= dict(torch=torch.__version__)
    workers, rows = [Worker(name, arguments) for name in names], []
    for length in arguments.lengths:
        answers = {worker: [] for worker in workers}
        for _ in range(arguments.rounds):
            for worker in workers:
                if not worker.reason:
                    answers[worker].append(worker.turn(length, arguments))
        for worker in [worker for worker in workers if not worker.reason]:
            seconds = [second for answer in answers[worker] for second in answer["seconds"]]
            last = answers[worker][-1]
            row = dict(contestant=worker.name, release=worker.release, stream_length=length, tokens_timed=len(seconds))
            row |= dict(tokens_per_second=round(1 / statistics.median(seconds), 3), ratio_to_ours="")
            row |= dict(tokens_kept=last["kept"], cache_mib=round(last["cache"] / 2**20, 1))
            row |= dict(memory_mib=round(max(answer["memory"] for answer in answers[worker]) / 2**20, 1))
            rows.append(row | dict(reason="") | common)
            print(f"{worker.name:<22} {length:>7,} {row['tokens_per_second']:>9.2f}/s", file=sys.stderr, flush=True)
    for worker in workers:
        if worker.reason:
            rows.append(dict(contestant=worker.name, release=worker.release, reason=worker.reason, **common))
        else:
            worker.stop()
    return rows


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    information = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", information.read_text()) if information.exists() else None
    return f"{found[1] if found else ''} {platform.machine()} CPU".strip()


def table(rows: list[dict[str, Any]]) -> None:
    """Print the rows as Markdown: of each contestant its pace at each length, and what it took at the last."""
    lengths = sorted({row["stream_length"] for row in rows if "stream_length" in row})
    about = "{model}, {dtype}, window {window:,}, {sinks} sinks; {device}, {threads} threads, torch {torch}"
    print(f"{about.format(**rows[0])}. Tokens per second at so many tokens:\n")
    titles = [*(f"{length:,}" for length in lengths), "of ours", "tokens kept", "cache, MiB", "memory, MiB"]
    print(f"| contestant | release | {' | '.join(titles)} |\n| --- | --- |{' ---: |' * len(titles)}")
    names = list(dict.fromkeys(row["contestant"] for row in rows))
    for name in names:
        own = [row for row in rows if row["contestant"] == name]
        at = {row["stream_length"]: row for row in own if "stream_length" in row}
        cells = [f"{at[length]['tokens_per_second']:.1f}" if length in at else "" for length in lengths]
        if at:
            last = at[max(at)]
            cells += [str(last.get("ratio_to_ours", "")), f"{last['tokens_kept']:,}"]
            cells += [f"{last[column]:,.0f}" for column in ("cache_mib", "memory_mib")]
        cells += [row["reason"] for row in own if "reason" in row]
        print(f"| {name} | {own[0].get('release', '')} | {' | '.join(cells)} |")
    notes = {name: vars(CONTESTANTS[name][1]).get("__doc__") for name in names}
    print("", *(f"- {name}: {note}" for name, note in notes.items() if note), sep="\n")


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw pace and memory against the length of the stream."""
    figure, panels = plot.panels(2, 11)
    lengths = sorted({row["stream_length"] for row in rows if "stream_length" in row})
    titles = {"tokens_per_second": "tokens per second", "memory_mib": "memory above the model's, MiB"}
    for panel, (column, title) in zip(panels, titles.items()):
        for name, (_, contestant, color, mark) in CONTESTANTS.items():
            own = [row for row in rows if row["contestant"] == name]
            points = [(row["stream_length"], row[column]) for row in own if column in row]
            if points:
                style = mark if mark.endswith("--") else f"{mark}-"
                ours = issubclass(contestant, Sinks)
                panel.plot(*zip(*points), style, color=color, label=name, lw=4 if ours else 2, zorder=3 if ours else 2)
        plot.entitle(panel, title, [rows[0]["window"]])
        panel.set_xscale("log", base=2)
        panel.set_xticks(lengths, [f"{length:,}" for length in lengths])
        panel.set_ylim(bottom=0)
    panels[1].set_xlabel("tokens in the stream (dotted: the window)")
    figure.suptitle("{model}, {dtype}, window {window:,}\n{device}".format(**rows[0]))
    plot.finish(figure, panels, path)


def read(path: Path) -> list[dict[str, Any]]:
    def value(name: str, text: str) -> Any:
        numbers = ("stream_length", "tokens_kept", "window", "sinks", "threads", "ratio", "mib", "second")
        return json.loads(text) if any(number in name for number in numbers) else text

    with path.open(newline="") as file:
        return [{name: value(name, text) for name, text in row.items() if text} for row in csv.DictReader(file)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--dtype", help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--window-length", type=int, default=1024)
    parser.add_argument("--num-sink-tokens", type=int, default=4)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--tokens", type=int, default=32, help="timed in a turn, at most")
    parser.add_argument("--seconds", type=float, default=4.0, help="of a turn, about; two tokens are timed at least")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each at a length")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=[*CONTESTANTS])
    parser.add_argument("--alone", action="store_true", help="one process at a time, for large models")
    parser.add_argument("--environments", type=Path, default=ROOT / ".cache" / "peers", help="a folder")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="a folder")
    parser.add_argument("--plot", type=Path, metavar="FILE.csv", help="only show and draw what was measured")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.dtype = arguments.dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
    if arguments.worker:
        return work(arguments)

    path = arguments.plot
    if path is None:
        groups = [[name] for name in arguments.contestants] if arguments.alone else [arguments.contestants]
        rows = [row for group in groups for row in measure(group, arguments)]
        pace = {(row["contestant"], row.get("stream_length")): row.get("tokens_per_second") for row in rows}
        for row in rows:
            if ours := pace.get(("sink cache", row.get("stream_length"))):
                row["ratio_to_ours"] = round(row["tokens_per_second"] / ours, 2)
        slug = re.sub(r"\W+", "-", f"{device_name()} {arguments.model}".lower())
        path = arguments.results / f"peers-{slug}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, dict.fromkeys(name for row in rows for name in row), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    rows = read(path)
    table(rows)
    if plot.CAN_DRAW:
        draw(rows, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
