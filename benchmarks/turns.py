"""Seconds to the first token of each turn of a conversation, for clients that send all of it each time.

    make turns                                      SmolLM2-135M-Instruct, window 512, 30 turns
    make turns ARGS="--model qwen3-0.6b --window-length 4096"

Four ways take turns at each turn, on the same tokens: all is read anew; `kept_conversations=1`; the same, where the
client sends each answer back without its first tokens, as where thoughts are left out; and a loop that hands the cache
back, which is the least that can be done. All must say the same, but for the third.
"""

import argparse
import pydoc_data.topics
from argparse import Namespace
from statistics import median
from typing import Any, Optional

import torch
from transformers import AutoTokenizer, PreTrainedModel

from benchmarks import plot
from benchmarks.measure import MODELS, RESULTS, Clock, Table, described, load, now, parsed, target
from custom_generate.generate import SinkCache, generate
from tools import real_models

ANEW, KEPT, CHANGED, LOOP = "read anew", "kept", "kept, answers changed", "cache handed back"
COLUMNS = {ANEW: "s", KEPT: "s kept", CHANGED: "s kept, answers changed", LOOP: "s handed back"}
LEFT_OUT = 4  # first tokens of each answer that the client of the third way leaves out


class Reader:
    """Counts the tokens that go into a model."""

    def __init__(self, model: PreTrainedModel):
        self.tokens = 0
        self.hook = model.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, model: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> None:
        self.tokens += kwargs["input_ids"].shape[1]


def turn(
    model: PreTrainedModel, arguments: Namespace, ids: torch.Tensor, new_tokens: int, **settings
) -> tuple[float, torch.Tensor]:
    """Seconds to the first token after `ids`, int64 `[1, length]`, and the answer."""
    clock, start = Clock(), now(arguments.device)
    if "cache" not in settings:
        settings |= dict(window_length=arguments.window_length, num_sink_tokens=arguments.num_sink_tokens)
    sequence = generate(
        model,
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        streamer=clock,
        **settings,
    )
    return clock.times[1] - start, sequence[:, ids.shape[1] :]


def conversation(model: PreTrainedModel, arguments: Namespace, questions: torch.Tensor) -> list[dict[str, Any]]:
    """A row for each turn: the seconds of each way, and the tokens that went in."""
    SinkCache.forget_kept(model)
    cache = SinkCache(arguments.window_length, arguments.num_sink_tokens)
    same = changed = questions[:, :0]
    reader, rows = Reader(model), []

    def timed(ids: torch.Tensor, new_tokens: int = arguments.new_tokens, **settings) -> tuple:
        reader.tokens = 0
        seconds, answer = turn(model, arguments, ids, new_tokens, **settings)
        return seconds, reader.tokens - new_tokens + 1, answer

    # The third way has a place of its own beside the second's.
    keeping = dict(kept_conversations=2)
    for number, question in enumerate(questions.split(arguments.question_tokens, dim=1), 1):
        same, changed = (torch.cat([ids, question], dim=1) for ids in (same, changed))
        row = {"turn": number, "tokens before": same.shape[1] - question.shape[1]}
        measured: dict[str, Optional[float]] = {ANEW: None}
        if number in arguments.anew:
            measured[ANEW], row["tokens read anew"], _ = timed(same, new_tokens=1)
        else:
            row["tokens read anew"] = None
        measured[LOOP], row["tokens read handed back"], answer = timed(same, cache=cache)
        measured[KEPT], row["tokens read kept"], again = timed(same, **keeping)
        measured[CHANGED], row["tokens read kept, answers changed"], other = timed(changed, **keeping)
        assert torch.equal(answer, again)
        same, changed = torch.cat([same, answer], dim=1), torch.cat([changed, other[:, LEFT_OUT:]], dim=1)
        rows.append(row | {COLUMNS[way]: measured[way] for way in COLUMNS})
    reader.hook.remove()
    print(f"kept: {SinkCache.kept_nbytes(model) / 2**20:.1f} MiB for two conversations; a cache has ", end="")
    print(f"{cache.nbytes / 2**20:.1f} MiB")
    return rows


def questions_of(arguments: Namespace, model: PreTrainedModel) -> torch.Tensor:
    """`[1, turns * question_tokens]`: Python's documentation for the real model, random tokens for the others."""
    length = arguments.turns * arguments.question_tokens
    if arguments.model != MODELS[0]:
        return torch.randint(1, model.config.vocab_size, (1, length), device=arguments.device)
    tokenizer = AutoTokenizer.from_pretrained(real_models.SMOLLM2)
    text = "\n".join(pydoc_data.topics.topics.values())
    return tokenizer(text, return_tensors="pt").input_ids[:, :length].to(arguments.device)


def draw(name: str, title: str, rows: list[dict[str, Any]]) -> None:
    """Seconds to the first token against the turn."""
    figure, (panel,) = plot.panels(1, 6.5)
    styles = {ANEW: "full cache", KEPT: "sink cache", CHANGED: "window without sinks", LOOP: "recomputation"}
    for way, style in styles.items():
        measured = [row for row in rows if row[COLUMNS[way]] is not None]
        seconds = [row[COLUMNS[way]] for row in measured]
        panel.plot([row["turn"] for row in measured], seconds, label=way, **plot.STYLES[style])
    panel.set_ylim(bottom=0)
    panel.set_xlabel("turn")
    plot.entitle(panel, title, [])
    plot.finish(figure, [panel], RESULTS / f"{name}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default=MODELS[0])
    parser.add_argument("--window-length", type=int, default=512)
    parser.add_argument("--num-sink-tokens", type=int, default=4)
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--question-tokens", type=int, default=80, help="of each turn")
    parser.add_argument("--new-tokens", type=int, default=48, help="of each answer")
    parser.add_argument("--anew", type=int, nargs="+", default=[1, 2, 4, 8, 16, 30], help="turns to read anew")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parsed(parser)
    model = load(arguments.model, arguments.device, arguments.dtype)
    questions = questions_of(arguments, model)
    turn(model, arguments, questions[:, : arguments.question_tokens], 2)  # warm up
    rounds = [conversation(model, arguments, questions) for _ in range(arguments.rounds)]

    name = f"turns-{arguments.model}-{arguments.device.type}"
    machine = described(arguments.device, arguments.dtype)
    table, rows = Table(name, f"window {arguments.window_length}: {machine}"), []
    for same_turn in zip(*rounds):
        row = dict(same_turn[0])
        for column in COLUMNS.values():
            if row[column] is not None:
                row[column] = median(measured[column] for measured in same_turn)
        table.add(**row)
        rows.append(row)
    kept, anew = COLUMNS[KEPT], COLUMNS[ANEW]
    later = [row for same_turn in zip(*rounds) for row in same_turn if row["turn"] > 1]
    of_the_loop = median(row[kept] / row[COLUMNS[LOOP]] for row in later)
    target("kept: seconds to the first token, of the loop's", of_the_loop, at_most=1.1)
    full = [row[kept] for row in rows if row["tokens before"] > arguments.window_length]
    if len(full) > 1:
        half = len(full) // 2
        target(
            "kept: the second half's seconds, of the first's", median(full[half:]) / median(full[:half]), at_most=1.1
        )
    print(f"read anew: {max(row[anew] / row[kept] for row in rows if row[anew] is not None):.1f} times as long at most")
    if plot.CAN_DRAW:
        draw(name, f"Seconds to the first token, window {arguments.window_length}", rows)


if __name__ == "__main__":
    main()
