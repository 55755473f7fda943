"""What `peers.py` compares: each way to generate far, and the process that runs one of them, turn by turn.

This file runs in the environments of all contestants, on transformers 4.34 to 5.24.
"""

import argparse
import ctypes
import gc
import json
import os
import re
import statistics
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any, Optional

import torch

from benchmarks.shapes import SHAPES

ROOT = Path(__file__).resolve().parent.parent

# What this release calls the cache that a model is given.
RELEASE = tuple(int(part) for part in metadata.version("transformers").split(".")[:2])
CACHE = "cache" if RELEASE >= (5, 24) else "past_key_values"

# ---------------------------------------------------------------------------------------------------------------------
# Contestants, on transformers 4.34 to 5.24
# ---------------------------------------------------------------------------------------------------------------------


class Clock:
    """A streamer that notes when the prompt and each token come."""

    def __init__(self):
        self.times = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def tensors_of(cache: Any) -> list[torch.Tensor]:
    """The keys and values of all layers of a cache of transformers."""
    if hasattr(cache, "layers"):
        tensors = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    else:  # until 4.53
        tensors = [*cache.key_cache, *cache.value_cache]
    return [tensor for tensor in tensors if tensor is not None]


class FullCache:
    """keeps all tokens"""

    compiled: Optional[bool] = False  # None: its release can't be asked

    def __init__(self, model: Any, window: int, sinks: int):
        self.model, self.window, self.sinks = model, window, sinks
        self.settings = dict(do_sample=False, pad_token_id=0)
        if self.compiled:
            from transformers import CompileConfig

            self.settings["compile_config"] = CompileConfig()
            self.settings["compile_config"]._compile_all_devices = True  # on a CPU too
        elif self.compiled is False:
            self.settings["disable_compile"] = True
        self.start()

    def start(self) -> None:
        """Begin a stream."""
        from transformers import DynamicCache

        self.cache = DynamicCache()

    def some_tokens(self, length: int) -> torch.Tensor:
        return torch.randint(1, self.model.config.vocab_size, (1, length), device=self.model.device)

    def feed(self, length: int) -> None:
        """Go on by a prompt of so many tokens."""
        for chunk in self.some_tokens(length).split(min(256, (self.window - self.sinks) // 4), dim=1):
            self.forward(chunk)

    def forward(self, chunk: torch.Tensor) -> None:
        self.model(chunk, use_cache=True, **{CACHE: self.cache})

    def generate(self, tokens: int, clock: Clock) -> None:
        ids = self.some_tokens(self.kept() + 1)  # of which `generate` leaves out as many as the cache says it has
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), CACHE: self.cache}
        self.model.generate(**inputs, max_new_tokens=tokens, streamer=clock, **self.settings)

    def tensors(self) -> list[torch.Tensor]:
        """The keys and values of all layers."""
        return tensors_of(self.cache)

    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors())

    def kept(self) -> int:
        return self.tensors()[0].shape[2] if self.tensors() else 0


class Sinks(FullCache):
    """this repository's"""

    def __init__(self, model: Any, window: int, sinks: int):
        from custom_generate.generate import SinkCache

        self.cache = SinkCache(window, sinks).bind(model)
        super().__init__(model, window, sinks)

    def start(self) -> None:
        self.cache.reset()  # in place: compiled code may know it

    def feed(self, length: int) -> None:
        self.stream(self.some_tokens(length), 1, None)

    def generate(self, tokens: int, clock: Optional[Clock]) -> None:
        self.stream(self.some_tokens(1), tokens, clock)

    def stream(self, ids: torch.Tensor, tokens: int, clock: Optional[Clock]) -> None:
        from custom_generate.generate import generate

        mask = ids.new_ones(1, self.cache.get_seq_length() + ids.shape[1])
        inputs = dict(input_ids=ids, attention_mask=mask, cache=self.cache)
        generate(self.model, **inputs, max_new_tokens=tokens, streamer=clock, **self.settings)

    def nbytes(self) -> int:
        return self.cache.nbytes

    def kept(self) -> int:
        return min(self.cache.get_seq_length(), self.window)


