"""What a step makes, masks too, is as large after many columns as after few."""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from custom_generate.generate import SinkCache, chunks_of_prompt
from tests.support.helpers import prompt, small_model
from tests.test_hybrids import SERVED, hybrid

pytestmark = pytest.mark.newest_only

MODELS = ["llama", *(name for name in ("gemma3_text", "llama4_text", "falcon_h1") if name in SERVED)]


class Weighing(TorchDispatchMode):
    """Notes the shape of each tensor that is made."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        self.shapes |= {tuple(leaf.shape) for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)}
        return output


@pytest.mark.parametrize("name", MODELS)
def test_what_steps_make(name):
    model, pads = small_model(num_hidden_layers=1) if name == "llama" else hybrid(name), [0, 9]
    cache, early, late = SinkCache(16, 4).bind(model), Weighing(), Weighing()
    mask = (torch.arange(30) >= torch.tensor(pads)[:, None]).long()
    with torch.no_grad():
        model(**cache.prepare_inputs(prompt(30, rows=2), mask))
        for step, tokens in enumerate(prompt(215, rows=2, seed=1).split(1, dim=1)):
            # Ids are joined every 63 steps.
            with contextlib.nullcontext() if step < 75 else early if step < 145 else late:
                model(**cache.prepare_inputs(tokens))
    assert len(late.shapes) > 20 and late.shapes <= early.shapes


def test_what_cutting_a_prompt_takes():
    # By numbers alone: with a list that is summed for each chunk, this took as many steps as its square.
    stream = SinkCache(1024, 500).bind(small_model(max_position_embeddings=2048)).held
    assert len(chunks_of_prompt(stream, 200_000, True, 1, 1)) == 200_000
