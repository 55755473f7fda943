"""What is pushed to the Hub is what users need, and generates from there."""

import functools
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, pipeline

from custom_generate.generate import __version__, generate
from tests.support import ROOT
from tests.support.documents import text_of
from tests.support.helpers import loadable, prompt, small_model, small_model_of_images, small_tokenizer
from tools import push as tool

pytestmark = pytest.mark.newest_only

# The documents, which the README leads to, with all that was measured, and what transformers loads.
NEEDED = ["CHANGELOG.md", "COMPATIBILITY.md", "CONTRIBUTING.md", "LICENSE", "README.md", "benchmarks/README.md"]
MEASURED = re.findall(r"\((?:benchmarks/)?(results/[^)]+)\)", text_of("README.md") + text_of("benchmarks/README.md"))
NEEDED += [f"benchmarks/{path}" for path in sorted({*MEASURED})]
NEEDED += ["config.json", "custom_generate/__init__.py", "custom_generate/generate.py"]
NEEDED += ["custom_generate/requirements.txt", "docs/migration.md", "docs/usage.md", "pyproject.toml"]
GENERATE, TAG = ROOT / "custom_generate/generate.py", f"v{__version__}"


def copy_needed(folder):
    for path in ["tools/push.py", *NEEDED]:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, folder / path)


def push(*arguments: str, root=ROOT) -> str:
    return subprocess.check_output([sys.executable, root / "tools/push.py", *arguments], text=True)


@pytest.fixture
def pushed(hub, monkeypatch, capsys):
    """Push in this process. Returns the files that are there then, or why it is refused."""

    def pushed(*arguments: str, repo: str = "org/pushed") -> "dict[str, bytes] | str":
        monkeypatch.setattr(sys, "argv", ["push", repo, *map(str, arguments)])
        hub.tags.pop(repo, None)  # as if this were another version
        try:
            tool.main()
        except SystemExit:
            return capsys.readouterr().err
        return hub.at(repo, "main")[1]

    hub.repositories.pop("org/pushed", None)
    return pushed


@pytest.fixture
def folder(tmp_path):
    """A small model in a folder, with a card, and with what nobody needs."""
    tokenizer = small_tokenizer()
    small_model(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "trained")
    tokenizer.save_pretrained(tmp_path / "trained")
    settings = {"_from_model_config": True, "suppress_tokens": [1, 2], "pad_token_id": 0, "window_length": 24}
    (tmp_path / "trained/generation_config.json").write_text(json.dumps(settings))
    card = "---\nlicense: other\nlicense_name: sea\nlicense_link: LICENSE\nbase_model: you/older\n---\n# Trained\n"
    (tmp_path / "trained/README.md").write_text(card)
    (tmp_path / "trained/LICENSE").write_text("As the sea likes.")
    for unneeded in ("train.py", "optimizer.pt", "pytorch_model.bin", "onnx/model.onnx", "checkpoint/config.json"):
        (tmp_path / "trained" / unneeded).parent.mkdir(exist_ok=True)
        (tmp_path / "trained" / unneeded).write_text("unneeded")
    return tmp_path / "trained"


def run_first_example(card: bytes) -> dict:
    """The names that the first Python block of a card leaves, which generates less here."""
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", card.decode(), flags=re.S)[1].replace("10_000", "60"), names)
    return names


def test_a_dry_run_lists_and_sends_nothing(hub):
    listed = push("org/pushed", "--dry-run").splitlines()
    assert listed.pop().split() == ["tagged", TAG]
    assert sorted(line.split()[1] for line in listed) == NEEDED
    assert hub.requests == [] and "org/pushed" not in hub.repositories


def test_what_documents_link_to_goes_with_them(tmp_path):
    copy_needed(tmp_path)
    for picture in ("ring.png", "plots/speed.svg", "unused.png"):
        (tmp_path / picture).parent.mkdir(exist_ok=True)
        (tmp_path / picture).write_bytes(b"a picture")
    with (tmp_path / "README.md").open("a") as readme:
        readme.write('![The ring](ring.png) <img width="100" src="plots/speed.svg"> ![](https://example.com/badge.svg)')
        readme.write(" [Further](docs/further.md#more) [above](#license)")
    (tmp_path / "docs/further.md").write_text("[A picture](../plots/more.svg), and [the README](../README.md)")
    (tmp_path / "plots/more.svg").write_bytes(b"a picture")
    listed = push("org/pushed", "--dry-run", root=tmp_path).splitlines()
    assert sorted(line.split()[1] for line in listed[:-1]) == sorted(
        [*NEEDED, "docs/further.md", "plots/more.svg", "plots/speed.svg", "ring.png"]
    )


