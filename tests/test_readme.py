"""What the documents say to run, runs as it stands there but shorter, with a tiny model behind the real one's name."""

import ast
import contextlib
import json
import re
import runpy
import sys
import warnings
from pathlib import Path

import pytest
import torch.distributed.run
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from custom_generate.generate import CACHE, OLDER_NAME, SinkCache, __version__, generate
from tests.support import ROOT
from tests.support.documents import DOCUMENTS, RUN, prose, snippets, text_of
from tests.support.helpers import loadable, png, prompt, small_model, small_model_of_images, small_tokenizer
from tests.support.ranks import run_ranks

# Code runs on the oldest release and on the newest. What a document says of other files is the same on all.
newest_only = pytest.mark.newest_only

VERSION = f"v{__version__}"  # the revision that the documents pin


@pytest.fixture
def workplace(hub, installed, tmp_path, monkeypatch) -> Path:
    """A folder to run the documents' code in: the Hub has its model and its revision, and this code is installed."""
    monkeypatch.chdir(tmp_path)
    tokenizer = small_tokenizer()
    sizes = dict(vocab_size=len(tokenizer), num_hidden_layers=2, max_position_embeddings=40_960)
    small_model("qwen3", **sizes).save_pretrained("qwen")
    tokenizer.save_pretrained("qwen")
    # It never ends a text, but has a token for that, without which drafts fail on the oldest release.
    ends = dict(eos_token_id=2, suppress_tokens=[2])
    GenerationConfig(bos_token_id=1, pad_token_id=0, max_new_tokens=5, **ends).save_pretrained("qwen")
    hub.commit_folder("Qwen/Qwen3-0.6B", tmp_path / "qwen")
    hub.tags["org/sink_cache"] = {VERSION: hub.repositories["org/sink_cache"][-1][0]}
    group_beams = ROOT / "tests/support/group_beams.py"
    hub.commit("transformers-community/group-beam-search", {"custom_generate/generate.py": group_beams.read_bytes()})
    monkeypatch.syspath_prepend(installed)
    loadable(Path("my_model"))
    return tmp_path


@pytest.fixture
def seeing(workplace, hub) -> None:
    """A model that sees images, and images, as docs/usage.md names them."""
    pytest.importorskip("PIL")
    model, processor = small_model_of_images()
    model.save_pretrained("llava")
    processor.save_pretrained("llava")
    settings = dict(bos_token_id=1, pad_token_id=0, suppress_tokens=[processor.image_token_id])
    GenerationConfig(**settings).save_pretrained("llava")
    hub.commit_folder("llava-hf/llava-interleave-qwen-0.5b-hf", workplace / "llava")
    for seed, name in enumerate(("monday.png", "tuesday.png")):
        Path(name).write_bytes(png(seed))


def shorter(snippet: str) -> str:
    """A document's code, but it generates less, and says to plain `generate` what this release calls a cache."""
    snippet = re.sub(r"max_new_tokens=(\d+_000|500)\b", "max_new_tokens=265", snippet)  # past a window of 256
    snippet = re.sub(r"max_new_tokens=[12]00\b", "max_new_tokens=30", snippet)
    return snippet.replace("cache=SinkCache(256, 4).bind(model)", f"{CACHE}=SinkCache(256, 4).bind(model)")


def run(document: str, names: dict) -> dict:
    """Run all Python blocks of a document, and the lines of its diffs that are to be written."""
    for snippet in snippets(document, "python"):
        exec(compile(shorter(snippet), document, "exec"), names)
    for snippet in snippets(document, "diff"):
        exec("\n".join(line[2:] for line in snippet.splitlines() if line.startswith("+")), names)
    return names


def first_example() -> dict:
    """The names that the README's first example leaves."""
    names: dict = {"name": "Qwen/Qwen3-0.6B"}
    exec(shorter(snippets("README.md", "python")[0]), names)
    return names


@pytest.mark.slow
@pytest.mark.filterwarnings("error::FutureWarning")
def test_the_readme(workplace, hub):
    names = run("README.md", {})
    assert f"HEAD /org/sink_cache/resolve/{VERSION}/custom_generate/generate.py" in hub.requests
    assert names["messages"][-1]["role"] == "assistant" and SinkCache.kept_nbytes(names["model"]) > 0


@pytest.mark.slow
@newest_only  # its images need a processor without torchvision, which older releases lack
@pytest.mark.filterwarnings("error::FutureWarning")
def test_usage(workplace, seeing):
    names = run("docs/usage.md", first_example())
    assert names["story"][0]["generated_text"][-1]["role"] == "assistant"
    assert names["logits"].isfinite().all()
    assert names["watched"].get_seq_length() == names["seen"].shape[1] - 1
    assert names["described"][0]["generated_text"][-1]["role"] == "assistant"
    # The last token of 50 had not been read, and the one before it was taken back.
    assert names["branch"].get_seq_length() == names["conversation"].shape[1] + 50 - 2

    file = Path("my_model", "generation_config.json")
    for settings in map(json.loads, snippets("docs/usage.md", "json")):
        file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
        streaming = AutoModelForCausalLM.from_pretrained(loadable(Path("my_model")), trust_remote_code=True)
        output = streaming.generate(input_ids=prompt(5), max_new_tokens=5, return_dict_in_generate=True)
        cache = output[CACHE]
        assert cache.window_length == settings["window_length"]
        assert (cache.kept_nbytes(streaming) > 0) == ("kept_conversations" in settings)


def run_file(number: int, file: str) -> None:
    """Run a Python file, and write down what it prints."""
    warnings.simplefilter("error", FutureWarning)
    with open(f"{file}-{number}", "w") as output, contextlib.redirect_stdout(output):
        runpy.run_path(file, run_name="__main__")