class CompiledSinks(Sinks):
    compiled = True


class OldSinks(FullCache):
    """the class that transformers 4.53 removed, in its last release"""

    def start(self) -> None:
        from transformers import SinkCache

        self.cache = SinkCache(self.window, self.sinks)


class Static(FullCache):
    """holds one window and can't stream: when it is full, it is wound back by as much as a turn needs"""

    def __init__(self, model: Any, window: int, sinks: int):
        from transformers import StaticCache

        self.cache = StaticCache(config=model.config, max_cache_len=window)
        super().__init__(model, window, sinks)

    def start(self) -> None:
        self.wind_back(0)

    def wind_back(self, length: int) -> None:
        for layer in self.cache.layers:
            layer.cumulative_length.clamp_(max=length)

    def forward(self, chunk: torch.Tensor) -> None:
        self.wind_back(self.window - chunk.shape[1])
        super().forward(chunk)

    def generate(self, tokens: int, clock: Clock) -> None:
        self.wind_back(self.window - tokens)
        super().generate(tokens, clock)

    def kept(self) -> int:
        return int(self.cache.get_seq_length())


class CompiledStatic(Static):
    compiled = True


class Recomputed(FullCache):
    """no cache: a forward pass of the last window for each token, the paper's baseline"""

    def start(self) -> None:
        self.ids = self.some_tokens(0)

    def forward(self, chunk: torch.Tensor) -> None:
        self.ids = torch.cat([self.ids, chunk], dim=1)[:, -self.window :]

    def generate(self, tokens: int, clock: Clock) -> None:
        clock.put(self.ids)
        for _ in range(tokens):
            logits = self.model(self.ids, use_cache=False, logits_to_keep=1).logits
            self.forward(logits.argmax(dim=-1))
            clock.put(self.ids.cpu())

    def nbytes(self) -> int:
        return 0

    def kept(self) -> int:
        return self.ids.shape[1]


class AttentionSinks(FullCache):
    """patches Llama's attention, and cuts the cache after each forward pass; on transformers 4.34.0"""

    compiled = None

    def __init__(self, model: Any, window: int, sinks: int):
        from attention_sinks import LlamaForCausalLM

        given = dict(config=model.config, state_dict=model.state_dict(), torch_dtype=model.dtype)
        sizes = dict(attention_sink_size=sinks, attention_sink_window_size=window - sinks)
        patched = LlamaForCausalLM.from_pretrained(None, **given, **sizes).to(model.device).eval()
        patched.generation_config.eos_token_id = None
        patched.register_forward_hook(self.remember)
        super().__init__(patched, window, sinks)

    def remember(self, model: Any, arguments: tuple, output: Any) -> None:
        self.cache = output.past_key_values  # which this release's `generate` doesn't return

    def start(self) -> None:
        self.cache = None

    def tensors(self) -> list[torch.Tensor]:
        return [tensor for layer in self.cache or [] for tensor in layer]


class Pressed(FullCache):
    """`StreamingLLMPress` in a `DecodingPress`, every 512 tokens, its default; on transformers 5.2.0"""

    interval = 512

    def __init__(self, model: Any, window: int, sinks: int):
        from kvpress import DecodingPress, StreamingLLMPress

        # It takes no `KeyRerotationPress`, so nothing moves the keys. (Nor do the sinks stay for long, seen on a CPU:
        # `topk` of equal scores mixes the order that the next eviction goes by.) Hidden states are for other presses.
        sizes = dict(compression_interval=self.interval, target_size=window, hidden_states_buffer_size=0)
        self.press = DecodingPress(StreamingLLMPress(n_sink=sinks), **sizes)
        self.pressing = self.press(model)
        self.pressing.__enter__()
        super().__init__(model, window, sinks)

    def start(self) -> None:
        super().start()
        self.press.reset()

    def forward(self, chunk: torch.Tensor) -> None:
        for layer in range(self.model.config.num_hidden_layers):
            self.press.layer_step_counts[layer] += chunk.shape[1] - 1  # as if they came one by one
        super().forward(chunk)


