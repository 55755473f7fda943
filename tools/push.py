"""Put on the Hub what users need, and nothing else: `make push REPO=org/name`, with ARGS=--dry-run to see it only."""

import argparse
import re
import subprocess
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi

ROOT = Path(__file__).resolve().parent.parent
FILES = ["README.md", "COMPATIBILITY.md", "LICENSE", "config.json", "custom_generate/generate.py"]
FILES += ["custom_generate/requirements.txt"]
# With these, `pip install git+https://huggingface.co/org/name` gives `import sink_cache`.
FILES += ["custom_generate/__init__.py", "pyproject.toml"]


def contents(repo: str) -> dict[str, bytes]:
    """The files to push, by their path: those above, and the pictures of the README, which is told where it stands."""
    readme = (ROOT / "README.md").read_text()
    pictures = re.findall(r"""(?:!\[[^\]]*\]\(|src=["'])(?!https?:)([^)"'\s]+)""", readme)
    files = {path: (ROOT / path).read_bytes() for path in [*FILES, *dict.fromkeys(pictures)]}
    return {**files, "README.md": readme.replace("org/sink_cache", repo).encode()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("repo", help="the repository on the Hub, org/name; made if it isn't there")
    parser.add_argument("--dry-run", action="store_true", help="list the files and send nothing")
    arguments = parser.parse_args()
    files = contents(arguments.repo)
    for path, content in files.items():
        print(f"{len(content):>10,}  {path}")
    if arguments.dry_run:
        return
    version = subprocess.check_output(["git", "describe", "--always", "--dirty"], cwd=ROOT, text=True).strip()
    api = HfApi()
    api.create_repo(arguments.repo, exist_ok=True)
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    commit = api.create_commit(arguments.repo, operations, commit_message=f"sink_cache at {version}")
    print(commit.commit_url)


if __name__ == "__main__":
    main()
