"""What is pushed to the Hub is what users need, and generates from there."""

import re
import shutil
import subprocess
import sys

import pytest
import torch

from custom_generate.generate import __version__
from tests.support import ROOT
from tests.support.documents import text_of
from tests.support.helpers import loadable, prompt, small_model

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
