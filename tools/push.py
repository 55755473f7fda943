"""Put on the Hub what users need, and nothing else: `make push REPO=org/name`, with ARGS=--dry-run to see it only.

Each push is a version: its commit is tagged `v` + `__version__`, which is what users pin with `revision=`.
"""

import argparse
import re
import subprocess
import tempfile
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import EntryNotFoundError

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


def tag_of(files: dict[str, bytes]) -> str:
    """What the version of these files is called on the Hub."""
    return "v" + re.search(rb'^__version__ = "(.+)"$', files["custom_generate/generate.py"], flags=re.M)[1].decode()


def has(api: HfApi, repo: str, revision: str, files: dict[str, bytes]) -> bool:
    """Whether the Hub's repository has just these contents in `files` at a revision."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            there = [api.hf_hub_download(repo, path, revision=revision, cache_dir=folder) for path in files]
        except EntryNotFoundError:
            return False
        return [Path(path).read_bytes() for path in there] == [*files.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("repo", help="the repository on the Hub, org/name; made if it isn't there")
    parser.add_argument("--dry-run", action="store_true", help="list the files and send nothing")
    arguments = parser.parse_args()
    files = contents(arguments.repo)
    tag = tag_of(files)
    for path, content in files.items():
        print(f"{len(content):>10,}  {path}")
    print(f"{'tagged':>10}  {tag}")
    if arguments.dry_run:
        return
    version = subprocess.check_output(["git", "describe", "--always", "--dirty"], cwd=ROOT, text=True).strip()
    api = HfApi()
    api.create_repo(arguments.repo, exist_ok=True)
    tagged = {ref.name: ref.target_commit for ref in api.list_repo_refs(arguments.repo).tags}
    if tag in tagged:
        if has(api, arguments.repo, tag, files):
            return print(f"{arguments.repo} has these files as {tag} already.")
        parser.error(
            f"{arguments.repo} has other files as {tag}, at commit {tagged[tag]}. Users have pinned that: raise "
            "`__version__` in custom_generate/generate.py to push these."
        )
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    commit = api.create_commit(arguments.repo, operations, commit_message=f"sink_cache at {version}")
    api.create_tag(arguments.repo, tag=tag, revision=commit.oid)
    print(commit.commit_url)


if __name__ == "__main__":
    main()