def test_what_was_pushed_is_generated_from(hub):
    push("org/pushed")
    files = hub.at("org/pushed", "main")[1]
    assert sorted(files) == NEEDED
    for document in ("README.md", "docs/usage.md", "docs/migration.md"):
        assert b'custom_generate="org/pushed"' in files[document] and b"org/sink_cache" not in files[document]
    call = dict(inputs=prompt(5), trust_remote_code=True, window_length=16, max_new_tokens=60, do_sample=False)
    expected = small_model().generate(custom_generate=loadable(ROOT), **call)
    assert torch.equal(small_model().generate(custom_generate="org/pushed", **call), expected)
    assert torch.equal(small_model().generate(custom_generate="org/pushed", revision=TAG, **call), expected)


def test_each_push_is_a_version(hub, tmp_path):
    copy_needed(tmp_path)
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    author = ["-c", "user.name=you", "-c", "user.email=you@example.com"]
    subprocess.run(["git", *author, "commit", "--quiet", "--allow-empty", "-m", "all"], cwd=tmp_path, check=True)
    push("org/versions", root=tmp_path)
    first = hub.at("org/versions", "main")[0]
    assert hub.tags["org/versions"] == {TAG: first}
    assert f"has these files as {TAG} already" in push("org/versions", root=tmp_path)

    file = tmp_path / "custom_generate/generate.py"
    file.write_text(file.read_text() + "# another line\n")
    refused = subprocess.run(
        [sys.executable, tmp_path / "tools/push.py", "org/versions"], stderr=subprocess.PIPE, text=True
    )
    assert refused.returncode and f"org/versions has other files as {TAG}, at commit {first}." in refused.stderr
    assert hub.at("org/versions", "main")[0] == first

    file.write_text(file.read_text().replace(f'__version__ = "{__version__}"', '__version__ = "99.0.0"'))
    push("org/versions", root=tmp_path)
    assert hub.tags["org/versions"] == {TAG: first, "v99.0.0": hub.at("org/versions", "main")[0]}
    assert hub.at("org/versions", TAG)[1]["custom_generate/generate.py"] == GENERATE.read_bytes()


def test_without_a_model_it_has_no_weights(pushed):
    card = pushed()["README.md"].decode()
    assert "It has no weights: load the model that you want to stream.\n" in card
    for load in (AutoModelForCausalLM.from_pretrained, functools.partial(pipeline, "text-generation")):
        with pytest.raises((OSError, ValueError), match=r"model\.safetensors"):
            load("org/pushed")
    assert "and there is none" in pushed("--window-length", "32")


