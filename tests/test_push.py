"""What is pushed to the Hub is what users need, and generates from there."""

import shutil
import subprocess
import sys

import torch

from custom_generate.generate import __version__
from tests.support.helpers import ROOT, loadable, prompt, small_model

NEEDED = ["COMPATIBILITY.md", "LICENSE", "README.md"]
PICTURES = ["peers-amd-epyc-x86_64-cpu-smollm2-135m", "perplexity-smollm2-135m-instruct-python-cpu-1024"]
PICTURES += ["recall-smollm2-135m-instruct-cpu"]
NEEDED += [f"benchmarks/results/{name}.png" for name in PICTURES]
NEEDED += ["config.json", "custom_generate/__init__.py", "custom_generate/generate.py"]
NEEDED += ["custom_generate/requirements.txt", "pyproject.toml"]
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


def test_pictures_go_with_the_readme(tmp_path):
    copy_needed(tmp_path)
    for picture in ("ring.png", "plots/speed.svg", "unused.png"):
        (tmp_path / picture).parent.mkdir(exist_ok=True)
        (tmp_path / picture).write_bytes(b"a picture")
    with (tmp_path / "README.md").open("a") as readme:
        readme.write('![The ring](ring.png) <img width="100" src="plots/speed.svg"> ![](https://example.com/badge.svg)')
    listed = push("org/pushed", "--dry-run", root=tmp_path).splitlines()
    assert sorted(line.split()[1] for line in listed[:-1]) == sorted([*NEEDED, "ring.png", "plots/speed.svg"])


def test_what_was_pushed_is_generated_from(hub):
    push("org/pushed")
    files = hub.at("org/pushed", "main")[1]
    assert sorted(files) == NEEDED
    assert b'custom_generate="org/pushed"' in files["README.md"] and b"org/sink_cache" not in files["README.md"]
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
