"""Modes of torch and accelerate that a program may be in, or only in some turns: a stream is the same in all."""

import ast
import copy
import itertools

import accelerate
import pytest
import torch

from custom_generate.generate import CACHE, SinkCache, generate
from tests.support import ROOT
from tests.support.helpers import answer, left_padded, prompt, small_model
from tests.support.oracle import difference, oracle
from tests.test_hybrids import SERVED, hybrid

pytestmark = pytest.mark.newest_only


def turns(model, *modes, cache=None):
    """The tokens, and the logits of the last, of a turn in each mode."""
    cache = SinkCache(16, 4) if cache is None else cache
    sequences = prompt(0)
    for turn, mode in enumerate(modes):
        ids = torch.cat([sequences, prompt(5, seed=turn)], dim=1)
        with mode:
            output = answer(model, cache, ids)
        sequences = output.sequences
    return sequences, torch.cat(output.logits).float()


def test_inference_mode_in_some_turns(tmp_path):
    model = small_model(max_position_embeddings=20)
    plain, inference = torch.no_grad(), torch.inference_mode()
    cache = SinkCache(16, 4)
    tokens, _ = turns(model, plain, inference, plain, inference, inference, plain, cache=cache)
    assert torch.equal(tokens, turns(model, *[plain] * 6)[0])
    with inference:
        cache.batch_select_indices(torch.tensor([0]))
        prepared = SinkCache(16, 4).bind(model)
        model(**prepared.prepare_inputs(tokens[:, :16]))
    cache.save(tmp_path / "conversation")
    for resumed in (copy.deepcopy(cache), SinkCache.load(tmp_path / "conversation", model), cache, prepared):
        ids = torch.cat([tokens, prompt(3)], dim=1)[:, : resumed.get_seq_length() + 3]
        generate(model, input_ids=ids, past_key_values=resumed, max_new_tokens=20)


def test_autocast_in_some_turns():
    model, plain, cache = small_model(), torch.no_grad(), SinkCache(16, 4)
    autocast = torch.autocast("cpu", torch.bfloat16)
    tokens, logits = turns(model, autocast, plain, autocast, plain, cache=cache)
    assert {layer.keys.dtype for layer in cache.layers} == {torch.float32}
    # What the turn in bfloat16 left in the window is rounded, and that the turn after it sees.
    assert difference(logits, oracle(model, tokens[0].tolist(), 16, 4)[79:-1]) < 5e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_conversation_goes_on_in_another_dtype(dtype, tmp_path):
    model, cache = small_model(), SinkCache(16, 4)
    tokens, _ = turns(model, torch.no_grad(), cache=cache)
    cache.save(tmp_path / "conversation")
    cache = SinkCache.load(tmp_path / "conversation", model.to(dtype))
    ids = torch.cat([tokens, prompt(3)], dim=1)
    output = answer(model, cache, ids)
    expected = oracle(small_model(), output.sequences[0].tolist(), 16, 4)[27:-1]
    assert difference(torch.cat(output.logits).float(), expected) < 5e-2


def test_another_device_by_default():
    """As `torch.set_default_device("cuda")`, with a device that nothing can be mixed with."""
    model = small_model(max_position_embeddings=20)
    inputs = left_padded([prompt(9), prompt(30), prompt(9)])
    settings = dict(max_new_tokens=30, do_sample=False)
    expected = generate(small_model(max_position_embeddings=20), 16, 4, **inputs, **settings)
    ids = prompt(30, rows=2)
    alike = generate(small_model(max_position_embeddings=20), 16, 4, input_ids=ids, **settings)
    torch.set_default_device("meta")
    try:
        assert torch.equal(generate(model, 16, 4, **inputs, **settings), expected)
        assert torch.equal(generate(model, 16, 4, input_ids=ids, **settings), alike)
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_another_dtype_by_default(dtype, tmp_path):
    settings = dict(max_new_tokens=40, do_sample=False)  # past a window of 16, and the trained length of 20
    batches = [dict(input_ids=prompt(9)), left_padded([prompt(9), prompt(30), prompt(9)])]
    settings |= dict(return_dict_in_generate=True)
    expected = [generate(small_model(max_position_embeddings=20), 16, 4, **inputs, **settings) for inputs in batches]
    model = small_model(max_position_embeddings=20)
    torch.set_default_dtype(dtype)
    try:
        for inputs, output in zip(batches, expected):
            cache = SinkCache(16, 4)
            assert torch.equal(generate(model, past_key_values=cache, **inputs, **settings).sequences, output.sequences)
            assert cache.nbytes == output[CACHE].nbytes
            assert {layer.keys.dtype for layer in cache.layers} == {torch.float32}
            cache.save(tmp_path / "conversation")
            SinkCache.load(tmp_path / "conversation", model).batch_repeat_interleave(2)
    finally:
        torch.set_default_dtype(torch.float32)


