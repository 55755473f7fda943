"""Put on the Hub what users need, and nothing else: `make push REPO=org/name`, with ARGS=--dry-run to see it only.

With MODEL=<a folder or a Hub id> that model goes along, so that the repository streams by itself.

Each push is a version: its commit is tagged `v` + `__version__`, which is what users pin with `revision=`.
"""

import argparse
import fnmatch
import hashlib
import json
import re
import subprocess
from pathlib import Path
from typing import Any, Optional, Union

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, snapshot_download
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.repocard import metadata_load

ROOT = Path(__file__).resolve().parent.parent
FILES = ["config.json", "custom_generate/generate.py", "custom_generate/requirements.txt"]
# With these, `pip install git+https://huggingface.co/org/name` gives `import sink_cache`.
FILES += ["custom_generate/__init__.py", "pyproject.toml"]

WEIGHTS = ["model.safetensors", "model.safetensors.index.json", "model-*.safetensors"]
# What transformers reads of a model, and under which terms it comes: one that another push left would be read for it.
OF_A_MODEL = ["config.json", "generation_config.json", *WEIGHTS]
OF_A_MODEL += ["tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model"]
OF_A_MODEL += ["*.tiktoken", "chat_template*", "additional_chat_templates/*.jinja", "*processor_config.json"]
OF_A_MODEL += ["LICENSE*", "NOTICE*", "USE_POLICY*"]

Files = dict[str, Union[bytes, Path]]  # by their path in the repository: contents, or the file that has them

# What a card says of a repository that is code alone, and what instead of one with weights.
NO_WEIGHTS = "This repository is code alone. It has no weights: load the model that you want to stream.\n"
SOME_WEIGHTS = "This repository has weights{of} too, so it streams by itself, in a window of {window_length} tokens.\n"
OF_CODE = "[Apache-2.0](LICENSE)\n"
OF_BOTH = "The code has [Apache-2.0](custom_generate/LICENSE), and the weights what stands at the top.\n"
NO_BASE = "None in particular: the examples use [Qwen/Qwen3-0.6B](https://huggingface.co/Qwen/Qwen3-0.6B).\n"
BY_ITSELF = """\
```python
from transformers import {auto_class}, AutoTokenizer, TextStreamer

tokenizer = AutoTokenizer.from_pretrained("{repo}")
inputs = tokenizer("Once upon a time, on a rock in the sea,", return_tensors="pt")

model = {auto_class}.from_pretrained("{repo}", trust_remote_code=True)
model.generate(**inputs, max_new_tokens=10_000, streamer=TextStreamer(tokenizer))
```
"""


def contents(repo: str) -> Files:
    """The files to push, by their path: those above, the README, and what it links to; so far as its links lead.

    Documents are told what their repository is called.
    """
    files: Files = {path: (ROOT / path).read_bytes() for path in FILES}
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


def is_any(path: str, patterns: list[str]) -> bool:
    """Whether a path in a repository matches one of these patterns, whose `*` stay in a folder."""
    return any(path.count("/") == pattern.count("/") and fnmatch.fnmatch(path, pattern) for pattern in patterns)


