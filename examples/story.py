"""Stream a story past a small window, and show that the cache stays as large as it was when the window filled.

    python examples/story.py --window-length 128 --max-new-tokens 800

Without `--model` it tells it with SmolLM2-135M-Instruct, which `make demo` puts in place.
"""

import argparse
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from real_model import SOURCE as SMOLLM2  # noqa: E402

from custom_generate.generate import SinkCache  # noqa: E402


class Meter(TextStreamer):
    """Prints the text as it comes, and notes the size of the cache when its window is full."""

    def __init__(self, tokenizer, cache: SinkCache):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.cache = cache
        self.bytes_when_full = None

    def put(self, value: torch.Tensor) -> None:
        super().put(value)
        if self.bytes_when_full is None and self.cache.get_seq_length() >= self.cache.window_length:
            self.bytes_when_full = self.cache.nbytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a model id or folder (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--window-length", type=int, default=128)
    parser.add_argument("--num-sink-tokens", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=800)
    parser.add_argument("--prompt", default="Tell me a very long story about a lighthouse keeper and the sea.")
    arguments = parser.parse_args()

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = {"pretrained_model_name_or_path": arguments.model} if arguments.model else SMOLLM2
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(**source, torch_dtype="auto").to(device)

    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": arguments.prompt}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    ).to(device)
    cache = SinkCache(arguments.window_length, arguments.num_sink_tokens)
    meter = Meter(tokenizer, cache)
    torch.manual_seed(0)
    sequences = model.generate(
        **inputs,
        custom_generate=str(ROOT),
        trust_remote_code=True,
        past_key_values=cache,
        streamer=meter,
        max_new_tokens=arguments.max_new_tokens,
        min_new_tokens=arguments.max_new_tokens,  # an end of text would end the demonstration too
        do_sample=True,
        temperature=0.7,
        top_p=0.9,
        repetition_penalty=1.1,
    )
    generated = sequences.shape[1] - inputs["input_ids"].shape[1]
    print("-" * 72)
    print(f"tokens generated                 {generated:>12,}")
    print(f"tokens kept                      {min(cache.get_seq_length(), cache.window_length):>12,}")
    if meter.bytes_when_full is not None:
        print(f"cache bytes at window's filling  {meter.bytes_when_full:>12,}")
    print(f"cache bytes at the end           {cache.nbytes:>12,}")


if __name__ == "__main__":
    main()
