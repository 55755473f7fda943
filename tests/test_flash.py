"""Attention that takes no mask, as flash attention, streams one row token by token past the window."""

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AttentionInterface

from custom_generate.generate import SinkCache, generate
from tests.support.helpers import RELEASE, left_padded, prompt, small_model, stream
from tests.support.oracle import difference, oracle

pytestmark = [
    pytest.mark.ends_only,
    pytest.mark.skipif(RELEASE < Version("4.54"), reason="until 4.53 models hand masks to any stand-in"),
]


def attention_without_masks(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Causal attention whose last query sees all keys: what flash attention computes, for machines without it."""
    assert attention_mask is None
    key, value = (states.repeat_interleave(module.num_key_value_groups, dim=1) for states in (key, value))
    length, num_keys = query.shape[2], key.shape[2]
    weights = query @ key.mT * scaling
    weights = weights.masked_fill(torch.ones(length, num_keys).triu(num_keys - length + 1).bool(), -torch.inf)
    return (weights.softmax(dim=-1) @ value).transpose(1, 2), None


@pytest.fixture
def model():
    AttentionInterface.register("flash_stand_in", attention_without_masks)
    model = small_model(max_position_embeddings=40)
    model.config._attn_implementation = "flash_stand_in"
    return model


def test_a_long_prompt_goes_in_token_by_token_with_a_warning(model, monkeypatch):
    warned = []
    logger = transformers.logging.get_logger("custom_generate.generate")
    monkeypatch.setattr(type(logger), "warning_once", lambda self, message: warned.append(message))
    output = stream(model, prompt(40), 20)
    expected = oracle(small_model(), output.sequences[0].tolist(), 16, 4)[39:-1]
    assert difference(torch.cat(output.logits), expected) < 1e-5
    assert len(warned) == 1 and "token by token" in warned[0] and '"sdpa"' in warned[0]


def test_several_tokens_that_evict_are_refused_in_a_loop_of_ones_own(model):
    cache = SinkCache(16, 4).bind(model)
    with torch.no_grad():
        model(**cache.prepare_inputs(prompt(10)))
        with pytest.raises(ValueError, match='These 7 tokens evict some.*one token at a time.*"sdpa"'):
            cache.prepare_inputs(prompt(7))
        model(**cache.prepare_inputs(prompt(6)))
        for token in prompt(5)[0]:
            model(**cache.prepare_inputs(token[None, None]))


def test_padded_rows_are_refused(model):
    with pytest.raises(ValueError, match='`attention_mask` has padding.*"sdpa"'):
        generate(model, 16, 4, **left_padded([prompt(9), prompt(3)]), max_new_tokens=3)


def test_drafts_are_refused(model):
    with pytest.raises(ValueError, match='`prompt_lookup_num_tokens` checks several tokens at once.*"sdpa"'):
        generate(model, 16, 4, input_ids=prompt(5), max_new_tokens=5, prompt_lookup_num_tokens=3)
