"""What a decoded token takes in `generate`, on a full window: this cache beside those of transformers.

    make decode ARGS="--model qwen3-0.6b --batch 1 8 --window-length 1024"

All hold `window_length` tokens, take turns by blocks of tokens, and are timed by when each token reaches a streamer.
`DynamicCache` and `StaticCache` are taken back by a block between two of theirs; the cache of sliding layers, of the
same length, goes on for ever as this one does, but has no sinks. `graphs` is how often torch.compile compiled: 0 is a
contestant that ran eagerly.
"""

import argparse
import ctypes
from statistics import median

import torch
from torch._dynamo.utils import counters
from transformers import AutoConfig, AutoModelForCausalLM, CompileConfig, DynamicCache, PreTrainedModel, StaticCache

from benchmarks.measure import MODELS, Clock, Table, described, in_turns, load, parsed, ratio, target
from custom_generate.generate import CACHE, SinkCache, generate

BLOCK, LEFT_OUT = 32, 4  # tokens of a turn, and how many of them the machine needs to settle
TARGETS = (
    ("ours", "dynamic", 1.03),
    ("ours, compiled", "static, compiled", 1.02),
    ("ours, compiled", "sliding, compiled", 1.02),
    ("8 bits", "ours", 1.25),
    ("8 bits, compiled", "ours, compiled", 1.10),
)
CONTESTANTS = ("ours", "ours, compiled", "8 bits", "8 bits, compiled")
CONTESTANTS += ("dynamic", "static", "static, compiled", "sliding, compiled")


class Contestant:
    """A conversation that is held in one kind of cache."""

    def __init__(self, name: str, model: PreTrainedModel, batch: int, window: int, sinks: int):
        self.kind, _, compiled = name.partition(", ")
        self.model = sliding(model, window) if self.kind == "sliding" else model
        self.cache = {
            "ours": lambda: SinkCache(window, sinks).bind(self.model),
            "8 bits": lambda: SinkCache(window, sinks, kv_bits=8).bind(self.model),
            "dynamic": lambda: DynamicCache(config=self.model.config),
            "static": lambda: StaticCache(self.model.config, max_cache_len=window),
            "sliding": lambda: StaticCache(self.model.config, max_cache_len=window),
        }[self.kind]()
        self.settings = {"compile_config": compile_config(model.device)} if compiled else {"disable_compile": True}
        # `DynamicCache` holds `window` tokens on average, `StaticCache` attends to as many slots, filled or not.
        self.seen, self.graphs = 0, 0
        self.ids = torch.randint(1, model.config.vocab_size, (batch, window), device=model.device)
        self.ids = self.ids[:, : window - {"dynamic": BLOCK // 2, "static": BLOCK}.get(self.kind, 0)]
        # By chunks, as a mask over all of a long prompt would not fit into memory, and not compiled for them.
        self.is_ours = isinstance(self.cache, SinkCache)
        chunks = {} if self.is_ours else {"prefill_chunk_size": 1024}
        self.generate(1, disable_compile=True, **chunks)

    def generate(self, new_tokens: int, **kwargs) -> list[float]:
        """Generate so many tokens; return the seconds that each took but the first."""
        clock, length = Clock(), self.seen + self.ids.shape[1]
        settings = {CACHE: self.cache, "max_new_tokens": new_tokens, "streamer": clock}
        settings |= self.settings | kwargs
        settings["attention_mask"] = self.ids.new_ones(len(self.ids), length)
        call = generate if self.is_ours else type(self.model).generate
        self.ids = call(self.model, input_ids=self.ids, **settings)[:, -1:]
        self.seen = length + new_tokens - 1
        return [after - before for before, after in zip(clock.times[1:], clock.times[2:])]

    def decode(self) -> list[float]:
        """A block in `generate`."""
        before = counters["stats"]["unique_graphs"]
        seconds = self.generate(BLOCK)
        self.take_back()
        self.graphs += counters["stats"]["unique_graphs"] - before
        return seconds[LEFT_OUT:]

    def take_back(self) -> None:
        """Forget the tokens of a block, in a cache that would outgrow its length."""
        if self.kind == "dynamic":
            self.cache.crop(-BLOCK)
        elif self.kind == "static":  # it can't be cropped, but attends to nothing beyond this count
            for layer in self.cache.layers:
                layer.cumulative_length.sub_(BLOCK)
        else:
            return
        self.seen -= BLOCK


def sliding(model: PreTrainedModel, window: int) -> PreTrainedModel:
    """`model` on the same weights, with layers that slide over `window` tokens: Llama's as those of Mistral."""
    settings = model.config.to_dict() | dict(sliding_window=window, use_sliding_window=True, max_window_layers=0)
    kind = {"llama": "mistral"}.get(settings.pop("model_type"), model.config.model_type)
    settings.pop("layer_types", None)
    with torch.device("meta"):
        twin = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings), dtype=model.dtype).eval()
    twin.load_state_dict(model.state_dict(), assign=True)
    twin.model.rotary_emb, twin.generation_config = model.model.rotary_emb, model.generation_config
    return twin


