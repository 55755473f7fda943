"""Ranks of a distributed model that generate side by side (`synced_gpus`), each its own text of its own length."""

import copy
from datetime import timedelta

import pytest
import torch

from custom_generate.generate import CACHE, SinkCache, generate
from tests.support.helpers import answer, prompt, seeded, small_model
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.newest_only


class Others:
    """The other ranks, as far as this one can tell: how long they go on, and in how many passes their prompts go in."""

    def __init__(self, monkeypatch, steps: int, prompt_passes: int = 1):
        self.steps, self.prompt_passes = steps, prompt_passes
        monkeypatch.setattr(torch.distributed, "all_reduce", self.all_reduce)

    def all_reduce(self, tensor: torch.Tensor, op) -> None:
        if op == torch.distributed.ReduceOp.MAX:
            tensor.clamp_(min=self.prompt_passes)
        else:
            tensor += self.steps > 0
            self.steps -= 1


def count_passes(model) -> list[list[int]]:
    """A list that grows by the shape of the ids of each forward pass from now on."""
    shapes: list[list[int]] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(list(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return shapes


MODES = {
    "greedy": dict(do_sample=False),
    "sampling": dict(do_sample=True),
    "beams": dict(do_sample=False, num_beams=2, num_return_sequences=2),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("max_new_tokens", [1, 2, 8, 30])
def test_a_finished_rank_waits_and_changes_nothing(mode, max_new_tokens, monkeypatch, tmp_path):
    model = small_model()

    def a_call(**kwargs):
        """What was said, the cache as it was after that, and what the model would say next."""
        settings = dict(max_new_tokens=max_new_tokens, past_key_values=SinkCache(16, 4), **MODES[mode])
        with seeded():
            output = generate(model, input_ids=prompt(10, rows=2), return_dict_in_generate=True, **settings, **kwargs)
        after = copy.deepcopy(output[CACHE])
        with torch.no_grad():
            logits = model(**output[CACHE].prepare_inputs(prompt(3, rows=after.batch_size))).logits
        return output.sequences, after, logits

    expected, alone, expected_logits = a_call()
    passes = count_passes(model)
    generate(model, 16, 4, input_ids=prompt(10, rows=2), max_new_tokens=max_new_tokens, **MODES[mode])
    needed = len(passes)
    Others(monkeypatch, steps=needed + 40)
    passes.clear()
    sequences, cache, logits = a_call(synced_gpus=True)
    assert torch.equal(sequences, expected)
    assert cache.get_seq_length() == alone.get_seq_length() == sequences.shape[1] - 1
    assert torch.equal(logits, expected_logits)
    assert passes[needed:-1] == [[cache.batch_size, 1]] * 40  # it went on for as long as the others did
    for name, each in (("waited", cache), ("alone", alone)):
        each.save(tmp_path / name)
    assert (tmp_path / "waited").read_bytes() == (tmp_path / "alone").read_bytes()


def test_a_prompt_goes_in_by_as_many_passes_as_the_longest(monkeypatch):
    model = small_model()
    expected = generate(model, 16, 4, input_ids=prompt(30), max_new_tokens=20, do_sample=False)
    passes = count_passes(model)
    generate(model, 16, 4, input_ids=prompt(30), max_new_tokens=1)
    own, other = len(passes), 9
    assert 1 < own < other
    Others(monkeypatch, steps=0, prompt_passes=other)
    passes.clear()
    generate(model, 16, 4, input_ids=prompt(30), max_new_tokens=1, synced_gpus=True)
    assert len(passes) == other
    tokens = generate(model, 16, 4, input_ids=prompt(30), max_new_tokens=20, do_sample=False)
    assert torch.equal(tokens, expected)


def test_a_sharded_model_is_kept_in_step_without_being_asked(monkeypatch):
    model = small_model()
    expected = generate(model, 16, 4, input_ids=prompt(30), max_new_tokens=8, do_sample=False)
    model._is_fsdp_managed_module = True
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *args: 2)
    SinkCache(16, 4).bind(model)  # which reads it again, as it was changed
    passes = count_passes(model)
    Others(monkeypatch, steps=20, prompt_passes=9)
    tokens = generate(model, 16, 4, input_ids=prompt(30), max_new_tokens=8, do_sample=False)
    assert torch.equal(tokens, expected) and len(passes) == 9 + 7 + 20 - 8


def test_ranks_without_a_process_group_fail_before_a_forward_pass():
    model, cache = small_model(), SinkCache(16, 4)
    cache.bind(model)
    passes = count_passes(model)
    with pytest.raises(ValueError, match="process group has not been initialized"):
        generate(model, input_ids=prompt(30), past_key_values=cache, max_new_tokens=8, synced_gpus=True)
    assert passes == [] and cache.get_seq_length() == 0


def a_rank(number: int, folder: str) -> None:
    """Answer two turns as one of two processes, with each kind of model; write down what was said."""
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    sharded, waiting = small_model(), small_model()
    torch.distributed.fsdp.fully_shard(sharded, reshard_after_forward=True)  # its embeddings too
    for layer in waiting.model.layers:  # as in a sharded model, each layer waits for all ranks
        layer.register_forward_pre_hook(lambda *args: torch.distributed.all_reduce(torch.zeros(1)))
    for name, model in {"sharded": sharded, "waiting": waiting}.items():
        said, cache, conversation = [], SinkCache(16, 4), prompt(0)
        for prompt_length, max_new_tokens in turns_of(number):
            ids = torch.cat([conversation, prompt(prompt_length, seed=number)], dim=1)
            conversation = answer(model, cache, ids, max_new_tokens, synced_gpus=True).sequences
            said.append(conversation)
        torch.save(said, f"{folder}/{name}-{number}")
    torch.distributed.destroy_process_group()


def turns_of(number: int) -> list[tuple[int, int]]:
    """How many tokens are given, and how many are said, in each turn."""
    return [[(10, 8), (3, 30)], [(40, 30), (25, 2)]][number]


@pytest.mark.slow
def test_two_processes(tmp_path):
    run_ranks(a_rank, str(tmp_path))
    for number in range(2):
        model, cache, conversation = small_model(), SinkCache(16, 4), prompt(0)
        said = zip(*(torch.load(tmp_path / f"{name}-{number}") for name in ("sharded", "waiting")))
        for both, (prompt_length, max_new_tokens) in zip(said, turns_of(number)):
            ids = torch.cat([conversation, prompt(prompt_length, seed=number)], dim=1)
            conversation = answer(model, cache, ids, max_new_tokens).sequences
            assert all(torch.equal(sequences, conversation) for sequences in both)
