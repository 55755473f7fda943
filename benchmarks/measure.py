"""What the benchmarks of time and memory share: models of real shapes, turns, memory, tables.

Contestants take turns in one process, and are compared round by round: what slows the machine down slows all of them.
"""

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import torch
import transformers
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    PreTrainedModel,
    Qwen3Config,
)
from transformers.generation.streamers import BaseStreamer

from benchmarks.shapes import SHAPES
from tools import real_models

RESULTS = Path(__file__).parent / "results"


MODELS = ("smollm2", *SHAPES)  # the first is the real one, the others are random


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments, with a `device` and a `dtype` that all benchmarks take."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", help="by default bfloat16 on a GPU, and float32 on a CPU")
    arguments = parser.parse_args()
    arguments.device = torch.device(arguments.device)
    arguments.dtype = getattr(torch, arguments.dtype or ("float32" if arguments.device.type == "cpu" else "bfloat16"))
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    return arguments


def load(name: str, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """One of `MODELS`, that never stops by itself."""
    if name == "smollm2":
        model = real_models.load(real_models.SMOLLM2, dtype)[0].to(device)
    else:
        kind = Qwen3Config if name in ("tiny", "qwen3-0.6b") else LlamaConfig
        # No contestant is to change, or refuse, anything at its trained length.
        model = random_model(kind(**SHAPES[name], max_position_embeddings=2**17), device, dtype)
    model.generation_config = GenerationConfig(pad_token_id=0)
    return model.eval()


def load_with_tokenizer(name: Optional[str], device: torch.device, dtype: torch.dtype) -> tuple[PreTrainedModel, Any]:
    """The model of this id or folder, SmolLM2-135M-Instruct if it is None, and its tokenizer."""
    model, tokenizer = real_models.load(name or real_models.SMOLLM2, dtype)
    return model.to(device).eval(), tokenizer


def random_model(config: Any, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A model of these sizes, made where it is needed: no copy of it ever lies elsewhere, or in float32."""
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def described(device: torch.device, *dtypes: torch.dtype) -> str:
    """The machine, the dtypes and the versions: what figures are to be read with."""
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    else:
        cpu = Path("/proc/cpuinfo").read_text().split("model name", 1)[-1].split("\n", 1)[0].strip("\t: ")
        machine = f"{cpu}, {torch.get_num_threads()} of its threads"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{', '.join([machine, *map(named, dtypes)])}; {versions}"


def named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def now(device: torch.device) -> float:
    """Seconds, once the device has done all that it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def in_turns(contestants: dict[Any, Callable[[], list[float]]], rounds: int, warm_up: int = 2) -> dict[Any, list]:
    """The median step of each one in each round, in ms. A call takes a few steps and returns the seconds of each."""
    medians = {name: [] for name in contestants}
    for number in tqdm(range(warm_up + rounds), desc="rounds", leave=False):
        for name, steps in contestants.items():
            median = 1000 * statistics.median(steps())
            if number >= warm_up:
                medians[name].append(median)
    return medians


def ratio(medians: dict[Any, list], one: Any, other: Any) -> float:
    """How many times as long `one` takes as `other`: within a round, and then the median, so that both had the same
    machine however busy it was."""
    return statistics.median(mine / its for mine, its in zip(medians[one], medians[other]))


def held(device: torch.device, peak: bool = False) -> float:
    """MiB that this process holds, on the GPU if that is the device; or all that it had at most since `forget_peak`."""
    if device.type == "cuda":
        return (torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated)(device) / 2**20
    status = Path("/proc/self/status").read_text()
    # Its own memory alone: the system takes pages of files away, and brings them back, as it likes.
    return int(status.split("VmHWM:" if peak else "RssAnon:")[1].split()[0]) / 1024


def forget_peak(device: torch.device) -> None:
    """Let the peak be what is held now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


class Clock(BaseStreamer):
    """When `generate` handed over the prompt and each token, which is once they are on the CPU."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None: ...


class Table:
    """Rows that are printed as Markdown and written to `results/<name>.csv` as they come."""

    def __init__(self, name: str, machine: str):
        self.path = RESULTS / f"{name}.csv"
        self.path.parent.mkdir(exist_ok=True)
        self.path.write_text(f"# {machine}\n")
        self.begun = False
        print(f"{machine}\n")

    def add(self, **row: Any) -> None:
        with open(self.path, "a", newline="") as file:
            lines = [row.values()] if self.begun else [row.keys(), row.values()]
            csv.writer(file, lineterminator="\n").writerows(lines)
        with tqdm.external_write_mode():  # a progress bar makes room
            if not self.begun:
                print(f"| {' | '.join(row)} |\n|{' ---: |' * len(row)}")
            print(f"| {' | '.join(map(_shown, row.values()))} |", flush=True)
        self.begun = True


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.4g}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def target(what: str, value: float, at_most: Optional[float] = None, at_least: Optional[float] = None) -> None:
    """Print `value` beside what it should be."""
    met = value <= at_most if at_least is None else value >= at_least
    bound = f"at most {at_most}" if at_least is None else f"at least {at_least}"
    print(f"{what}: {value:.3f}, should be {bound}: {'met' if met else 'MISSED'}", flush=True)
