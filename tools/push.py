"""Put on the Hub what users need, and nothing else: `make push REPO=org/name`, with ARGS=--dry-run to see it only."""

import argparse
import re
import subprocess
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi

ROOT = Path(__file__).resolve().parent.parent
FILES = ["config.json", "custom_generate/generate.py", "custom_generate/requirements.txt"]
# With these, `pip install git+https://huggingface.co/org/name` gives `import sink_cache`.
FILES += ["custom_generate/__init__.py", "pyproject.toml"]


def contents(repo: str) -> dict[str, bytes]:
    """The files to push, by their path: those above, the README, and what it links to; so far as its links lead.

    Documents are told what their repository is called.
    """
    files = {path: (ROOT / path).read_bytes() for path in FILES}
    documents = ["README.md"]
    for document in documents:  # which grows: the documents that documents link to
        text = (ROOT / document).read_text()
        files[document] = text.replace("org/sink_cache", repo).encode()
        for link in re.findall(r"""(?:\]\(|src=["'])(?!https?:|#)([^)"'\s#]+)""", text):
            path = (ROOT / document).parent.joinpath(link).resolve()
            name = path.relative_to(ROOT).as_posix()
            if path.suffix == ".md" and name not in documents:
                documents.append(name)
            elif path.is_file():
                files.setdefault(name, path.read_bytes())
    return files


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
