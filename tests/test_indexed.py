"""Attention that chooses its tokens by an index: it chooses among those that are kept, as one pass over them does."""

import copy

import pytest
import torch
from transformers import cache_utils

from custom_generate.generate import CACHE, IndexedLayer, SinkCache, generate
from tests.support.helpers import at_the_ends, left_padded, prompt, stream
from tests.support.oracle import difference, oracle

pytestmark = pytest.mark.skipif(
    not hasattr(cache_utils, "DynamicIndexedLayer"), reason="this release caches no keys of an index"
)

NAMES = ["deepseek_v32", "glm_moe_dsa", "axk2", "hy_v4"]


def indexed(name="deepseek_v32", index_topk=8, length=512):
    """A tiny model whose index chooses so many tokens; trained to `length` of them."""
    from tools.architectures import build

    return build(name, length, {"index_topk": index_topk, "index_n_heads": 32})


def expected(name, output, length, **settings):
    """The logits of the oracle for what was generated after a prompt of that length."""
    return oracle(indexed(name, **settings), output.sequences[0].tolist(), 16, 4)[length - 1 : -1]


OTHERS = [("deepseek_v32", 2, 3), ("glm_moe_dsa", 64, 3), ("axk2", 8, 3), ("hy_v4", 2, 40), ("deepseek_v32", 64, 40)]


@pytest.mark.parametrize(
    "name, index_topk, length", [*((name, 8, 40) for name in NAMES), *(at_the_ends(*case) for case in OTHERS)]
)
def test_every_step_while_positions_are_shifted_back(name, index_topk, length):
    model = indexed(name, index_topk, length=24)
    # Where no token's scores are all 0: there, transformers chooses by chance.
    output = stream(model, prompt(length, seed=7), 24 if length > 16 else 40, seed=7)
    assert any(isinstance(layer, IndexedLayer) for layer in output[CACHE].layers)
    assert difference(torch.cat(output.logits), expected(name, output, length, index_topk=index_topk)) < 1e-5


@pytest.mark.parametrize("prefill_chunk_size", [at_the_ends(1), 3, at_the_ends(12)])
def test_a_long_prompt_in_chunks(prefill_chunk_size):
    model = indexed()
    output = stream(model, prompt(40), 8, prefill_chunk_size=prefill_chunk_size)
    assert difference(torch.cat(output.logits), expected("deepseek_v32", output, 40)) < 1e-5


@pytest.mark.ends_only
def test_each_row_as_if_alone():
    model = indexed(length=24)
    prompts = [prompt(length, seed=length) for length in (30, 9, 2, 17)]
    settings = dict(max_new_tokens=40, do_sample=False, return_dict_in_generate=True, output_logits=True)
    batch = generate(model, 16, 4, **left_padded(prompts), **settings)
    for row, ids in enumerate(prompts):
        alone = generate(model, 16, 4, input_ids=ids, **settings)
        assert torch.equal(batch.sequences[row, -40:], alone.sequences[0, -40:])
        assert difference(torch.stack(batch.logits)[:, row], torch.cat(alone.logits)) < 1e-5


@pytest.mark.ends_only
def test_beams_follow_their_hypotheses():
    model = indexed()
    settings = dict(num_beams=3, do_sample=False, return_dict_in_generate=True, output_logits=True)
    output = generate(model, 16, 4, input_ids=prompt(20), max_new_tokens=30, **settings)
    logits = torch.stack([step[beam] for step, beam in zip(output.logits, output.beam_indices[0].tolist())])
    assert difference(logits, expected("deepseek_v32", output, 20)) < 1e-5


@pytest.mark.ends_only
def test_turns_copies_and_files_are_one_stream(tmp_path):
    model, cache = indexed(length=24), SinkCache(16, 4)
    settings = dict(max_new_tokens=20, do_sample=False)
    ids = torch.cat([generate(model, input_ids=prompt(20), past_key_values=cache, **settings), prompt(5, seed=1)], 1)
    cache.save(tmp_path / "conversation")
    caches = [copy.deepcopy(cache), SinkCache.load(tmp_path / "conversation", model), cache]
    said = [generate(model, input_ids=ids, past_key_values=each, **settings) for each in caches]
    assert torch.equal(said[0], said[1]) and torch.equal(said[0], said[2])
    assert torch.equal(said[0], generate(model, 16, 4, input_ids=ids, **settings))


@pytest.mark.parametrize("length", [at_the_ends(10), 30])
def test_tokens_taken_back(length):
    model = indexed(length=24)
    cache, untouched = SinkCache(16, 4).bind(model), SinkCache(16, 4).bind(model)
    with torch.no_grad():
        for each in (cache, untouched):
            for token in prompt(length).split(1, dim=1):
                model(**each.prepare_inputs(token))
        model(**cache.prepare_inputs(prompt(5, seed=1)))
        cache.crop(-5)
        for token in prompt(20, seed=2).split(4, dim=1):
            logits, others = (model(**each.prepare_inputs(token)).logits[0] for each in (cache, untouched))
            assert difference(logits, others) < 1e-5


def test_an_error_between_the_index_and_the_keys():
    model, cache = indexed(), SinkCache(16, 4)
    ids = generate(model, input_ids=prompt(20), past_key_values=cache, max_new_tokens=10, do_sample=False)
    layer = cache.layers[2]
    layer.update = None  # when its index has the token already
    with pytest.raises(TypeError):
        generate(model, input_ids=ids, past_key_values=cache, max_new_tokens=5, do_sample=False)
    del layer.update
    said = generate(model, input_ids=ids, past_key_values=cache, max_new_tokens=10, do_sample=False)
    assert torch.equal(said, generate(model, 16, 4, input_ids=ids, max_new_tokens=10, do_sample=False))


@pytest.mark.ends_only
def test_drafts_and_kept_conversations():
    model, ids = indexed(), prompt(20).repeat(1, 2)
    settings = dict(max_new_tokens=20, do_sample=False, eos_token_id=210, suppress_tokens=[210])
    for turn in range(2):
        said = generate(model, 16, 4, input_ids=ids, **settings)
        assert torch.equal(said, generate(model, 16, 4, input_ids=ids, prompt_lookup_num_tokens=3, **settings))
        assert torch.equal(said, generate(model, 16, 4, input_ids=ids, kept_conversations=1, **settings))
        ids = torch.cat([said, prompt(7, seed=turn)], dim=1)


def test_the_memory_of_the_index_counts():
    model = indexed()
    cache = stream(model, prompt(20))[CACHE]
    with_index = cache.nbytes
    for layer in cache.layers:
        with_index -= layer.indexer.keys.nbytes
    assert 0 < with_index < cache.nbytes
