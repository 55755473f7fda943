"""What the chunks of a long prompt cost in perplexity.

    make prompt
    make prompt ARGS="--text book.txt --window-length 1024"

That of the text past the window, fed in chunks, each of which evicts before its own tokens attend. What they save in
time and memory is measured by `make prefill`.
"""

import argparse
import math
from pathlib import Path

import torch
from measure import described, load_with_tokenizer, parsed
from perplexity import text_of
from transformers import PreTrainedModel

from custom_generate.generate import SinkCache

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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="a text file (default: the documentation of the standard library)")
    parser.add_argument("--model", help="a model id or folder (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--window-length", type=int, default=512)
    parser.add_argument("--past-the-window", type=int, default=2048, help="tokens measured")
    arguments = parsed(parser)
    window = arguments.window_length
    model, tokenizer = load_with_tokenizer(arguments.model, arguments.device, arguments.dtype)
    tokens = tokenizer(text_of(arguments.text), return_tensors="pt").input_ids[0]
    tokens = tokens[: window + arguments.past_the_window].to(model.device)
    room = window - SINKS
    print(f"{described(arguments.device, arguments.dtype)}")
    print(f"window {window}, {SINKS} sinks, tokens {window + 1:,} to {len(tokens):,}\n")
    print("| tokens in a chunk | perplexity past the window |\n| ---: | ---: |")
    for chunk in (1, room // 16, room // 8, room // 4, room // 2, room):
        print(f"| {chunk} | {perplexity(model, tokens, window, chunk):.2f} |", flush=True)


if __name__ == "__main__":
    main()