class PressedEachToken(Pressed):
    """the same after each token, so that no more than the window is kept"""

    interval = 1


# Their environments (None: the one that this file runs in), and how they are drawn: in colours that all can tell apart
# (Okabe and Ito's), with a mark for each. What ends in two dashes is a variant, and drawn dashed.
CONTESTANTS = {
    "sink cache": (None, Sinks, "#D55E00", ","),
    "sink cache, compiled": (None, CompiledSinks, "#D55E00", ",--"),
    "old SinkCache": ("transformers 4.52.4", OldSinks, "#CC79A7", "s"),
    "DynamicCache": (None, FullCache, "#0072B2", "o"),
    "StaticCache": (None, Static, "#56B4E9", "v"),
    "StaticCache, compiled": (None, CompiledStatic, "#56B4E9", "v--"),
    "recomputation": (None, Recomputed, "#000000", "X"),
    "attention_sinks": ("attention_sinks 0.4.0", AttentionSinks, "#009E73", "D"),
    "kvpress": ("kvpress 0.5.5", Pressed, "#A08000", "^"),
    "kvpress, each token": ("kvpress 0.5.5", PressedEachToken, "#A08000", "^--"),
}

# ---------------------------------------------------------------------------------------------------------------------
# The worker: a line of JSON in, a line out
# ---------------------------------------------------------------------------------------------------------------------


def build(name: str, dtype: torch.dtype) -> Any:
    """A random model, on the device that is measured: as Llama, the one architecture that every contestant takes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = SHAPES[name]
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=8192)).eval()
    torch.set_default_dtype(torch.float32)
    if model.model.layers[0].self_attn.k_proj.out_features != shape["num_key_value_heads"] * shape["head_dim"]:
        raise ValueError("the Llama of its release has no `head_dim`")
    model.generation_config.eos_token_id = None
    return model


def taken(most: bool = False) -> int:
    """Bytes that this process takes now, or has taken at most since it was last asked what it takes now."""
    if torch.cuda.is_available():
        if most:
            return torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if not most:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def decode(contestant: FullCache, tokens: int) -> list[float]:
    """The seconds that each of so many tokens takes, after one that isn't timed: it waits for `generate` to set out."""
    clock = Clock()
    contestant.generate(tokens + 1, clock)
    return [after - before for before, after in zip(clock.times[1:-1], clock.times[2:])]


@torch.no_grad()
def work(arguments: argparse.Namespace) -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print
    try:
        import transformers

        transformers.logging.set_verbosity_error()
        model = build(arguments.model, getattr(torch, arguments.dtype))
        contestant = CONTESTANTS[arguments.worker][1](model, arguments.window_length, arguments.num_sink_tokens)
        del model
        # Warm up: what is compiled also when the window is full.
        for length in (1, arguments.window_length) if contestant.compiled else (1,):
            contestant.feed(length)
            pace = statistics.median(decode(contestant, 3))
        contestant.start()
        gc.collect()
        alone, seen = taken() - contestant.nbytes(), 0
        print(json.dumps(dict(transformers=transformers.__version__, pace=pace)), file=answers)
        for line in sys.stdin:
            start, tokens = json.loads(line)
            if start > seen:
                contestant.feed(start - seen)
            taken()
            seconds = decode(contestant, tokens)
            seen = max(start, seen) + tokens + 1
            sizes = dict(kept=contestant.kept(), cache=contestant.nbytes(), memory=taken(most=True) - alone)
            print(json.dumps(dict(seconds=seconds, **sizes)), file=answers)
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}".splitlines()[0][:120]}), file=answers)
        raise
