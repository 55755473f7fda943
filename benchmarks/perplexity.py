"""Perplexity of a text past the window, token by token: sink cache, full cache, and the cache this one replaces.

    make perplexity TEXT=file.txt

The old cache is an unbound `SinkCache`, driven as `generate` drives it: each token at its position in the whole text.
It needs models that hand `sin` and `cos` to their cache, which transformers' did until 5.3.
"""

import argparse
import math
import platform
import sys
import time
from pathlib import Path

import torch
import transformers
from transformers import Cache, DynamicCache, PreTrainedModel

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from real_model import load_real_model  # noqa: E402

from custom_generate.generate import SinkCache  # noqa: E402


@torch.no_grad()
def negative_log_likelihoods(model: PreTrainedModel, tokens: torch.Tensor, cache: Cache) -> torch.Tensor:
    """Of each token after the first, given those before it as `cache` keeps them: float32 `[len(tokens) - 1]`."""
    losses = []
    for position in range(len(tokens) - 1):
        logits = model(
            input_ids=tokens[None, position, None],
            position_ids=torch.tensor([[position]], device=tokens.device),
            past_key_values=cache,
            use_cache=True,
        ).logits[0, -1]
        losses.append(torch.nn.functional.cross_entropy(logits.float(), tokens[position + 1]))
    return torch.stack(losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path, help="a text file")
    parser.add_argument("--window-length", type=int, default=512)
    parser.add_argument("--num-sink-tokens", type=int, default=4)
    parser.add_argument("--past-the-window", type=int, default=2048, help="tokens measured")
    arguments = parser.parse_args()
    window, sinks = arguments.window_length, arguments.num_sink_tokens

    transformers.logging.set_verbosity_error()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_real_model(torch.bfloat16)
    model.to(device)
    tokens = tokenizer(arguments.text.read_text(), return_tensors="pt").input_ids[0]
    tokens = tokens[: window + arguments.past_the_window].to(device)

    caches = {
        "full cache": DynamicCache(),
        "sink cache": SinkCache(window, sinks).bind(model),
        "old cache, as `generate` drives it": SinkCache(window, sinks),
    }
    hardware = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU"
    print(f"SmolLM2-135M-Instruct, bfloat16, window {window}, {sinks} sinks, tokens {window + 1:,} to {len(tokens):,}")
    print(f"of {arguments.text.name}; transformers {transformers.__version__}, torch {torch.__version__}, {hardware}\n")
    print("| cache | perplexity past the window | tokens kept | ms per token |\n| --- | ---: | ---: | ---: |")
    for name, cache in caches.items():
        start = time.perf_counter()
        losses = negative_log_likelihoods(model, tokens, cache)
        per_token = (time.perf_counter() - start) / len(losses) * 1000
        kept = min(len(losses), window) if isinstance(cache, SinkCache) else len(losses)
        perplexity = math.exp(losses[window - 1 :].mean())
        print(f"| {name} | {perplexity:.2f} | {kept:,} | {per_token:.0f} |", flush=True)


if __name__ == "__main__":
    main()
