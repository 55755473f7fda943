"""What is pushed to the Hub is what users need, and generates from there."""

import re
import shutil
import subprocess
import sys

import torch

from tests.support.documents import text_of
from tests.support.helpers import ROOT, loadable, prompt, small_model

# The documents, which the README leads to, with all that was measured, and what transformers loads.
NEEDED = ["CHANGELOG.md", "COMPATIBILITY.md", "CONTRIBUTING.md", "LICENSE", "README.md", "benchmarks/README.md"]
MEASURED = re.findall(r"\((?:benchmarks/)?(results/[^)]+)\)", text_of("README.md") + text_of("benchmarks/README.md"))
NEEDED += [f"benchmarks/{path}" for path in sorted({*MEASURED})]
NEEDED += ["config.json", "custom_generate/__init__.py", "custom_generate/generate.py"]
NEEDED += ["custom_generate/requirements.txt", "docs/migration.md", "docs/usage.md", "pyproject.toml"]


def push(*arguments: str, root=ROOT) -> str:
    return subprocess.check_output([sys.executable, root / "tools/push.py", *arguments], text=True)


def test_a_dry_run_lists_and_sends_nothing(hub):
    listed = push("org/pushed", "--dry-run").splitlines()
    assert sorted(line.split()[1] for line in listed) == NEEDED
    assert hub.requests == [] and "org/pushed" not in hub.repositories


def test_what_documents_link_to_goes_with_them(tmp_path):
    for path in ["tools/push.py", *NEEDED]:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    for picture in ("ring.png", "plots/speed.svg", "unused.png"):
        (tmp_path / picture).parent.mkdir(exist_ok=True)
        (tmp_path / picture).write_bytes(b"a picture")
    with (tmp_path / "README.md").open("a") as readme:
        readme.write('![The ring](ring.png) <img width="100" src="plots/speed.svg"> ![](https://example.com/badge.svg)')
        readme.write(" [Further](docs/further.md#more) [above](#license)")
    (tmp_path / "docs/further.md").write_text("[A picture](../plots/more.svg), and [the README](../README.md)")
    (tmp_path / "plots/more.svg").write_bytes(b"a picture")
    listed = push("org/pushed", "--dry-run", root=tmp_path).splitlines()
    assert sorted(line.split()[1] for line in listed) == sorted(
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
    push("org/pushed")  # a second time, to a repository that is there
    assert sorted(hub.at("org/pushed", "main")[1]) == NEEDED
