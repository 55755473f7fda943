"""Perplexity, memory and time of each token of a long text, token by token, as caches keep less of it or all.

    make perplexity                                          the standard library's documentation, SmolLM2-135M-Instruct
    make perplexity ARGS="--text book.txt --tokens 20000"
    make perplexity ARGS="--model Qwen/Qwen3-0.6B --tokens 100000 --caches sink full"
    make perplexity ARGS="--plot benchmarks/results/FILE.csv"                       only draw what was measured
    make perplexity ARGS="--caches recomputed sink --stride 64 --dtype float32"     both judged by one token of 64

What was measured stands in `results/` as it comes; a run that was cut off goes on where its cache was last put away,
and what is there already isn't measured again. Several may run side by side.

sink        this cache, with each of the given numbers of sinks
sink-8-bits the same with `kv_bits=8`
full        a cache that keeps all
window      this cache without sinks: what a plain sliding window is
old         the `SinkCache` of transformers until 4.52, as `generate` drives it: each token at its place in the text
recomputed  no cache: the last tokens of the text read anew for each token, which is what a window costs without sinks;
            by default for one token of 64, as the others need that long for all
"""

import argparse
import csv
import math
import re
import statistics
from pathlib import Path
from typing import Any, Optional

import torch
import transformers
from tqdm import tqdm
from transformers import PreTrainedModel

from benchmarks import plot
from benchmarks.contestants import tensors_of
from benchmarks.measure import RESULTS, described, load_with_tokenizer, named, now, parsed
from custom_generate.generate import CACHE, SinkCache

NAMES = {
    "sink": "sink cache",
    "sink-8-bits": "sink cache, 8 bits",
    "full": "full cache",
    "window": "window without sinks",
    "old": "old cache",
    "recomputed": "recomputation",
}
SMOLLM2 = "SmolLM2-135M-Instruct"


class Reader:
    """Reads a text one token after the other.

    Args:
        kind: one of `NAMES`.
        window_length: the most tokens kept, or read anew.
        num_sink_tokens: of them the first of the text.
    """

    def __init__(self, kind: str, model: PreTrainedModel, window_length: int, num_sink_tokens: int):
        self.kind, self.model, self.window_length = kind, model, window_length
        self.cache: Any = None  # a full one the model makes itself, as it likes it
        if kind in ("sink", "sink-8-bits", "window"):
            bits = 8 if kind == "sink-8-bits" else None
            self.cache = SinkCache(window_length, num_sink_tokens, bits).bind(model)
        elif kind == "old":
            self.cache = transformers.SinkCache(window_length, num_sink_tokens)

    @torch.no_grad()
    def read(self, tokens: torch.Tensor, position: int) -> torch.Tensor:
        """The logits `[vocabulary]` after `tokens[position]`, once all before it were read."""
        if self.kind == "recomputed":
            latest = tokens[None, max(0, position + 1 - self.window_length) : position + 1]
            return self.model(input_ids=latest, use_cache=False).logits[0, -1]
        token = tokens[None, position, None]
        if isinstance(self.cache, SinkCache):
            inputs = self.cache.prepare_inputs(token)
        else:
            place = torch.tensor([[position]], device=tokens.device)
            inputs = {"input_ids": token, "position_ids": place, CACHE: self.cache, "use_cache": True}
        outputs = self.model(**inputs)
        self.cache = outputs[CACHE]
        return outputs.logits[0, -1]

    def load(self, path: Path) -> int:
        """Go on from what was put away there, if anything was; returns how many tokens had been read."""
        if not path.exists():
            return 0
        state = torch.load(path, map_location=self.model.device, weights_only=False)
        self.cache = state["cache"]
        if isinstance(self.cache, SinkCache):
            self.cache.bind(self.model)
        return state["tokens"]

    def save(self, path: Path, tokens: int) -> None:
        torch.save({"cache": self.cache, "tokens": tokens}, path.with_suffix(".new.unfinished"))
        path.with_suffix(".new.unfinished").replace(path)

    @property
    def nbytes(self) -> int:
        """Of the keys and values kept."""
        if self.cache is None:
            return 0
        if isinstance(self.cache, SinkCache):
            return self.cache.nbytes
        return sum(tensor.nbytes for tensor in tensors_of(self.cache))


