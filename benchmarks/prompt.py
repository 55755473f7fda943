"""What a prompt of many windows takes: its peak memory, and what its chunks cost in perplexity.

    make prompt TEXT=file.txt

Memory is the peak of a process that does nothing else, above that of one whose prompt is a single token: for the sink
cache, and for plain `generate`. Perplexity is that of the text past the window, fed in chunks, each of which evicts
before its own tokens attend.
"""

import argparse
import math
import resource
import subprocess
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from real_model import load_real_model  # noqa: E402

from custom_generate.generate import SinkCache, generate  # noqa: E402

WINDOW, SINKS = 256, 4


def peak(cache: str, length: int) -> float:
    """MiB that this process has taken at most (of a GPU if there is one), after a prompt of `length` tokens."""
    sizes = dict(vocab_size=1000, hidden_size=512, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=8)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, num_key_value_heads=8)).to(device).eval()
    model.generation_config.pad_token_id = 0
    arguments = dict(input_ids=torch.randint(1, 1000, (1, length), device=device), max_new_tokens=1)
    generate(model, WINDOW, SINKS, **arguments) if cache == "sink" else model.generate(**arguments)
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


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
    parser.add_argument("text", type=Path, nargs="?", help="a text file; without it, only memory is measured")
    parser.add_argument("--window-length", type=int, default=512, help="of the perplexity")
    parser.add_argument("--past-the-window", type=int, default=2048, help="tokens measured")
    parser.add_argument("--peak", nargs=2, metavar=("CACHE", "LENGTH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    if arguments.peak:
        return print(peak(arguments.peak[0], int(arguments.peak[1])))

    def measured(cache: str, length: int) -> float:
        return float(subprocess.check_output([sys.executable, __file__, "--peak", cache, str(length)]))

    of_a_token = {cache: measured(cache, 1) for cache in ("sink", "plain")}
    print(f"| prompt, in windows of {WINDOW} | sink cache, MiB | plain generate, MiB |\n| ---: | ---: | ---: |")
    for windows in (1, 10, 100):
        sink, plain = (measured(cache, windows * WINDOW) - least for cache, least in of_a_token.items())
        print(f"| {windows} | {sink:,.0f} | {plain:,.0f} |", flush=True)
    if arguments.text is None:
        return

    window = arguments.window_length
    model, tokenizer = load_real_model(torch.float32)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    tokens = tokenizer(arguments.text.read_text(), return_tensors="pt").input_ids[0]
    tokens = tokens[: window + arguments.past_the_window].to(model.device)
    room = window - SINKS
    print(
        f"\nSmolLM2-135M-Instruct, float32, window {window}, {SINKS} sinks, tokens {window + 1:,} to {len(tokens):,}\n"
    )
    print("| tokens in a chunk | perplexity past the window |\n| ---: | ---: |")
    for chunk in (1, room // 16, room // 8, room // 4, room // 2, room):
        print(f"| {chunk} | {perplexity(model, tokens, window, chunk):.2f} |", flush=True)


if __name__ == "__main__":
    main()