@newest_only
@pytest.mark.slow
@pytest.mark.parametrize("number", range(3), ids=["tensor parallel", "split", "sharded"])
def test_two_processes(workplace, number):
    # accelerate starts no group of processes on a CPU without being told to.
    code = snippets("docs/usage.md", "py")[number].replace("PartialState()", "PartialState(cpu=True)")
    command, file = code.splitlines()[0].removeprefix("# ").rsplit(maxsplit=1)
    Path(file).write_text(code)
    program, *arguments = command.split()
    assert program == "torchrun" and torch.distributed.run.parse_args([*arguments, file]).nproc_per_node == "2"
    run_ranks(run_file, file)
    printed = "\n".join(Path(f"{file}-{rank}").read_text() for rank in range(2))
    said = sorted(ast.literal_eval(line)[0] for line in re.findall(r"\[(?:'.*?'|\".*?\")\]", printed))

    model, tokenizer = AutoModelForCausalLM.from_pretrained("qwen"), AutoTokenizer.from_pretrained("qwen")
    texts = ["Once upon a time,", "The sea was calm that night, and"]
    expected = []
    for text in texts[:1] * 2 if file == "tensor_parallel.py" else texts:
        inputs = tokenizer(text, return_tensors="pt")
        expected.append(tokenizer.decode(generate(model, 32, 4, **inputs, max_new_tokens=60)[0]))
    assert said == sorted(expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("error::FutureWarning")
def test_migration(workplace):
    assert len(snippets("docs/migration.md", "diff")) == 3
    run("docs/migration.md", first_example())


@newest_only
@pytest.mark.parametrize("document", RUN)
def test_code_has_the_names_of_the_newest_release(document):
    code = [code for language in ("python", "py") for code in snippets(document, language)]
    code += [line for diff in snippets(document, "diff") for line in diff.splitlines() if not line.startswith("-")]
    assert OLDER_NAME not in "\n".join(code) and "get_max_cache_shape" not in "\n".join(code)


@newest_only
@pytest.mark.parametrize("document", RUN)
def test_calls_pin_the_revision(document):
    code = "\n".join(code for language in ("python", "diff") for code in snippets(document, language))
    assert code.count('"org/sink_cache"') == code.count(f'revision="{VERSION}"') > 0


def anchors(document: str) -> set[str]:
    """What links to the headings of a document end in."""
    headings = re.findall(r"^#+ (.*)$", prose(document), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@newest_only
@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", prose(document)):
        path, _, anchor = link.partition("#")
        target = (ROOT / document).parent / path if path else ROOT / document
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.resolve().relative_to(ROOT).as_posix()), link


@newest_only
@pytest.mark.parametrize("document", DOCUMENTS)
def test_make_has_the_targets(document):
    targets = set(re.findall(r"^([\w ]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    targets = {target for line in targets for target in line.split()}
    assert set(re.findall(r"(?:^|`)(?:\w+=\w+ )*make (\w+)", text_of(document), flags=re.MULTILINE)) <= targets


@newest_only
def test_the_readme_is_a_card():
    assert len(text_of("README.md").splitlines()) < 240
    # As in other repositories of this kind, so that who knows one finds the same here.
    headings = re.findall(r"^## (.*)$", text_of("README.md"), flags=re.MULTILINE)
    assert headings[:4] == ["Base model", "Model compatibility", "Additional arguments", "Output type changes"]


@newest_only
def test_the_totals_are_those_of_the_table():
    total, streams = re.search(r"(\d+) model types.*?(\d+) stream", text_of("COMPATIBILITY.md"), re.S).groups()
    assert f"[{streams} of {total}](COMPATIBILITY.md)" in text_of("README.md")
    of_images = text_of("COMPATIBILITY.md").partition("## Models of images and text")[2]
    total, streams, with_images = re.search(
        r"the (\d+) model types.*?(\d+) stream.*?(\d+) of", of_images, re.S
    ).groups()
    assert f"Of {total} types of models of images and text {streams} stream text" in " ".join(
        text_of("README.md").split()
    )
    assert f"[{with_images} images too]" in text_of("README.md")


@newest_only
def test_the_demo(installed, carrier, monkeypatch, capsys):
    # What `make demo` runs, but shorter, and with a tiny model.
    demo = [str(ROOT / "examples/story.py"), "--model", str(carrier), "--window-length", "64"]  # longer than the prompt
    monkeypatch.syspath_prepend(installed)
    monkeypatch.setattr(sys, "argv", [*demo, "--max-new-tokens", "40", "--compared-tokens", "5"])
    runpy.run_path(demo[0], run_name="__main__")
    story, rest = re.split("-{72}", capsys.readouterr().out)
    figures = dict(re.findall(r"(\w.*?) {2,}([\d,]+)\n", rest))
    assert len(story) > 40
    assert figures["tokens generated"] == "40" and figures["tokens kept"] == "64"
    assert figures["cache bytes at window's filling"] == figures["cache bytes at the end"]
    ways = re.findall(r"^(.*\S) +([\d.]+) +([\d.]+) +([\d,]+)$", rest, flags=re.MULTILINE)
    assert [name for name, *_ in ways] == [
        "4 sinks and the latest 60 tokens",
        "the latest 64 tokens, no sinks",
        "the latest 64 tokens, read anew for each token",
    ]
    assert all(f"with {name}:" in rest for name, *_ in ways)
    assert ways[0][3] == figures["cache bytes at the end"] and ways[2][3] == "0"
