"""Arguments that a stream takes otherwise than plain generation, or has to say something of."""

import functools

import numpy as np
import pytest
import torch
import transformers
from transformers import GenerationConfig, StoppingCriteriaList

from custom_generate.generate import CACHE, NEWER_NAME, OLDER_NAME, SinkCache, generate
from tests.support.helpers import prompt, small_model

pytestmark = pytest.mark.newest_only

SETTINGS = dict(max_new_tokens=40, do_sample=False)


def forward_passes(model) -> list:
    """A list that grows with each forward pass from now on."""
    passes: list = []
    model.register_forward_pre_hook(lambda *args: passes.append(args))
    return passes


# --- integers of other types


@pytest.mark.parametrize("integer", [np.int64, np.uint8, torch.tensor, np.array], ids=lambda integer: integer.__name__)
def test_integers_of_any_type(integer):
    cache = SinkCache(integer(16), integer(4))
    assert (cache.window_length, cache.num_sink_tokens) == (16, 4)
    assert type(cache.window_length) is type(cache.num_sink_tokens) is int
    model, call = small_model(), dict(input_ids=prompt(30), **SETTINGS)
    expected = generate(model, 16, 4, prefill_chunk_size=3, **call)
    for settings in (
        dict(window_length=integer(16), num_sink_tokens=integer(4)),
        dict(generation_config=GenerationConfig(window_length=integer(16), num_sink_tokens=integer(4), pad_token_id=0)),
        dict(past_key_values=cache, window_length=integer(16)),
    ):
        assert torch.equal(generate(model, prefill_chunk_size=integer(3), **settings, **call), expected)


@pytest.mark.parametrize(
    "value", [np.bool_(True), torch.tensor(True), np.float64(16), torch.tensor(16.0), "16"], ids=repr
)
def test_what_is_no_integer(value):
    with pytest.raises(TypeError, match="`window_length` must be an int"):
        SinkCache(value)
    with pytest.raises(TypeError, match="`num_sink_tokens` must be an int"):
        SinkCache(16, value)
    with pytest.raises(TypeError, match="`prefill_chunk_size` must be an int"):
        generate(small_model(), input_ids=prompt(5), prefill_chunk_size=value)


# --- a cache by its names


@pytest.mark.parametrize("name", [NEWER_NAME, OLDER_NAME])
def test_a_cache_by_each_of_its_names(name):
    model, cache = small_model(), SinkCache(16, 4)
    settings = dict(SETTINGS, return_dict_in_generate=True)
    output = generate(model, input_ids=prompt(30), **{name: cache}, **settings)
    assert output[CACHE] is cache
    turn = torch.cat([output.sequences, prompt(3)], dim=1)
    again = generate(model, input_ids=turn, **{name: cache}, **settings)
    assert torch.equal(again.sequences, generate(model, 16, 4, input_ids=turn, **SETTINGS))
    with pytest.raises(TypeError, match=f"`{CACHE}` must be this repository's `SinkCache`, got builtins.str"):
        generate(model, input_ids=turn, **{name: "static"}, **settings)


def test_a_cache_by_both_names():
    with pytest.raises(TypeError, match="`past_key_values` and `cache` are two names of one argument"):
        generate(small_model(), input_ids=prompt(5), cache=SinkCache(16, 4), past_key_values=SinkCache(16, 4))


class WithOlderNames(transformers.LlamaForCausalLM):
    """A model whose code was written before 5.24."""

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, **kwargs):
        assert past_key_values is not None
        return super().prepare_inputs_for_generation(input_ids, **{CACHE: past_key_values}, **kwargs)

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, **kwargs):
        assert past_key_values is not None
        kwargs |= dict(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids)
        return super().forward(**{CACHE: past_key_values}, **kwargs)


def test_a_model_that_knows_the_older_name_only():
    model = small_model()
    older = WithOlderNames(model.config).eval()
    older.load_state_dict(model.state_dict())
    for settings in (
        dict(input_ids=prompt(30)),
        dict(input_ids=prompt(30), prompt_lookup_num_tokens=3, eos_token_id=210),
    ):
        said = generate(older, 16, 4, **settings, **SETTINGS)
        assert torch.equal(said, generate(model, 16, 4, **settings, **SETTINGS))
    cache, ids = SinkCache(16, 4).bind(older), prompt(30)
    other = SinkCache(16, 4).bind(model)
    with torch.no_grad():
        for part in ids.split(3, dim=1):
            logits = older(**cache.prepare_inputs(part)).logits
            assert torch.equal(logits, model(**other.prepare_inputs(part)).logits)


# --- prompts


