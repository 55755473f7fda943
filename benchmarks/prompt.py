"""What the chunks of a long prompt cost in perplexity.

    make prompt TEXT=file.txt

That of the text past the window, fed in chunks, each of which evicts before its own tokens attend. What they save in
time and memory is measured by `make prefill`.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from real_model import load_real_model  # noqa: E402

from custom_generate.generate import SinkCache  # noqa: E402

SINKS = 4


@torch.no_grad()
def perplexity(model: PreTrainedModel, tokens: torch.Tensor, window: int, chunk: int) -> float:
    """Of the tokens past the window, `[tokens]`, when they come in chunks of so many."""
    cache, losses = SinkCache(window, SINKS).bind(model), []
    for ids in (tokens[:window], *tokens[window:].split(chunk)):
        start = cache.get_seq_length()
        logits = model(**cache.prepare_inputs(ids[None])).logits[0].float()
        targets = tokens[start + 1 : start + 1 + len(ids)]
        losses.append(torch.nn.functional.cross_entropy(logits[: len(targets)], targets, reduction="none"))
    return math.exp(torch.cat(losses)[window - 1 :].mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path, help="a text file")
    parser.add_argument("--window-length", type=int, default=512)
    parser.add_argument("--past-the-window", type=int, default=2048, help="tokens measured")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    window = arguments.window_length
    model, tokenizer = load_real_model(torch.float32)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    tokens = tokenizer(arguments.text.read_text(), return_tensors="pt").input_ids[0]
    tokens = tokens[: window + arguments.past_the_window].to(model.device)
    room = window - SINKS
    print(f"SmolLM2-135M-Instruct, float32, window {window}, {SINKS} sinks, tokens {window + 1:,} to {len(tokens):,}\n")
    print("| tokens in a chunk | perplexity past the window |\n| ---: | ---: |")
    for chunk in (1, room // 16, room // 8, room // 4, room // 2, room):
        print(f"| {chunk} | {perplexity(model, tokens, window, chunk):.2f} |", flush=True)


if __name__ == "__main__":
    main()
