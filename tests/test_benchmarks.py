"""The benchmark of perplexity goes on where it was cut off, and measures what it says. All of them run."""

import csv
import functools
import importlib
import math
import signal
import sys
import time
from pathlib import Path

import pexpect
import pytest
import torch

from custom_generate.generate import SinkCache
from tests.support import ROOT
from tests.support.helpers import on_the_newest

pytestmark = [
    pytest.mark.slow,
    on_the_newest,
]


@pytest.fixture
def measured(carrier, tmp_path):
    """A function that measures a tiny model on a text, into a folder; it returns the process."""
    text = tmp_path / "text.txt"
    text.write_text((ROOT / "README.md").read_text())

    def start(folder: Path, *arguments: str) -> pexpect.spawn:
        command = ["-m", "benchmarks.perplexity", "--model", str(carrier), "--text", str(text)]
        command += ["--window-length", "32", "--every", "64", "--dtype", "float32", "--results", str(folder)]
        terminal = dict(cwd=ROOT, encoding="utf-8", timeout=120)
        # Where the tests run in the background, interrupts are ignored, and the process would go on ignoring them.
        heeding = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        return pexpect.spawn(sys.executable, [*command, *arguments], preexec_fn=heeding, **terminal)

    return start


def rows(folder: Path) -> list[dict]:
    """What was measured, but for the times."""
    files = list(folder.glob("*.csv"))
    lines = files[0].read_text().splitlines()[1:] if files else []
    return [{name: value for name, value in row.items() if name != "ms"} for row in csv.DictReader(lines)]


def test_it_goes_on_where_it_was_cut_off(measured, tmp_path):
    caches = ("--caches", "full", "sink", "window", "--tokens", "1024")
    assert "sink cache" in measured(tmp_path / "whole", *caches).read()
    expected = rows(tmp_path / "whole")
    assert len(expected) == 3 * 16
    for cut_at in (3, 19):  # in the full cache's run, and in that of the sink cache
        cut = measured(tmp_path / "cut", *caches)
        while len(rows(tmp_path / "cut")) < cut_at:
            assert cut.isalive(), cut.read()
            time.sleep(0.01)
        cut.sendintr()
        cut.read()
        assert cut_at <= len(rows(tmp_path / "cut")) < len(expected)
    assert "sink cache" in measured(tmp_path / "cut", *caches).read()
    assert rows(tmp_path / "cut") == expected
    assert not list((tmp_path / "cut").glob("*.unfinished"))


def test_perplexity_is_that_of_the_next_token(measured, carrier, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    measured(tmp_path / "out", "--caches", "sink", "--tokens", "128").read()
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
def test_a_short_form_of_each_benchmark_runs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.measure.RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *SHORT[name].split()])
    importlib.import_module(f"benchmarks.{name}").main()
    assert len(capsys.readouterr().out.splitlines()) >= 2
