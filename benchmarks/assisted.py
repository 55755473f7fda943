"""Decoding with drafts past the window: tokens a second beside decoding without, and the memory of an assistant.

    make assisted                                   SmolLM2-135M-Instruct, window 512
    make assisted ARGS="--memory"                   random models: an assistant's memory over 20,000 tokens

The text repeats itself, as it does where code is written again: SmolLM2-135M-Instruct is asked to rename a variable,
behind some documentation that fills the window, and says nearly what was there. Both say the same tokens, up to the
model's own end, or the benchmark fails.
"""

import argparse
import pydoc_data.topics
from argparse import Namespace
from statistics import median

import torch
from transformers.generation.streamers import BaseStreamer

from benchmarks.measure import Table, described, held, in_turns, load, load_with_tokenizer, now, parsed, ratio, target
from custom_generate.generate import generate

CODE = '''
def summarize(values, limit):
    """Count, sum and average of the values that are at most the limit."""
    count = 0
    total = 0.0
    smallest = None
    largest = None
    for value in values:
        if value > limit:
            continue
        count = count + 1
        total = total + value
        if smallest is None or value < smallest:
            smallest = value
        if largest is None or value > largest:
            largest = value
    if count == 0:
        return {"count": 0, "total": 0.0, "average": None, "smallest": None, "largest": None}
    average = total / count
    return {"count": count, "total": total, "average": average, "smallest": smallest, "largest": largest}
'''
REQUEST = (
    "Write this function again, with `values` renamed to `numbers`, and nothing else changed:\n```python" + CODE + "```"
)


def tokens_a_second(arguments: Namespace) -> None:
    model, tokenizer = load_with_tokenizer(arguments.model, arguments.device, arguments.dtype)
    before = tokenizer(pydoc_data.topics.topics["for"] + pydoc_data.topics.topics["if"], return_tensors="pt").input_ids
    request = tokenizer.apply_chat_template(
        [{"role": "user", "content": REQUEST}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).input_ids
    ids = torch.cat([before, request], dim=1).to(arguments.device)
    settings = dict(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False)
    settings |= dict(max_new_tokens=arguments.tokens)
    modes = {"greedy": {}, "prompt lookup": {"prompt_lookup_num_tokens": arguments.drafts}}
    said = {}

    def timed(name: str) -> list[float]:
        clock = FirstAndLast(arguments.device)
        said[name] = generate(model, arguments.window_length, 4, **settings, **modes[name], streamer=clock)
        return [(clock.last - clock.first) / (said[name].shape[1] - ids.shape[1] - clock.first_tokens)]

    seconds = in_turns({name: lambda name=name: timed(name) for name in modes}, arguments.rounds, warm_up=1)
    assert torch.equal(said["greedy"], said["prompt lookup"])
    print(tokenizer.decode(said["greedy"][0, ids.shape[1] :]))
    machine = f"window {arguments.window_length}, {ids.shape[1]} tokens of before: "
    table = Table(f"assisted-smollm2-{arguments.device.type}", machine + described(arguments.device, arguments.dtype))
    for name in modes:
        faster = 1 / ratio(seconds, name, "greedy")
        table.add(decoding=name, ms=median(seconds[name]), **{"tokens a second, of greedy": faster})
    target("prompt lookup, of greedy decoding's tokens a second", faster, at_least=1.3)


class FirstAndLast(BaseStreamer):
    """When the first tokens came, and how many, and when the last."""

    def __init__(self, device: torch.device):
        self.device, self.puts = device, 0

    def put(self, value: torch.Tensor) -> None:
        self.puts, self.last = self.puts + 1, now(self.device)
        if self.puts == 2:  # after the prompt
            self.first, self.first_tokens = self.last, value.numel()

    def end(self) -> None: ...


def memory(arguments: Namespace) -> None:
    """What the process holds at each tenth of a stream that an assistant drafts."""
    model, assistant = (load("tiny", arguments.device, arguments.dtype) for _ in range(2))
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    name = f"assisted-memory-tiny-{arguments.device.type}"
    table = Table(name, f"window {arguments.window_length}: {described(arguments.device, arguments.dtype)}")

    class Held(BaseStreamer):
        tokens, figures = 0, []

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.numel()
            if self.tokens >= (len(self.figures) + 1) * arguments.tokens // 10:
                self.figures.append(held(arguments.device))
                table.add(tokens=self.tokens, MiB=self.figures[-1])

        def end(self) -> None: ...

    streamer, ids = Held(), torch.randint(1, model.config.vocab_size, (1, 16), device=arguments.device)
    settings = dict(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=arguments.tokens)
    generate(model, arguments.window_length, 4, **settings, assistant_model=assistant, streamer=streamer)
    target("MiB more at the end than at the second tenth", streamer.figures[-1] - streamer.figures[1], at_most=2.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model id or folder (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--memory", action="store_true", help="measure an assistant's memory, and no time")
    parser.add_argument("--window-length", type=int, default=512)
    parser.add_argument("--tokens", type=int, help="to generate at most (default: 256, or 20,000 for memory)")
    parser.add_argument("--drafts", type=int, default=10, help="`prompt_lookup_num_tokens`")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parsed(parser)
    arguments.tokens = arguments.tokens or (20_000 if arguments.memory else 256)
    memory(arguments) if arguments.memory else tokens_a_second(arguments)


if __name__ == "__main__":
    main()
