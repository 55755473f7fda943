"""The benchmark of perplexity goes on where it was cut off, and measures what it says. All of them run."""

import csv
import importlib
import math
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from custom_generate.generate import SinkCache
from tests.support import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.newest_only]


@pytest.fixture
def arguments(carrier, tmp_path):
    """Those that measure a tiny model on a text."""
    text = tmp_path / "text.txt"
    text.write_text((ROOT / "README.md").read_text())
    settings = "--window-length 32 --every 64 --dtype float32 --device cpu"
    return ["--model", str(carrier), "--text", str(text), *settings.split()]


@pytest.fixture
def run(monkeypatch, capsys):
    """A function that runs a benchmark in this process, and returns what it prints."""

    def run(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        importlib.import_module(f"benchmarks.{name}").main()
        return capsys.readouterr().out

    return run


def start(*arguments: str) -> int:
    """The number of a process of its own, a fork of this one, that runs the benchmark of perplexity."""
    process = os.fork()
    if process == 0:
        try:
            torch.set_num_threads(1)  # a fork has no others
            # Where the tests run in the background, interrupts are ignored, and the process would go on ignoring them.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.argv = ["perplexity", *arguments]
            importlib.import_module("benchmarks.perplexity").main()
        finally:
            os._exit(0)
    return process


def rows(folder: Path) -> list[dict]:
    """What was measured, but for the times."""
    files = list(folder.glob("*.csv"))
    lines = files[0].read_text().splitlines()[1:] if files else []
    return [{name: value for name, value in row.items() if name != "ms"} for row in csv.DictReader(lines)]


def test_it_goes_on_where_it_was_cut_off(arguments, run, tmp_path):
    arguments += ["--caches", "full", "sink", "window", "--tokens", "256", "--every", "32", "--results"]
    assert "sink cache" in run("perplexity", *arguments, str(tmp_path / "whole"))
    expected = rows(tmp_path / "whole")
    assert len(expected) == 3 * 8
    for cut_at in (3, 11):  # in the full cache's run, and in that of the sink cache
        cut = start(*arguments, str(tmp_path / "cut"))
        while len(rows(tmp_path / "cut")) < cut_at:
            assert os.waitpid(cut, os.WNOHANG) == (0, 0), "it ended by itself"
            time.sleep(0.01)
        os.kill(cut, signal.SIGINT)
        os.waitpid(cut, 0)
        assert cut_at <= len(rows(tmp_path / "cut")) < len(expected)
    assert "sink cache" in run("perplexity", *arguments, str(tmp_path / "cut"))
    assert rows(tmp_path / "cut") == expected
    assert not list((tmp_path / "cut").glob("*.unfinished"))


def test_perplexity_is_that_of_the_next_token(arguments, run, carrier, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run("perplexity", *arguments, "--caches", "sink", "--tokens", "128", "--results", str(tmp_path / "out"))
    model = AutoModelForCausalLM.from_pretrained(carrier)
    tokenizer, text = AutoTokenizer.from_pretrained(carrier), (ROOT / "README.md").read_text()
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :129]
    cache, losses = SinkCache(32, 4).bind(model), []
    with torch.no_grad():
        for token in range(128):
            logits = model(**cache.prepare_inputs(ids[:, token : token + 1])).logits[0, -1]
            losses.append(-logits.log_softmax(-1)[ids[0, token + 1]].item())
    for row, expected in zip(rows(tmp_path / "out"), (losses[:64], losses[64:])):
        assert math.isclose(float(row["nll"]), sum(expected) / 64, abs_tol=2e-5)


SHORT = {
    "update": "--device cpu --window-length 32 --rounds 1",
    "decode": "--device cpu --model tiny --batch 1 --window-length 32 --rounds 1 --contestants ours dynamic",
    "prefill": "--device cpu --model tiny --window-length 32 --windows 2 --chunk-size 8 --rounds 1",
    "flat": "--device cpu --model tiny --window-length 32 --tokens 400",
    "endless": "--tokens 40",
    "turns": "--device cpu --model tiny --window-length 32 --turns 4 --question-tokens 8 --new-tokens 6 --rounds 1",
    "assisted": "--device cpu --memory --window-length 32 --tokens 200",
}


@pytest.mark.parametrize("name", SHORT)
def test_a_short_form_of_each_benchmark_runs(name, run, tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.measure.RESULTS", tmp_path)
    # Each peak of memory is measured in a process of its own, which takes longer to start than to measure it.
    monkeypatch.setattr("benchmarks.prefill.ProcessPoolExecutor", lambda *args, **kwargs: ThreadPoolExecutor(1))
    assert len(run(name, *SHORT[name].split()).splitlines()) >= 2