def add_model(files: Files, repo: str, model: str, settings: dict[str, int], terms: Optional[str]) -> None:
    """Add a model to the `files` of `repo`: its weights, configuration, tokenizer and window, and what the card says.

    Args:
        model: its folder, or its id on the Hub.
        settings: the window and the sinks asked for, by the names of the arguments of `generate`.
        terms: its licence, as the Hub calls it; None for the one of its own card.

    Raises:
        ValueError: it has no weights as safetensors, or no licence; or no cache has such a window.
    """
    is_folder = Path(model).is_dir()
    folder = Path(model if is_folder else snapshot_download(model, allow_patterns=[*OF_A_MODEL, "*.py", "README.md"]))
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    config = json.loads(found["config.json"].read_text()) if "config.json" in found else {}
    index = found.get("model.safetensors.index.json")
    weights = set(json.loads(index.read_text())["weight_map"].values()) if index else {"model.safetensors"}
    if missing := [name for name in ("config.json", *sorted(weights)) if name not in found]:
        raise ValueError(f"MODEL ({model}) has no {missing[0]}. Load it, and save it whole by `save_pretrained`.")
    card = (metadata_load(found["README.md"]) if "README.md" in found else None) or {}
    if terms is not None:
        card = {name: value for name, value in card.items() if not name.startswith("license_")} | {"license": terms}
    if "license" not in card:
        raise ValueError(f"MODEL ({model}) has no card that says its licence. Say it by ARGS='--license apache-2.0'.")
    if not is_folder:
        card["base_model"] = model

    files["custom_generate/LICENSE"] = files.pop("LICENSE")  # of the code; the model's own stands at the top
    # Code of the model itself is needed where its configuration names it, and else may be anything.
    sent = [*OF_A_MODEL, "*.py"] if "auto_map" in config else OF_A_MODEL
    files |= {name: path for name, path in found.items() if is_any(name, sent)}
    said = generation_config(folder, settings)
    files["generation_config.json"] = json.dumps(said, indent=2).encode()
    text = files["README.md"].decode()
    files["README.md"] = with_weights(text, repo, card, config["model_type"], said["window_length"]).encode()


def generation_config(folder: Path, settings: dict[str, int]) -> dict[str, Any]:
    """The `generation_config.json` of the model in `folder`, which says the window and the sinks."""
    from transformers import AutoConfig, GenerationConfig

    from custom_generate.generate import SinkCache

    if (folder / "generation_config.json").is_file():
        said = json.loads((folder / "generation_config.json").read_text())
    else:  # what transformers would read in its place
        said = GenerationConfig.from_model_config(AutoConfig.from_pretrained(folder)).to_diff_dict()
    said.pop("_from_model_config", None)  # with it, transformers drops the names that it doesn't know
    window = {name: said[name] for name in ("window_length", "num_sink_tokens") if name in said} | settings
    cache = SinkCache(**window)
    return said | {"window_length": cache.window_length, "num_sink_tokens": cache.num_sink_tokens}


def with_weights(text: str, repo: str, of_model: dict[str, Any], model_type: str, window_length: int) -> str:
    """The card `text` of a repository that has weights. `of_model` is what the card of their model says at its top."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as WITH_IMAGES

    bases = of_model.get("base_model", [])
    bases = [bases] if isinstance(bases, str) else bases
    bases = " and ".join(f"[{base}](https://huggingface.co/{base})" for base in bases)
    auto_class = "AutoModelForImageTextToText" if model_type in WITH_IMAGES else "AutoModelForCausalLM"
    for old, new in {
        NO_WEIGHTS: SOME_WEIGHTS.format(of=bases and f" of {bases}", window_length=window_length),
        NO_BASE: f"{bases or 'None: the weights are its own'}.\n",
        re.search(r"^```python\n.*?^```\n", text, flags=re.M | re.S)[0]: BY_ITSELF.format(
            repo=repo, auto_class=auto_class
        ),
        OF_CODE: OF_BOTH,
    }.items():
        if text.count(old) != 1:
            raise RuntimeError(f"README.md should say this once:\n{old}")
        text = text.replace(old, new)
    card = ModelCard(text)
    for name in ("license", "license_name", "license_link", "base_model"):
        setattr(card.data, name, of_model.get(name))
    card.data.pipeline_tag = of_model.get("pipeline_tag", card.data.pipeline_tag)
    return str(card)


def tag_of(files: Files) -> str:
    """What the version of these files is called on the Hub."""
    return "v" + re.search(rb'^__version__ = "(.+)"$', files["custom_generate/generate.py"], flags=re.M)[1].decode()


def files_at(api: HfApi, repo: str, revision: str) -> dict[str, RepoFile]:
    """The files that the Hub's repository has at a revision, by their path."""
    tree = api.list_repo_tree(repo, recursive=True, revision=revision)
    return {file.path: file for file in tree if isinstance(file, RepoFile)}


