"""What a decoding step asks of a device, seen without one: on "meta", whose tensors have no numbers to wait for."""

import collections
import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache

from custom_generate.generate import CACHE, SinkCache
from tests.support.helpers import left_padded, prompt, small_model

pytestmark = pytest.mark.newest_only

BATCHES = {
    "one row": dict(input_ids=prompt(30)),
    "rows": dict(input_ids=prompt(30, rows=3)),
    "padded rows": left_padded([prompt(30), prompt(9, seed=1), prompt(2, seed=2)]),
}


class Operations(TorchDispatchMode):
    """Counts what a device does: `kernels` that compute there, and `copies` that it gets from the CPU."""

    def __init__(self):
        super().__init__()
        self.kernels, self.copies = collections.Counter(), collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        inputs = {leaf.device.type for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        outputs = {leaf.device.type for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)}
        if "meta" in outputs and not function.is_view:
            (self.copies if inputs == {"cpu"} else self.kernels)[str(function)] += 1
        return output


def a_full_window(batch: dict[str, torch.Tensor], **settings):
    """A model on the device "meta", and a cache that saw 39 tokens there: its window is full in some of the rows."""
    model = small_model(**settings)
    cache = SinkCache(16, 4).bind(model)  # which reads numbers
    model.to("meta")
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    with torch.no_grad():
        model(**cache.prepare_inputs(ids.to("meta"), mask))
        for _ in range(9):
            model(**cache.prepare_inputs(prompt(1, rows=len(ids)).to("meta")))
    return model, cache


@pytest.mark.parametrize("name", BATCHES)
def test_a_step_never_waits_and_mixes_no_devices(name):
    # What asks "meta" for numbers fails, and so does what computes with tensors there and on the CPU.
    model, cache = a_full_window(BATCHES[name])
    token = prompt(1, rows=cache.batch_size).to("meta")
    for step in range(100):  # through a shift of the sinks for each row, and past it; and through a digest of ids
        counting = Operations() if step > 97 else contextlib.nullcontext()
        with torch.no_grad(), counting as operations:
            logits = model(**cache.prepare_inputs(token)).logits
    assert logits.device.type == "meta"
    assert cache.get_seq_length() == 39 + 100
    # Positions, the moved sinks' rotation; and where rows are padded the slots.
    assert sum(operations.copies.values()) <= (6 if name == "padded rows" else 3)


def test_beams_do_not_wait_either():
    model, cache = a_full_window(BATCHES["rows"])
    for _ in range(3):
        with torch.no_grad():
            model(**cache.prepare_inputs(prompt(1, rows=3).to("meta")))
        cache.reorder_cache(torch.tensor([1, 1, 0]).to("meta"))


def test_it_would_be_seen():
    with pytest.raises((NotImplementedError, RuntimeError)):
        torch.ones(2, device="meta").tolist()
    with pytest.raises((NotImplementedError, RuntimeError)):
        torch.ones(2, device="meta") + torch.ones(2)


@pytest.mark.parametrize("name", BATCHES)
def test_a_step_launches_few_kernels_more_than_a_dynamic_cache(name):
    model, cache = a_full_window(BATCHES[name], num_hidden_layers=3)
    token = prompt(1, rows=cache.batch_size).to("meta")
    dynamic = DynamicCache(config=model.config)
    with torch.no_grad():
        model(prompt(15, rows=cache.batch_size).to("meta"), **{CACHE: dynamic})
        with Operations() as operations:
            model(**cache.prepare_inputs(token))
        with Operations() as plain_operations:
            model(token, **{CACHE: dynamic}, position_ids=torch.zeros_like(token))
    own, plain = operations.kernels, plain_operations.kernels
    # Sinks are moved once for all layers, ids are copied, and rows that are padded need a mask: no more, however many
    # layers there are.
    assert own.total() <= plain.total() + (8 if name == "padded rows" else 2), (own - plain, plain - own)