def test_a_model_that_goes_along_streams_by_itself(pushed, folder, capsys):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    files = pushed("--model", folder, "--num-sink-tokens", "2")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    of_model = {"LICENSE", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    of_model |= {"tokenizer_config.json"} | {path.name for path in folder.glob("chat_template*")}
    assert {*files} == {*NEEDED, "custom_generate/LICENSE", *of_model}
    assert all(files[name] == (folder / name).read_bytes() for name in of_model - {"generation_config.json"})
    assert files["custom_generate/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    said = {"suppress_tokens": [1, 2], "pad_token_id": 0, "window_length": 24, "num_sink_tokens": 2}
    assert json.loads(files["generation_config.json"]) == said

    names = run_first_example(files["README.md"])
    call = dict(**names["inputs"], max_new_tokens=60, do_sample=False)
    streamed = names["model"].generate(**call)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(streamed, generate(plain, 24, 2, **call, suppress_tokens=[1, 2], pad_token_id=0))
    assert not torch.equal(streamed, generate(plain, 400, 2, **call, suppress_tokens=[1, 2], pad_token_id=0))
    storyteller = pipeline("text-generation", "org/pushed", trust_remote_code=True)
    told = storyteller("Once upon a time, on a rock in the sea,", max_new_tokens=60, do_sample=False)
    assert told[0]["generated_text"] == names["tokenizer"].decode(streamed[0], skip_special_tokens=True)
    call |= dict(custom_generate="org/pushed", trust_remote_code=True, window_length=24, num_sink_tokens=2)
    assert torch.equal(plain.generate(**call, suppress_tokens=[1, 2], pad_token_id=0), streamed)
    assert torch.equal(names["model"].generate(**call), streamed)  # as the card's later examples call it


def test_its_card_says_what_is_there(pushed, folder, hub):
    card = ModelCard(pushed("--model", folder)["README.md"].decode())
    terms = (card.data.license, card.data.license_name, card.data.license_link)
    assert terms == ("other", "sea", "LICENSE") and card.data.base_model == "you/older"
    assert "custom_generate" in card.data.tags and "Qwen/Qwen3-0.6B" not in str(card)
    assert "no weights" not in card.text and "weights of [you/older](https://huggingface.co/you/older) too" in card.text

    (folder / "README.md").unlink()
    assert "has no card that says its licence. Say it by ARGS='--license" in pushed("--model", folder)
    card = ModelCard(pushed("--model", folder, "--license", "mit")["README.md"].decode())
    assert card.data.license == "mit" and card.data.base_model is card.data.license_link is None
    assert "This repository has weights too" in card.text

    hub.commit_folder("you/model", folder)
    hub.commit("you/model", {"README.md": b"---\nlicense: mit\nbase_model: you/older\n---\n"})
    files = pushed("--model", "you/model")
    card = ModelCard(files["README.md"].decode())
    assert (card.data.license, card.data.base_model) == ("mit", "you/model")
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes() and "train.py" not in files


def test_a_model_of_images_goes_along(pushed, tmp_path):
    pytest.importorskip("PIL")
    for part in small_model_of_images():
        part.save_pretrained(tmp_path / "seeing")
    files = pushed("--model", tmp_path / "seeing", "--license", "mit")
    assert {*(path.name for path in (tmp_path / "seeing").iterdir())} <= {*files}
    assert type(run_first_example(files["README.md"])["model"]).__name__ == "LlavaForConditionalGeneration"


def test_code_of_a_model_goes_along(pushed, folder):
    config = json.loads((folder / "config.json").read_text()) | {"auto_map": {"AutoConfig": "train.OwnConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    assert "train.py" in pushed("--model", folder)


def test_a_model_without_a_generation_config_ends_where_it_did(pushed, folder):
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text()) | {"eos_token_id": [7, 9]}
    (folder / "config.json").write_text(json.dumps(config))
    said = json.loads(pushed("--model", folder)["generation_config.json"])
    assert (said["eos_token_id"], said["window_length"], said["num_sink_tokens"]) == ([7, 9], 256, 4)
    assert "_from_model_config" not in said


@pytest.mark.parametrize(
    "spoil, options, said",
    [
        (lambda folder: (folder / "model.safetensors").unlink(), [], "has no model.safetensors. Load it, and save it"),
        (lambda folder: (folder / "config.json").unlink(), [], "has no config.json"),
        (lambda folder: None, ["--num-sink-tokens", "24"], "`num_sink_tokens`"),
    ],
)
def test_half_a_model_is_refused(pushed, folder, hub, spoil, options, said):
    spoil(folder)
    assert said in pushed("--model", folder, *options)
    assert "org/pushed" not in hub.repositories


def test_another_model_takes_the_place_of_the_one_before(pushed, folder, hub):
    pushed("--model", folder)
    hub.commit("org/pushed", {"model-Q4_1.gguf": b"the user's", "chat_template.jinja": b"{{ messages }}"})
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="100KB")
    (folder / "model.safetensors").unlink()
    shards = {path.name for path in folder.glob("model-*.safetensors")}
    (folder / "chat_template.jinja").unlink()
    files = pushed("--model", folder)
    assert len(shards) > 1 and shards < {*files} and "model.safetensors" not in files
    assert "chat_template.jinja" not in files and files["model-Q4_1.gguf"] == b"the user's"
    AutoModelForCausalLM.from_pretrained("org/pushed")

    first = min(shards)
    (folder / first).rename(folder / "elsewhere")
    assert f"has no {first}" in pushed("--model", folder)


def test_weights_that_no_push_put_there_are_left(pushed, folder, hub):
    pushed("--model", folder)
    assert "has weights (model.safetensors), and its card would say that it has none" in pushed()

    hub.commit_folder("you/trained", folder)
    assert "has weights (model.safetensors), and its" in pushed(repo="you/trained")
    hub.commit("you/trained", {"model.safetensors": b"other ones"})
    before = hub.at("you/trained", "main")
    assert "you/trained has weights of its own (model.safetensors)" in pushed("--model", folder, repo="you/trained")
    assert hub.at("you/trained", "main") == before
    hub.commit_folder("you/trained", folder)
    files = pushed("--model", folder, repo="you/trained")
    assert "custom_generate/generate.py" in files and files["train.py"] == b"unneeded"
    assert tool.main() is None  # as this version already
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(SystemExit):  # as it has one more of them
        tool.main()
