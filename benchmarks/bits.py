"""Windows of 8 bits beside those of 16: perplexity at as many bytes, and at as many tokens.

    make bits
    make bits ARGS="--model google/gemma-3-270m --text wikitext-2/valid.txt"
    make bits ARGS="--outlier 50"         with a channel of each key so many times as large as it is

Each window reads the same text, and is judged by its tokens from 1,025 on. The bytes are those of a bfloat16 cache.
`--outlier` multiplies a pair of channels of each key, and divides them in each query. So the model stays what it is,
and its keys become those of models with channels that stand out.
"""

import argparse
import copy
import math
import re
import statistics
from pathlib import Path
from typing import Optional

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from benchmarks import plot
from benchmarks.measure import Table, described, load_with_tokenizer, parsed, target
from benchmarks.perplexity import SMOLLM2, rows_of, text_of
from custom_generate.generate import SinkCache

FIRST, CHUNK = 1024, 64  # tokens that are read before any is judged, and of one forward pass
NAMES = {None: "window of 16 bits", 8: "window of 8 bits"}


@torch.no_grad()
def nbytes(model: PreTrainedModel, window_length: int, num_sink_tokens: int, kv_bits: Optional[int]) -> int:
    """What a full window takes in a model of bfloat16, of which this needs a forward pass."""
    cache = SinkCache(window_length, num_sink_tokens, kv_bits).bind(model)
    model(**cache.prepare_inputs(torch.tensor([[1]], device=model.device)))
    return cache.nbytes


def same_bytes(model: PreTrainedModel, window_length: int, num_sink_tokens: int) -> int:
    """How long a window of 8 bits is that takes as many bytes as one of 16 bits of `window_length`."""
    most = nbytes(model, window_length, num_sink_tokens, None)
    length = window_length
    per_token = nbytes(model, 2 * window_length, num_sink_tokens, 8) - nbytes(model, length, num_sink_tokens, 8)
    return length + (most - nbytes(model, length, num_sink_tokens, 8)) * length // per_token


@torch.no_grad()
def perplexity(
    model: PreTrainedModel, tokens: torch.Tensor, window_length: int, num_sink_tokens: int, kv_bits: Optional[int]
) -> float:
    """Of `tokens`, int64 `[length]`, from `FIRST` on."""
    cache, losses = SinkCache(window_length, num_sink_tokens, kv_bits).bind(model), []
    for chunk in tqdm(torch.arange(len(tokens) - 1).split(CHUNK), leave=False):
        logits = model(**cache.prepare_inputs(tokens[chunk][None])).logits[0]
        losses.append(torch.nn.functional.cross_entropy(logits.float(), tokens[chunk + 1], reduction="none"))
    return math.exp(torch.cat(losses)[FIRST:].mean())


def make_stand_out(model: PreTrainedModel, factor: float) -> None:
    """Have one pair of channels of each key so many times as large, and of each query as much smaller."""
    for layer in model.model.layers:
        for projection, by in ((layer.self_attn.k_proj, factor), (layer.self_attn.q_proj, 1 / factor)):
            heads = projection.weight.data.unflatten(0, (-1, 2, layer.self_attn.head_dim // 2))
            heads[:, :, 5] *= by


def draw(file: Path, title: str) -> None:
    """Perplexity against bytes, off the table in `file`."""
    figure, (panel,) = plot.panels(1, 6)
    for name in NAMES.values():
        own = sorted((row["MiB"], row["perplexity"]) for row in rows_of(file) if row["cache"] == name)
        panel.plot(*zip(*own), label=name, marker="o", **plot.STYLES[name])
    plot.entitle(panel, f"perplexity past {FIRST:,} tokens", [])
    panel.set_xlabel("MiB that the cache takes")
    figure.suptitle(title)
    plot.finish(figure, [panel], file.with_suffix(".png"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help=f"a model id or folder (default: {SMOLLM2})")
    parser.add_argument("--text", type=Path, help="a file (default: the standard library's documentation)")
    parser.add_argument("--tokens", type=int, default=2560)
    parser.add_argument("--window-length", type=int, nargs="+", default=[256, 512], help="of 16 bits")
    parser.add_argument("--num-sink-tokens", type=int, default=4)
    parser.add_argument("--outlier", type=float, default=1)
    arguments = parsed(parser)
    model, tokenizer = load_with_tokenizer(arguments.model, arguments.device, arguments.dtype)
    if arguments.outlier != 1:
        make_stand_out(model, arguments.outlier)
    in_bfloat16 = copy.deepcopy(model).bfloat16()
    ids = tokenizer(text_of(arguments.text), return_tensors="pt").input_ids[0, : arguments.tokens + 1]
    tokens, sinks = ids.to(arguments.device), arguments.num_sink_tokens

    of_text = "python" if arguments.text is None else arguments.text.parent.name or arguments.text.stem
    slug = re.sub(r"\W+", "-", f"{Path(arguments.model or SMOLLM2).name}-{of_text}".lower())
    slug += f"-outlier-{arguments.outlier:g}" if arguments.outlier != 1 else ""
    table = Table(f"bits-{slug}-{arguments.device.type}", described(arguments.device, arguments.dtype))

    def measured(window: int, kv_bits: Optional[int]) -> float:
        figure = perplexity(model, tokens, window, sinks, kv_bits)
        mebibytes = nbytes(in_bfloat16, window, sinks, kv_bits) / 2**20
        table.add(cache=NAMES[kv_bits], window=window, MiB=round(mebibytes, 3), perplexity=round(figure, 4))
        return figure

    as_long, as_large = [], []
    for window in arguments.window_length:
        whole = measured(window, None)
        as_long.append(measured(window, 8) / whole)
        as_large.append(measured(same_bytes(in_bfloat16, window, sinks), 8) / whole)
    # A mean, as each of them has noise: of 1,536 tokens the standard error is 0.0012 (SmolLM2).
    target("at as many tokens, in the mean", statistics.geometric_mean(as_long), at_most=1.002)
    # Longer windows gain less, where a text looks back less far.
    target(f"at the bytes of a window of {arguments.window_length[0]}", as_large[0], at_most=0.89)
    if plot.CAN_DRAW:
        draw(table.path, f"{Path(arguments.model or SMOLLM2).name}, {of_text}")


if __name__ == "__main__":
    main()