def compile_config(device: torch.device) -> CompileConfig:
    """What `generate` takes by itself on a GPU, and the nearest to it elsewhere, where it must be told to compile."""
    config = CompileConfig() if device.type == "cuda" else CompileConfig(mode="default")
    config._compile_all_devices = True
    return config


def keep_freed_memory() -> None:
    """Have the C library keep what is freed. Where a mask makes transformers repeat keys for each query head, compiled
    code allocates tens of MiB a layer, and giving them back costs page faults: of one contestant more than of another,
    by what lies behind them in memory."""
    m_trim_threshold, m_mmap_max = -1, -4
    ctypes.CDLL(None).mallopt(m_trim_threshold, 2**31 - 1)
    ctypes.CDLL(None).mallopt(m_mmap_max, 0)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="qwen3-0.6b")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--window-length", type=int, nargs="+", default=[256, 1024, 4096, 16384])
    parser.add_argument("--num-sink-tokens", type=int, default=4)
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=CONTESTANTS, metavar="NAME")
    parser.add_argument("--of", default="", metavar="NAME", help="of the table, where it is not of all contestants")
    parser.add_argument("--rounds", type=int, default=10, help=f"of {BLOCK} tokens of each")
    arguments = parsed(parser)
    keep_freed_memory()
    model = load(arguments.model, arguments.device, arguments.dtype)
    sinks = "" if arguments.num_sink_tokens == 4 else f"-{arguments.num_sink_tokens}-sinks"
    of_some = f"-{arguments.of}" if arguments.of else ""
    name = f"decode-{arguments.model}{sinks}{of_some}-{arguments.device.type}"
    table = Table(name, f"{arguments.model}: {described(arguments.device, arguments.dtype)}")

    def measure(batch: int, window: int) -> None:
        # Else torch.compile takes what differs from the last window for dynamic, and gives up after a few of them.
        torch.compiler.reset()
        entered = {
            name: Contestant(name, model, batch, window, arguments.num_sink_tokens) for name in arguments.contestants
        }
        figures = in_turns({name: entry.decode for name, entry in entered.items()}, arguments.rounds)
        for name, entry in entered.items():
            row = {"batch": batch, "window": window, "cache": name, "ms a token": median(figures[name])}
            for other in ("dynamic", "static, compiled"):
                row[f"of {other}"] = ratio(figures, name, other) if other in figures else None
            table.add(**row, graphs=entry.graphs)
        for ours, other, bound in TARGETS:
            if {ours, other} <= set(figures):
                target(f"{ours} against {other}", ratio(figures, ours, other), at_most=bound)

    for batch in arguments.batch:
        for window in arguments.window_length:
            try:
                measure(batch, window)
            except torch.OutOfMemoryError:
                print(f"batch {batch}, window {window}: not enough memory for so many contestants")
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