def measure(reader: Reader, run: dict[str, Any], tokens: torch.Tensor, every: int, file: Path) -> None:
    """Read `tokens`, judge each that comes after `stride` of them, and add a row to `file` for `every` tokens."""
    end = (len(tokens) - 1) // every * every
    done = max((row["tokens"] for row in rows_of(file) if all(row[name] == run[name] for name in run)), default=0)
    if done >= end:
        return
    label = "-".join(map(str, run.values()))
    put_away = file.with_name(f"{file.stem}-{label}.unfinished")
    start = reader.load(put_away)
    with tqdm(total=end, initial=start, desc=label, unit="token") as progress:
        for segment in range(start, end, every):
            losses, seconds = [], []
            for position in range(segment, segment + every):
                progress.update()
                judged = (position + 1) % run["stride"] == 0
                if not judged and reader.kind == "recomputed":
                    continue
                begun = now(tokens.device)
                logits = reader.read(tokens, position)
                seconds.append(now(tokens.device) - begun)
                if not judged:
                    continue
                losses.append(torch.nn.functional.cross_entropy(logits.float(), tokens[position + 1]).item())
                figures = dict(perplexity=math.exp(statistics.fmean(losses)), MiB=reader.nbytes / 2**20)
                progress.set_postfix({name: f"{value:.1f}" for name, value in figures.items()}, refresh=False)
            row = dict(run, tokens=segment + every, nll=round(statistics.fmean(losses), 5))
            row |= dict(ms=round(1000 * statistics.median(seconds), 2), mib=round(reader.nbytes / 2**20, 2))
            if row["tokens"] > done:
                with open(file, "a", newline="") as lines:
                    csv.writer(lines, lineterminator="\n").writerow(row.values())
            if reader.cache is not None:
                reader.save(put_away, row["tokens"])
    put_away.unlink(missing_ok=True)


def begin(file: Path, machine: str) -> None:
    """Let there be a table, of this machine alone."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        columns = "cache,window_length,num_sink_tokens,dtype,stride,tokens,nll,ms,mib"
        file.write_text(f"# {machine}\n{columns}\n")
    elif (before := file.read_text().splitlines()[0]) != f"# {machine}":
        raise SystemExit(f"{file} was measured with\n{before}\nand not with\n# {machine}\nMove it away to begin anew.")


def rows_of(file: Path) -> list[dict[str, Any]]:
    with file.open(newline="") as lines:
        next(lines)
        return [{name: _read(value) for name, value in row.items()} for row in csv.DictReader(lines)]


def _read(value: str) -> Any:
    return value if value[0].isalpha() else float(value) if "." in value else int(value)


def perplexity(rows: list[dict[str, Any]], start: int, end: int) -> Optional[float]:
    """Of the tokens after so many of the text, up to so many; None if that isn't measured."""
    losses = [row["nll"] for row in rows if start < row["tokens"] <= end]
    return math.exp(statistics.fmean(losses)) if losses and rows[-1]["tokens"] >= end else None


def by_run(rows: list[dict[str, Any]]) -> dict[tuple, list[dict[str, Any]]]:
    """The rows of each cache, window length, number of sinks, dtype and stride."""
    runs: dict[tuple, list] = {}
    for row in rows:
        runs.setdefault(tuple(row.values())[:5], []).append(row)
    return {run: sorted(runs[run], key=lambda row: row["tokens"]) for run in sorted(runs)}


def table(rows: list[dict[str, Any]], bounds: list[int]) -> None:
    """Print the perplexity of each run between each two of `bounds`, and what a token took at its end.

    And how many times that of the full cache it is, of each `every` tokens after the first bound: median and most. If
    the full cache was measured in several dtypes, that is the one that was measured furthest.
    """
    full_runs = (own for key, own in by_run(rows).items() if key[0] == "full" and key[4] == 1)
    full = {row["tokens"]: row["nll"] for row in max(full_runs, key=len, default=[])}
    ranges = list(zip(bounds, bounds[1:]))
    titles = [f"{start + 1:,} to {end:,}" for start, end in ranges]
    titles = [
        "cache",
        "window",
        "sinks",
        "dtype",
        "of tokens, one in",
        *titles,
        "of full, median",
        "most",
        "ms a token",
        "MiB",
    ]
    print(f"\n| {' | '.join(titles)} |\n|{' --- |' * len(titles)}")
    for (kind, window, sinks, dtype, stride), own in by_run(rows).items():
        values = [perplexity(own, *bound) for bound in ranges]
        cells = [f"{window:,}" if window else "", str(sinks), dtype, str(stride)]
        cells += [f"{value:,.2f}" if value else "" for value in values]
        common = [row for row in own if bounds[0] < row["tokens"] and row["tokens"] in full and stride == 1]
        times = [math.exp(row["nll"] - full[row["tokens"]]) for row in common] or [math.nan]
        cells += [f"{statistics.median(times):.3f}", f"{max(times):.1f}"]
        cells += [f"{own[-1]['ms']:,.0f}", f"{own[-1]['mib']:,.1f}"]
        print(f"| {NAMES[kind]} | {' | '.join(cells)} |")