def test_every_tensor_that_is_made_says_its_dtype_and_device():
    tree = ast.parse((ROOT / "custom_generate/generate.py").read_text())
    makers = {"tensor", "zeros", "ones", "empty", "full", "arange"}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    made = [call for call in calls if ast.unparse(call.func) in {f"torch.{maker}" for maker in makers}]
    assert len(made) > 10
    for call in made:
        assert {"dtype", "device"} <= {keyword.arg for keyword in call.keywords}, ast.unparse(call)


@pytest.mark.parametrize("read", ["before", "after"])
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_weights_that_are_elsewhere_until_they_are_needed(where, read, tmp_path):
    model, inputs = small_model(), left_padded([prompt(9), prompt(30)])
    settings = dict(max_new_tokens=30, do_sample=False)
    expected = generate(small_model(), 16, 4, **inputs, **settings)
    if read == "before":
        SinkCache(16, 4).bind(model)
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device="cpu")
    else:  # as `device_map` does where memory is short
        device_map = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
        device_map |= {f"model.layers.{layer}": "disk" if layer else "cpu" for layer in range(2)}
        accelerate.dispatch_model(model, device_map, main_device="cpu", offload_dir=tmp_path / "weights")
    cache = SinkCache(16, 4)
    tokens = generate(model, past_key_values=cache, **inputs, **settings)
    assert torch.equal(tokens, expected)
    cache.save(tmp_path / "conversation")
    ids = torch.cat([tokens, prompt(3, rows=2)], dim=1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 33, dtype=torch.long)], dim=1)
    turns = [
        generate(model, input_ids=ids, attention_mask=mask, past_key_values=resumed, **settings)
        for resumed in (SinkCache.load(tmp_path / "conversation", model), cache)
    ]
    assert torch.equal(*turns)


MODES = {"no_grad": torch.no_grad, "inference": torch.inference_mode, "grad": torch.enable_grad}


ORDERS = list(itertools.permutations(MODES))
ORDERED = [("llama", modes) for modes in ORDERS]
ORDERED += [(name, modes) for name in ("gemma3_text", "qwen3_next") if name in SERVED for modes in ORDERS[::5]]


@pytest.mark.parametrize("name, modes", ORDERED, ids=str)
def test_each_operation_in_any_mode(name, modes, tmp_path):
    # Nothing is written into what was made in another mode, and nothing keeps a graph.
    settings = dict(max_position_embeddings=20)  # positions are lowered every few tokens
    model = small_model(**settings) if name == "llama" else hybrid(name, **settings)
    cache, tokens, logits = SinkCache(16, 4).bind(model), prompt(90), []
    turns = itertools.cycle(MODES[mode] for mode in modes)
    updates = [9, 9, 1, 1, 7, 1, 1, 1, 9, 1, 1, 9, 5, 1, 1, 9, 1, 1, 12, 1, 9]
    for number, update in enumerate(tokens.split(updates, dim=1)):
        with next(turns)():
            logits.append(model(**cache.prepare_inputs(update)).logits[0].detach())
        with next(turns)():
            cache = copy.deepcopy(cache)
            cache.reorder_cache(torch.tensor([0]))
        if name == "llama" and update.shape[1] > 4:
            with next(turns)():
                cache.crop(-3)
                logits[-1] = logits[-1][:-3]
            with next(turns)():
                logits.append(model(**cache.prepare_inputs(update[:, -3:])).logits[0].detach())
        if number % 5 == 0:
            with next(turns)():
                cache.save(tmp_path / "conversation")
            with next(turns)():
                cache = SinkCache.load(tmp_path / "conversation", model)
    assert difference(torch.cat(logits), oracle(model, tokens[0].tolist(), 16, 4)) < 1e-5
