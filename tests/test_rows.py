"""Rows of a padded batch live on their own: each streams as it would alone."""

import pytest
import torch

from custom_generate.generate import CACHE, SinkCache, generate
from tests.support.helpers import at_the_ends, left_padded, on_the_newest, prompt, small_model
from tests.support.oracle import difference


# Each pair of lengths, a window, and an attention with a trained length is in one of these.
@pytest.mark.parametrize(
    "lengths, window, attn_implementation, trained_length",
    [
        ((3, 7, 1, 12), (16, 4), "sdpa", 16),
        ((1, 40, 16, 17), (16, 0), "sdpa", 512),
        on_the_newest((3, 7, 1, 12), (16, 0), "eager", 16),
        on_the_newest((3, 7, 1, 12), (16, 15), "sdpa", 512),
        on_the_newest((1, 40, 16, 17), (16, 15), "sdpa", 16),
        on_the_newest((1, 40, 16, 17), (16, 4), "eager", 16),
        on_the_newest((5, 5), (16, 4), "sdpa", 512),
        on_the_newest((5, 5), (16, 0), "sdpa", 16),
        on_the_newest((5, 5), (16, 15), "eager", 16),
    ],
    ids=str,
)
def test_each_row_as_if_alone(lengths, window, attn_implementation, trained_length):
    model = small_model(attn_implementation=attn_implementation, max_position_embeddings=trained_length)
    prompts = [prompt(length, seed=row) for row, length in enumerate(lengths)]
    settings = dict(
        max_new_tokens=30, do_sample=False, prefill_chunk_size=1, return_dict_in_generate=True, output_logits=True
    )
    batch = generate(model, *window, **left_padded(prompts), **settings)
    for row, ids in enumerate(prompts):
        alone = generate(model, *window, input_ids=ids, **settings)
        assert torch.equal(batch.sequences[row, -30:], alone.sequences[0, -30:])
        assert difference(torch.stack(batch.logits)[:, row], torch.cat(alone.logits)) < 1e-5


@pytest.mark.newest_only
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_each_row_as_if_alone_in_half_precision(dtype):
    # Up to and with the first token that is another, if one is: there, rounding decided between two.
    model = small_model(num_hidden_layers=3, max_position_embeddings=16).to(dtype)
    prompts = [prompt(length, seed=row) for row, length in enumerate((3, 7, 1, 40))]
    settings = dict(
        max_new_tokens=36, do_sample=False, prefill_chunk_size=1, return_dict_in_generate=True, output_logits=True
    )
    batch = generate(model, 16, 4, **left_padded(prompts), **settings)
    for row, ids in enumerate(prompts):
        alone = generate(model, 16, 4, input_ids=ids, **settings)
        others = (batch.sequences[row, -36:] != alone.sequences[0, -36:]).nonzero().flatten().tolist()
        steps = slice(0, others[0] + 1 if others else 36)
        logits = torch.stack(batch.logits)[:, row].float()
        assert difference(logits[steps], torch.cat(alone.logits).float()[steps]) < 4 * torch.finfo(dtype).eps
        assert steps.stop > 20


@pytest.mark.ends_only
def test_a_padded_prompt_that_the_window_holds_at_once():
    model = small_model()
    prompts = [prompt(length, seed=length) for length in (3, 12)]
    settings = dict(max_new_tokens=36, do_sample=False)
    batch = generate(model, 16, 4, **left_padded(prompts), **settings)
    for row, ids in enumerate(prompts):
        assert torch.equal(batch[row, -36:], generate(model, 16, 4, input_ids=ids, **settings)[0, -36:])


def test_padding_found_by_transformers_itself():
    # No mask given: transformers takes leading pad tokens for padding.
    model = small_model(eos_token_id=210)
    prompts = [prompt(length, seed=length) for length in (3, 12)]
    inputs = left_padded(prompts)
    settings = dict(max_new_tokens=30, min_new_tokens=30, do_sample=False)
    masked = generate(model, 16, 4, **inputs, **settings)
    assert torch.equal(generate(model, 16, 4, input_ids=inputs["input_ids"], **settings), masked)