@pytest.mark.parametrize(
    "arguments",
    [
        dict(input_ids=prompt(0)),
        dict(inputs=prompt(0)),
        dict(input_ids=prompt(0, rows=3)),
        dict(input_ids=prompt(5)[:0]),
        dict(inputs_embeds=torch.zeros(1, 0, 64)),
        dict(input_ids=prompt(0), attention_mask=torch.ones(1, 0, dtype=torch.long)),
    ],
    ids=["input_ids", "inputs", "rows", "no row", "inputs_embeds", "masked"],
)
def test_a_prompt_of_nothing(arguments):
    model, cache = small_model(), SinkCache(16, 4)
    passes = forward_passes(model)
    with pytest.raises(ValueError, match=r"`inp\w+` must have a token of each row to go on from, got \[\d, \d+"):
        generate(model, past_key_values=cache, **arguments, **SETTINGS)
    assert passes == [] and not cache.is_bound


def test_nothing_new_in_a_conversation():
    model, cache = small_model(), SinkCache(16, 4)
    tokens = generate(model, input_ids=prompt(5), past_key_values=cache, **SETTINGS)
    for columns in (44, 45, 46):
        mask = torch.ones(1, columns, dtype=torch.long)
        with pytest.raises(ValueError, match="must have a token of each row to go on from"):
            generate(model, input_ids=prompt(0), attention_mask=mask, past_key_values=cache, **SETTINGS)
    assert cache.get_seq_length() == 44
    generate(model, input_ids=tokens, attention_mask=torch.ones_like(tokens), past_key_values=cache, **SETTINGS)


def test_embeddings_beside_ids_of_nothing():
    model = small_model()
    embeddings = model.get_input_embeddings()(prompt(5))
    tokens = generate(model, 16, 4, input_ids=prompt(0), inputs_embeds=embeddings, **SETTINGS)
    assert torch.equal(tokens, generate(model, 16, 4, inputs_embeds=embeddings, **SETTINGS))


def test_a_pad_token_in_a_prompt_without_a_mask():
    model, ids = small_model(), prompt(8)
    ids[0, 4] = 0
    passes = forward_passes(model)
    SinkCache(16, 4).bind(model)
    passes.clear()
    with pytest.raises(ValueError, match="`attention_mask` was not given.*ones_like") as error:
        generate(model, 16, 4, input_ids=ids, **SETTINGS)
    assert "padding_side" not in str(error.value) and passes == []
    mask = torch.ones_like(ids)
    assert generate(model, 16, 4, input_ids=ids, attention_mask=mask, **SETTINGS).shape == (1, 48)
    mask[0, 4] = 0
    with pytest.raises(ValueError, match="`attention_mask` must be left padding only.*padding_side"):
        generate(model, 16, 4, input_ids=ids, attention_mask=mask, **SETTINGS)
    ids[0, :5] = 0  # which is left padding, with a mask or without
    padded = generate(model, 16, 4, input_ids=ids, **SETTINGS)
    assert torch.equal(padded, generate(model, 16, 4, input_ids=ids, attention_mask=ids.ne(0).long(), **SETTINGS))


def test_a_conversation_that_is_cropped_to_the_window():
    model, cache = small_model(), SinkCache(16, 4)
    tokens = generate(model, input_ids=prompt(5), past_key_values=cache, **SETTINGS)
    turn = torch.cat([tokens, prompt(3)], dim=1)
    with pytest.raises(ValueError, match=r"`input_ids` must be the whole.*Don't crop it to `get_max_length\(\)`"):
        generate(model, input_ids=turn[:, -cache.get_max_length() :], past_key_values=cache, **SETTINGS)
    assert generate(model, input_ids=turn, past_key_values=cache, **SETTINGS).shape == (1, 88)


# --- lengths that a model was trained on


def test_a_long_stream_is_not_said_to_be_beyond_the_model(monkeypatch):
    said = []
    criteria = transformers.generation.stopping_criteria
    monkeypatch.setattr(criteria.logger, "warning_once", said.append)
    model, call = small_model(max_position_embeddings=32), dict(input_ids=prompt(5), **SETTINGS)
    expected = generate(model, 16, 4, **call)
    assert said == []
    # What was handed over stays as it was.
    mine = transformers.MaxLengthCriteria(39, max_position_embeddings=32)
    tokens = generate(model, 16, 4, stopping_criteria=StoppingCriteriaList([mine]), **call)
    assert torch.equal(tokens, expected[:, :39]) and mine.max_position_embeddings == 32
    said.clear()
    model.generate(**call)
    assert "predefined maximum length" in said[0]


def test_20_tokens_by_default_however_long_the_conversation_is():
    model = small_model(max_position_embeddings=32)
    streamed = functools.partial(generate, model, 16, 4, do_sample=False)
    for length in (5, 30, 32, 40):
        expected = streamed(input_ids=prompt(length), max_new_tokens=20)
        assert torch.equal(streamed(input_ids=prompt(length)), expected)
    config = GenerationConfig(max_length=25, pad_token_id=0)
    assert streamed(input_ids=prompt(10), generation_config=config).shape == (1, 25)
    assert streamed(input_ids=prompt(10), max_length=25).shape == (1, 25)
    model.generation_config.max_length = 32
    assert streamed(input_ids=prompt(10)).shape == (1, 32)