def has(there: dict[str, RepoFile], add: CommitOperationAdd) -> bool:
    """Whether the Hub has a file to add as it is. It tells git's digest of each file, and of large ones another."""
    file = there.get(add.path_in_repo)
    if file is None or file.lfs:
        return file is not None and file.lfs.sha256 == add.upload_info.sha256.hex()
    with add.as_file() as opened:
        content = opened.read()
    return file.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def left_of_a_model(there: dict[str, RepoFile], files: Files) -> list[str]:
    """What the Hub has of a model and `files` have not. transformers might read it in the place of what they have."""
    return [path for path in there if is_any(path, OF_A_MODEL) and path not in files]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("repo", help="the repository on the Hub, org/name; made if it isn't there")
    parser.add_argument("--dry-run", action="store_true", help="list the files and send nothing")
    parser.add_argument("--model", help="a folder or a Hub id: send this model along; an id is downloaded for it")
    parser.add_argument("--window-length", type=int, help="its window (default: what its files say, else 256)")
    parser.add_argument("--num-sink-tokens", type=int, help="its sinks (default: what its files say, else 4)")
    parser.add_argument("--license", help="its licence (default: what its own card says)")
    arguments = parser.parse_args()
    repo, files = arguments.repo, contents(arguments.repo)
    settings = {name: getattr(arguments, name) for name in ("window_length", "num_sink_tokens")}
    settings = {name: value for name, value in settings.items() if value is not None}
    if arguments.model:
        try:
            add_model(files, repo, arguments.model, settings, arguments.license)
        except (TypeError, ValueError) as error:
            parser.error(str(error))
    elif settings or arguments.license:
        parser.error("--window-length, --num-sink-tokens and --license are those of a MODEL, and there is none.")
    tag = tag_of(files)
    for path, content in files.items():
        print(f"{content.stat().st_size if isinstance(content, Path) else len(content):>13,}  {path}")
    print(f"{'tagged':>13}  {tag}")
    if arguments.dry_run:
        return
    version = subprocess.check_output(["git", "describe", "--always", "--dirty"], cwd=ROOT, text=True).strip()
    api, adds = HfApi(), [CommitOperationAdd(path, content) for path, content in files.items()]
    api.create_repo(repo, exist_ok=True)
    tagged = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo).tags}
    if tag in tagged:
        there = files_at(api, repo, tag)
        if not left_of_a_model(there, files) and all(has(there, add) for add in adds):
            return print(f"{repo} has these files as {tag} already.")
        parser.error(
            f"{repo} has other files as {tag}, at commit {tagged[tag]}. Users have pinned that: raise "
            "`__version__` in custom_generate/generate.py to push these."
        )
    there = files_at(api, repo, "main")
    weights = [path for path in there if is_any(path, WEIGHTS)]
    is_ours = "custom_generate/generate.py" in there
    if weights and not arguments.model:
        parser.error(f"{repo} has weights ({weights[0]}), and its card would say that it has none. Pass its MODEL.")
    if weights and not is_ours and not {*weights} <= {add.path_in_repo for add in adds if has(there, add)}:
        parser.error(f"{repo} has weights of its own ({weights[0]}), which no push put there. Choose another REPO.")
    left = left_of_a_model(there, files) if arguments.model and is_ours else []
    for path in left:
        print(f"{'deleted':>13}  {path}")
    operations = [*adds, *map(CommitOperationDelete, left)]
    commit = api.create_commit(repo, operations, commit_message=f"sink_cache at {version}")
    api.create_tag(repo, tag=tag, revision=commit.oid)
    print(commit.commit_url)


if __name__ == "__main__":
    main()