def test_beams_of_padded_rows():
    model = small_model()
    prompts = [prompt(length, seed=length) for length in (3, 12)]
    settings = dict(max_new_tokens=40, do_sample=False, num_beams=3)
    batch = generate(model, 16, 4, **left_padded(prompts), **settings)
    for row, ids in enumerate(prompts):
        assert torch.equal(batch[row, -40:], generate(model, 16, 4, input_ids=ids, **settings)[0, -40:])


@pytest.mark.ends_only
def test_rows_keep_their_own_count_when_the_batch_is_rearranged():
    model = small_model(max_position_embeddings=16)
    settings = dict(do_sample=False, return_dict_in_generate=True)
    inputs = left_padded([prompt(length, seed=length) for length in (3, 12, 7)])
    straight = generate(model, 16, 4, **inputs, max_new_tokens=40, **settings).sequences
    for stop in (2, 20):  # while the rows are still filling, and after
        first = generate(model, 16, 4, **inputs, max_new_tokens=stop, **settings)
        rows = torch.tensor([2, 0, 1, 0])
        first[CACHE].batch_select_indices(rows)
        mask = torch.cat([inputs["attention_mask"], torch.ones(3, stop, dtype=torch.long)], dim=1)
        rest = generate(
            model,
            input_ids=first.sequences[rows],
            attention_mask=mask[rows],
            past_key_values=first[CACHE],
            max_new_tokens=40 - stop,
            **settings,
        )
        assert torch.equal(rest.sequences, straight[rows])


@pytest.mark.parametrize(
    "updates", [[10, *[1] * 42], at_the_ends([12, 1, 4, 4, *[1] * 31])], ids=["one by one", "several"]
)
def test_padded_rows_in_a_prepared_loop(updates):
    model = small_model(max_position_embeddings=20)
    rows = [prompt(length + 40, seed=length) for length in (3, 12)]
    inputs = left_padded(rows)
    both = SinkCache(16, 4).bind(model)
    logits, seen = [], 0
    with torch.no_grad():
        for ids in inputs["input_ids"].split(updates, dim=1):
            seen += ids.shape[1]
            logits.append(model(**both.prepare_inputs(ids, inputs["attention_mask"][:, :seen])).logits)
        for row, ids in enumerate(rows):
            alone, first = SinkCache(16, 4).bind(model), 52 - ids.shape[1]
            expected = []
            for start, length in zip(torch.tensor(updates).cumsum(0) - torch.tensor(updates), updates):
                part = inputs["input_ids"][row, None, max(int(start), first) : int(start) + length]
                if part.shape[1] > 0:
                    expected.append(model(**alone.prepare_inputs(part)).logits[0])
            assert difference(torch.cat(logits, dim=1)[row, first:], torch.cat(expected)) < 1e-5


@pytest.mark.parametrize("lengths", [on_the_newest((3, 7, 1, 12)), on_the_newest((60, 55)), (1, 40, 16, 17)], ids=str)
def test_each_row_as_if_alone_in_default_chunks(lengths):
    # Rows fill their windows at different times, within one update too.
    model = small_model(max_position_embeddings=40)
    prompts = [prompt(length, seed=row) for row, length in enumerate(lengths)]
    settings = dict(max_new_tokens=20, do_sample=False, return_dict_in_generate=True, output_logits=True)
    for chunk_size in (None, 9):
        batch = generate(model, 16, 4, **left_padded(prompts, padding=7), prefill_chunk_size=chunk_size, **settings)
        for row, ids in enumerate(prompts):
            alone = generate(model, 16, 4, input_ids=ids, **settings)
            assert torch.equal(batch.sequences[row, -20:], alone.sequences[0, -20:])
            assert difference(torch.stack(batch.logits)[:, row], torch.cat(alone.logits)) < 1e-5


def test_the_chunks_of_a_long_prompt():
    # What the window holds at once, then so many that the copies of their sinks take three quarters of a window.
    model = small_model()
    seen = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    output = generate(model, 16, 4, input_ids=prompt(40), max_new_tokens=2, return_dict_in_generate=True)
    hook.remove()
    assert seen == [16] + [3] * 8 + [1]
    assert output[CACHE].get_seq_length() == 41
