"""Two processes that have a share of the heads of each layer (`tp_plan="auto"`) say what one with all of them says."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from custom_generate.generate import SinkCache, generate
from tests.support.helpers import left_padded, prompt, small_model
from tests.support.ranks import run_ranks

pytestmark = [pytest.mark.slow, pytest.mark.newest_only]


def say(model) -> dict[str, torch.Tensor]:
    """Past a window of 16: beams in a padded batch, a window of 8 bits, and two turns in one cache."""
    beams = dict(num_beams=2, do_sample=False, max_new_tokens=16)
    batch = generate(model, 16, 4, **left_padded([prompt(30), prompt(9, seed=1)]), **beams)
    coded = generate(model, 16, 4, kv_bits=8, input_ids=prompt(20), max_new_tokens=16, do_sample=False)
    cache, ids = SinkCache(16, 4), prompt(20)
    for seed in range(2):
        settings = dict(past_key_values=cache, max_new_tokens=16, do_sample=False)
        ids = torch.cat([generate(model, input_ids=ids, **settings), prompt(5, seed=seed)], dim=1)
    return {"beams": batch, "8 bits": coded, "turns": ids, "cache": cache}


def a_rank(number: int, folder: str) -> None:
    """Write down what one of two processes says, and of whose files it can load a conversation."""
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/model", tp_plan="auto")
    said = say(model)
    cache = said.pop("cache")
    said["heads"] = {keys.shape[1] for keys in cache.key_cache}
    cache.save(f"{folder}/conversation-{number}")
    torch.distributed.barrier()
    said["loaded"] = [can_load(f"{folder}/conversation-{other}", model) for other in range(2)]
    torch.save(said, f"{folder}/said-{number}")
    torch.distributed.destroy_process_group()


def can_load(path: str, model) -> bool:
    try:
        return SinkCache.load(path, model).get_seq_length() > 0
    except ValueError as error:
        assert "another model" in str(error)
        return False


def test_two_processes_and_their_files(tmp_path):
    small_model("qwen3").save_pretrained(tmp_path / "model")
    run_ranks(a_rank, str(tmp_path))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    expected = say(model)
    for number in range(2):
        said = torch.load(Path(tmp_path, f"said-{number}"))
        for name in ("beams", "8 bits", "turns"):
            assert torch.equal(said[name], expected[name])
        assert said["heads"] == {1}  # of two
        assert said["loaded"] == [other == number for other in range(2)]
        assert not can_load(str(tmp_path / f"conversation-{number}"), model)