def draw(rows: list[dict[str, Any]], window: int, sinks: int, path: Path) -> None:
    """Perplexity, memory and time along the text, of those with this window and these sinks: the README's picture.

    Of several dtypes it shows the one that was measured furthest. Perplexity is that of the last 512 tokens. Time is
    the least that a token took there or further on, which leaves out what other work on the machine added for a while.
    Recomputation is off these scales, and stands in the table alone.
    """
    figure, axes = plot.panels_side_by_side(3)
    shown = {("sink", window, sinks): "sink cache", ("full", 0, 0): "full cache"}
    shown |= {("window", window, 0): "no sinks", ("old", window, sinks): "old cache"}
    for run, name in shown.items():
        own = max((own for key, own in by_run(rows).items() if key[:3] == run and key[4] == 1), key=len, default=[])
        if not own:
            continue
        style = dict(plot.STYLES[NAMES[run[0]]], label=name)
        style["linewidth"] *= 1.6
        places, times = [row["tokens"] for row in own], [row["ms"] for row in own]
        values = [perplexity(own[: at + 1], end - 512, end) for at, end in enumerate(places)]
        axes[0].plot(places, values, **style)
        axes[1].plot(places, [row["mib"] for row in own], **style)
        axes[2].plot(places, [min(times[at:]) for at in range(len(times))], **style)
    axes[0].plot([], [], color="#777777", linestyle=":", label="window")
    for panel, name in zip(axes, ("perplexity", "memory, MiB", "ms a token")):
        plot.entitle(panel, name, [window])
        panel.xaxis.set_major_formatter("{x:,.0f}")
        panel.locator_params(axis="x", nbins=2)
        panel.set_xlim(left=0)
    plot.logarithmic(axes[0])
    for panel in axes[1:]:
        panel.locator_params(axis="y", nbins=3)
        panel.set_ylim(bottom=0)
    axes[1].set_xlabel("tokens read")
    plot.finish(figure, axes, path, columns=5)


def show(file: Path, arguments: argparse.Namespace) -> None:
    """Print what stands in `file`, and draw it."""
    rows, window = rows_of(file), arguments.window_length[0]
    table(rows, arguments.bounds or sorted({window, max(row["tokens"] for row in rows)}))
    if plot.CAN_DRAW:
        draw(rows, window, arguments.num_sink_tokens[0], file.with_name(f"{file.stem}-{window}.png"))


def text_of(path: Optional[Path]) -> str:
    if path is not None:
        return path.read_text()
    from pydoc_data.topics import topics  # the documentation that Python's `help` shows

    return "\n\n".join(topics.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="a text file (default: the documentation of the standard library)")
    parser.add_argument("--model", help=f"a model id or folder (default: {SMOLLM2})")
    parser.add_argument("--caches", nargs="+", choices=NAMES, default=[*NAMES])
    parser.add_argument("--window-length", type=int, nargs="+", default=[1024])
    parser.add_argument("--num-sink-tokens", type=int, nargs="+", default=[4])
    parser.add_argument("--tokens", type=int, default=10_240, help="of the text")
    parser.add_argument("--every", type=int, default=128, help="tokens to a row of the table")
    parser.add_argument("--stride", type=int, help="judge one token of so many (default: 1, and 64 for recomputation)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="a folder")
    parser.add_argument("--bounds", type=int, nargs="+", help="tokens between which to tell perplexity")
    parser.add_argument("--plot", type=Path, metavar="FILE.csv", help="only show and draw what was measured")
    parser.set_defaults(dtype="bfloat16")
    arguments = parsed(parser)
    if arguments.plot:
        return show(arguments.plot, arguments)
    if "old" in arguments.caches and not hasattr(transformers, "SinkCache"):
        raise SystemExit(f"The old cache isn't in transformers {transformers.__version__}, but in 4.52 and before it.")
    if (arguments.stride or 1) > arguments.every:
        parser.error(f"--every ({arguments.every}) must not be less than --stride ({arguments.stride})")
    model, tokenizer = load_with_tokenizer(arguments.model, arguments.device, arguments.dtype)
    tokens = tokenizer(text_of(arguments.text), return_tensors="pt").input_ids[0, : arguments.tokens + 1]
    tokens = tokens.to(arguments.device)

    name, text = Path(arguments.model or SMOLLM2).name, arguments.text.stem if arguments.text else "python"
    slug = re.sub(r"\W+", "-", f"{name} {text} {arguments.device.type}".lower())
    file = arguments.results / f"perplexity-{slug}.csv"
    begin(file, described(arguments.device))
    for kind in arguments.caches:
        windows = arguments.window_length if kind != "full" else [0]
        for window in windows:
            for sinks in arguments.num_sink_tokens if kind in ("sink", "sink-8-bits", "old") else [0]:
                run = dict(cache=kind, window_length=window, num_sink_tokens=sinks, dtype=named(arguments.dtype))
                run["stride"] = arguments.stride or (64 if kind == "recomputed" else 1)
                measure(Reader(kind, model, window, sinks), run, tokens, arguments.every, file)

    show(file, arguments)


if __name__ == "__main__":
    main()
