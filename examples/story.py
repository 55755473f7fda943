"""Tell a story past a small window; then let the same model go on in three ways, to see what the sinks are for.

    python examples/story.py --model Qwen/Qwen3-0.6B --window-length 256 --max-new-tokens 2000

It needs `pip install .` in the repository, and takes any model on the Hub or in a folder. `make demo` runs it with a
small model that it puts in place itself.
"""

import argparse
import statistics
import time
from typing import Any

import torch
import transformers
from sink_cache import SinkCache, generate
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TextStreamer

SAMPLING = dict(do_sample=True, temperature=0.7, top_p=0.9, repetition_penalty=1.1)


class Meter(TextStreamer):
    """Prints the text as it comes, and notes the size of the cache when its window is full."""

    def __init__(self, tokenizer: Any, cache: SinkCache):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.cache = cache
        self.bytes_when_full = None

    def put(self, value: torch.Tensor) -> None:
        super().put(value)
        if self.bytes_when_full is None and self.cache.get_seq_length() >= self.cache.window_length:
            self.bytes_when_full = self.cache.nbytes


class Clock(TextStreamer):
    """Prints the text as it comes, and notes when the prompt and each token came."""

    def __init__(self, tokenizer: Any):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.times = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        super().on_finalized_text(text.replace("\n", " "), stream_end)

    @property
    def seconds(self) -> float:
        """What a token took, but for the first one."""
        return statistics.median(later - earlier for earlier, later in zip(self.times[1:], self.times[2:]))


def with_cache(
    model: PreTrainedModel, ids: torch.Tensor, num_new: int, clock: Clock, window_length: int, num_sinks: int
) -> tuple[torch.Tensor, int]:
    """The next `num_new` tokens of a stream, and the bytes of its cache."""
    cache = SinkCache(window_length, num_sinks)
    length = dict(max_new_tokens=num_new, min_new_tokens=num_new)
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids), cache=cache, streamer=clock)
    return generate(model, **inputs, **length, **SAMPLING)[:, ids.shape[1] :], cache.nbytes


def recomputed(
    model: PreTrainedModel, ids: torch.Tensor, num_new: int, clock: Clock, window_length: int
) -> tuple[torch.Tensor, int]:
    """The same without a cache that lasts: each token is said after the window is read anew."""
    before = ids.shape[1]
    clock.put(ids)
    for _ in range(num_new):
        window = ids[:, -window_length:]
        mask = torch.ones_like(window)
        said = model.generate(window, attention_mask=mask, max_new_tokens=1, min_new_tokens=1, **SAMPLING)[:, -1:]
        ids = torch.cat([ids, said], dim=1)
        clock.put(said[0])
    clock.end()
    return ids[:, before:], 0


@torch.no_grad()
def perplexity(model: PreTrainedModel, before: torch.Tensor, said: torch.Tensor) -> float:
    """How unlikely the model finds each token of `said`, with all that is before it in view."""
    logits = model(torch.cat([before, said], dim=1), use_cache=False).logits[:, before.shape[1] - 1 : -1]
    return float(torch.nn.functional.cross_entropy(logits[0].float(), said[0]).exp())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="a Hub id or a folder")
    parser.add_argument("--window-length", type=int, default=128)
    parser.add_argument("--num-sink-tokens", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=300, help="of the story")
    parser.add_argument("--compared-tokens", type=int, default=40, help="said after it in each way; 0 for none")
    parser.add_argument("--prompt", default="Tell me a very long story about a lighthouse keeper and the sea.")
    arguments = parser.parse_args()

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, torch_dtype="auto").to(device)

    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": arguments.prompt}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    ).to(device)
    cache = SinkCache(arguments.window_length, arguments.num_sink_tokens)
    meter = Meter(tokenizer, cache)
    torch.manual_seed(0)
    story = generate(
        model,
        **inputs,
        cache=cache,
        streamer=meter,
        max_new_tokens=arguments.max_new_tokens,
        min_new_tokens=arguments.max_new_tokens,  # an end of text would end the demonstration too
        **SAMPLING,
    )
    print("-" * 72)
    print(f"tokens generated                 {story.shape[1] - inputs['input_ids'].shape[1]:>12,}")
    print(f"tokens kept                      {min(cache.get_seq_length(), cache.window_length):>12,}")
    if meter.bytes_when_full is not None:
        print(f"cache bytes at window's filling  {meter.bytes_when_full:>12,}")
    print(f"cache bytes at the end           {cache.nbytes:>12,}")
    if arguments.compared_tokens < 3:
        return

    window, num_sinks = arguments.window_length, arguments.num_sink_tokens
    ways = {
        f"{num_sinks} sinks and the latest {window - num_sinks} tokens": (with_cache, num_sinks),
        f"the latest {window} tokens, no sinks": (with_cache, 0),
        f"the latest {window} tokens, read anew for each token": (recomputed,),
    }
    print(f"\nAfter these {story.shape[1]:,} tokens, the same model with the same dice goes on")
    figures = {}
    for name, (go_on, *num_sinks) in ways.items():
        print(f"\n  with {name}:\n")
        torch.manual_seed(0)
        clock = Clock(tokenizer)
        said, nbytes = go_on(model, story, arguments.compared_tokens, clock, window, *num_sinks)
        figures[name] = 1 / clock.seconds, perplexity(model, story, said), nbytes
    print("\nThe perplexity is that of what was said, to the model with all of the story in view.\n")
    print(f"{'':<52}{'tokens/s':>9}{'perplexity':>11}{'cache bytes':>12}")
    for name, (pace, unlikely, nbytes) in figures.items():
        print(f"{name:<52}{pace:>9.1f}{unlikely:>11.1f}{nbytes:>12,}")


if __name__ == "__main__":
    main()
