"""What the README says to run, runs as it stands there, with a tiny model behind the real one's name."""

import json
import os
import re
import sys
from pathlib import Path

import pexpect
import pytest
from transformers import AutoModelForCausalLM, GenerationConfig

from tests.support.helpers import ROOT, loadable, prompt, readme_snippets, small_model, small_tokenizer
from tools.real_models import SMOLLM2

pytestmark = pytest.mark.slow  # test_serve.py runs the commands of its section; `make test` is what runs this


def test_python_and_settings(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = small_tokenizer()
    sizes = dict(vocab_size=len(tokenizer), num_hidden_layers=2, max_position_embeddings=40_960)
    small_model("qwen3", **sizes).save_pretrained("qwen")
    tokenizer.save_pretrained("qwen")
    GenerationConfig(bos_token_id=1, pad_token_id=0, max_new_tokens=5).save_pretrained("qwen")
    hub.commit_folder("Qwen/Qwen3-0.6B", tmp_path / "qwen")
    my_model = loadable(Path("my_model"))

    names: dict = {}
    for snippet in readme_snippets("python"):
        exec(compile(snippet, "README.md", "exec"), names)
    assert "HEAD /org/sink_cache/resolve/main/custom_generate/generate.py" in hub.requests
    assert names["story"][0]["generated_text"][-1]["role"] == "assistant"
    assert names["logits"].isfinite().all()
    names["name"] = "Qwen/Qwen3-0.6B"
    for snippet in readme_snippets("diff"):  # what users of other caches are told to write instead
        exec("\n".join(line[2:] for line in snippet.splitlines() if line.startswith("+")), names)

    (settings,) = readme_snippets("json")
    file = Path(my_model, "generation_config.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), **json.loads(settings)}))
    streaming = AutoModelForCausalLM.from_pretrained(my_model, trust_remote_code=True)
    output = streaming.generate(input_ids=prompt(5), max_new_tokens=5, return_dict_in_generate=True)
    assert output.past_key_values.window_length == json.loads(settings)["window_length"]


def test_the_totals_are_those_of_the_table():
    readme = " ".join((ROOT / "README.md").read_text().split())
    table = (ROOT / "COMPATIBILITY.md").read_text()
    total, streams, refused = re.search(r"(\d+) model types.*?(\d+) stream, (\d+) are refused", table, re.S).groups()
    assert f"[{streams} of {total}](COMPATIBILITY.md)" in readme
    assert f"{total} causal language models" in readme and f"{streams} stream, {refused} are refused" in readme


def test_the_demo(installed):
    # What `make demo` runs, but shorter.
    demo = [str(ROOT / "examples/story.py"), "--model", str(SMOLLM2), "--window-length", "64"]  # longer than the prompt
    demo += ["--max-new-tokens", "40", "--compared-tokens", "5"]
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    terminal = pexpect.spawn(sys.executable, demo, env=environment, encoding="utf-8", timeout=120)
    terminal.expect("-{72}")
    story, rest = terminal.before, terminal.read()
    figures = dict(re.findall(r"(\w.*?) {2,}([\d,]+)\r\n", rest))
    assert len(story.split()) > 10
    assert figures["tokens generated"] == "40" and figures["tokens kept"] == "64"
    assert figures["cache bytes at window's filling"] == figures["cache bytes at the end"]
    ways = re.findall(r"^(.*\S) +([\d.]+) +([\d.]+) +([\d,]+)\r$", rest, flags=re.MULTILINE)
    assert [name for name, *_ in ways] == [
        "4 sinks and the latest 60 tokens",
        "the latest 64 tokens, no sinks",
        "the latest 64 tokens, read anew for each token",
    ]
    assert all(f"with {name}:" in rest for name, *_ in ways)
    assert ways[0][3] == figures["cache bytes at the end"] and ways[2][3] == "0"
