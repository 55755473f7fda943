"""A cache knows the conversation that it holds: other ids are refused or taken back, wherever they differ."""

import copy
import pickle

import pytest
import torch

from custom_generate.generate import CACHE, SinkCache, Transcript, digest_of, generate
from tests.support.helpers import left_padded, prompt, small_model
from tests.support.oracle import difference, oracle

pytestmark = pytest.mark.ends_only

GREEDY = dict(max_new_tokens=12, do_sample=False, pad_token_id=0)


def edited(ids: torch.Tensor, column: int, row: int = 0) -> torch.Tensor:
    """`ids` with another token in one place."""
    ids = ids.clone()
    ids[row, column] = 2 + (ids[row, column] - 1) % 200
    return ids


def refuses(model, cache, ids: torch.Tensor, **kwargs) -> None:
    with pytest.raises(ValueError, match="are not the tokens that the `SinkCache` has seen"):
        generate(model, input_ids=ids, past_key_values=cache, **GREEDY, **kwargs)


def goes_on(model, cache, ids: torch.Tensor, **kwargs) -> None:
    """What is said in the cache is what is said where all is read anew."""
    expected = generate(model, 16, 4, input_ids=ids, **GREEDY, **kwargs)
    assert torch.equal(generate(model, input_ids=ids, past_key_values=cache, **GREEDY, **kwargs), expected)


def by_file(model, cache, folder):
    cache.save(folder / "conversation")
    return SinkCache.load(folder / "conversation", model)


WAYS = {
    "itself": lambda model, cache, folder: cache,
    "a copy": lambda model, cache, folder: copy.deepcopy(cache),
    "another process": lambda model, cache, folder: pickle.loads(pickle.dumps(cache)),
    "a file": by_file,
}


@pytest.mark.parametrize("way", WAYS)
def test_other_ids_anywhere_are_refused(way, tmp_path):
    model, cache = small_model(), SinkCache(16, 4)
    said = prompt(30)
    for turn in range(3):  # of all ids, then of the new ones alone
        given = said[:, cache.get_seq_length() if turn == 2 else 0 :]
        settings = dict(attention_mask=torch.ones_like(said), past_key_values=cache, **GREEDY)
        said = torch.cat([said, generate(model, input_ids=given, **settings)[:, given.shape[1] :]], dim=1)
        said = torch.cat([said, prompt(5, seed=turn)], dim=1)
    cache = WAYS[way](model, cache, tmp_path)
    mask = torch.ones_like(said)
    for column in (0, 29, 58, 59, 70):
        refuses(model, cache, edited(said, column), attention_mask=mask)
    assert cache.get_seq_length() == 75  # nothing was taken back
    goes_on(model, cache, said, attention_mask=mask)


def test_rows_of_a_padded_batch_in_another_order():
    model, cache = small_model(), SinkCache(16, 4)
    inputs = left_padded([prompt(length, seed=length) for length in (3, 12, 30)])
    said = generate(model, **inputs, past_key_values=cache, **GREEDY)
    order = torch.tensor([2, 0, 1])
    cache.reorder_cache(order)
    cache.batch_repeat_interleave(2)
    order = order.repeat_interleave(2)
    said = torch.cat([said[order], prompt(3, rows=6)], dim=1)
    mask = torch.cat([inputs["attention_mask"][order], torch.ones(6, 15, dtype=torch.long)], dim=1)
    for row, column in ((0, 0), (2, 27), (4, 18), (5, 24), (3, 39)):
        refuses(model, cache, edited(said, column, row), attention_mask=mask)
    said[2:4, :27] = 7  # padding is no token
    goes_on(model, cache, said, attention_mask=mask)


def test_beams_and_their_rows():
    model, cache = small_model(), SinkCache(16, 4)
    settings = dict(num_beams=3, num_return_sequences=3, past_key_values=cache, **GREEDY)
    generate(model, input_ids=prompt(30), **settings)
    known = cache.held.transcript
    assert known.end == 41 and known.digested == 25 and len(known.digest) == 3
    assert torch.equal(known.digest, digest_of(prompt(30)[:, :25], 0, [0]).expand(3))


# --- what is taken back


@pytest.mark.parametrize("back", [3, 20, 29])
def test_an_edit_within_an_update_longer_than_the_window(back):
    model, cache, said = small_model(), SinkCache(16, 4), prompt(76)  # in updates of 16, 30 and 30 tokens
    generate(model, input_ids=said, past_key_values=cache, prefill_chunk_size=30, max_new_tokens=1)
    again = copy.deepcopy(cache)
    again.crop(tokens_to_remove=-back)
    refuses(model, again, edited(said, 45))
    goes_on(model, again, said)
    goes_on(model, cache, edited(said, 76 - back))


def test_a_chunk_longer_than_the_window_that_was_cut_short():
    model, cache, said = small_model(), SinkCache(16, 4), prompt(80)
    generate(model, input_ids=said[:, :40], past_key_values=cache, prefill_chunk_size=12, max_new_tokens=1)
    hook = model.model.layers[1].register_forward_pre_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(model, input_ids=said, past_key_values=cache, prefill_chunk_size=40, max_new_tokens=1)
    hook.remove()
    said = torch.cat([said[:, :40], prompt(40, seed=1)], dim=1)  # what was cut short may be left out
    for column in (0, 20, 27):
        refuses(model, copy.deepcopy(cache), edited(said, column))
    goes_on(model, cache, said)


# --- a loop of one's own


def feed(model, cache, ids: torch.Tensor, size: int = 1, **kwargs) -> None:
    with torch.no_grad():
        for part in ids.split(size, dim=1):
            model(**cache.prepare_inputs(part, **kwargs))


@pytest.mark.parametrize("size", [1, 7])
def test_what_a_loop_of_ones_own_read_is_known(size):
    model, cache, said = small_model(), SinkCache(16, 4), prompt(160)
    cache.bind(model)
    feed(model, cache, said[:, :150], size)
    for column in (0, 50, 140):
        refuses(model, cache, edited(said, column))
    goes_on(model, cache, said)
    ids = [cache.held.transcript.digest, *(ids for _, ids in cache.held.transcript.parts)]
    assert sum(each.untyped_storage().nbytes() for each in ids) <= 17 * 8


def test_a_prefix_that_is_tokenized_otherwise_later():
    model, cache, said = small_model(), SinkCache(16, 4), prompt(14)
    cache.bind(model)
    feed(model, cache, said[:, :10], size=10)
    goes_on(model, cache, edited(said, 8))  # as nothing was evicted, it is taken back


def test_ids_are_known_as_they_were_when_they_were_read():
    model, cache, said = small_model(), SinkCache(16, 4), prompt(30)
    cache.bind(model)
    token = torch.zeros(1, 1, dtype=torch.long)  # one for all steps
    with torch.no_grad():
        for column in range(29):
            model(**cache.prepare_inputs(token.copy_(said[:, column : column + 1])))
    refuses(model, cache, edited(said, 2))
    goes_on(model, cache, said)


def test_what_was_prepared_and_never_ran_counts_nothing():
    model, cache, said = small_model(), SinkCache(16, 4), prompt(40)
    cache.bind(model)
    cache.prepare_inputs(prompt(3, rows=2, seed=1))
    feed(model, cache, said[:, :18], size=6)
    cache.prepare_inputs(prompt(4, seed=1))
    hook = model.model.layers[1].register_forward_pre_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        feed(model, cache, prompt(5, seed=2), size=5)
    hook.remove()
    cache.prepare_inputs(prompt(1, seed=3))
    refuses(model, cache, edited(said, 2))
    goes_on(model, cache, said)


def test_what_the_model_got_by_itself_stays_unknown():
    model, cache, said = small_model(), SinkCache(16, 4), prompt(40)
    cache.bind(model)
    feed(model, cache, said[:, :20], size=5)
    with torch.no_grad():
        for column in range(20, 24):
            model(said[:, column : column + 1], **{CACHE: cache})
    feed(model, cache, said[:, 24:30])
    for column in (0, 12, 19, 24, 28):
        refuses(model, cache, edited(said, column))
    goes_on(model, copy.deepcopy(cache), said)
    generate(model, input_ids=edited(said, 21), past_key_values=cache, **GREEDY)  # nobody can know


def test_a_call_with_other_tokens_than_those_that_were_prepared():
    # The model may have been told places in the window, and not columns: then it would put these tokens there.
    model, cache, said = small_model(), SinkCache(16, 4), prompt(40)
    cache.bind(model)
    feed(model, cache, said[:, :20], size=5)
    cache.prepare_inputs(prompt(3, seed=1))
    try:
        with torch.no_grad():
            logits = model(said[:, 20:21], **{CACHE: cache}).logits[0]
    except ValueError as error:
        assert "positions that are not the numbers of tokens" in str(error)
    else:
        assert difference(logits, oracle(model, said[0].tolist(), 16, 4)[20:21]) < 1e-5
    goes_on(model, cache, said)


# --- the digest


def test_a_digest_is_the_sum_of_its_parts_and_tells_ids_apart():
    ids = prompt(70_000, rows=2)
    pads = [0, 66_000]
    whole = digest_of(ids, 0, pads)
    parts = [digest_of(ids[:, start : start + 9_999], start, pads) for start in range(0, 70_000, 9_999)]
    assert torch.equal(sum(parts), whole)
    assert torch.equal(digest_of(ids[1:, 66_000:].int(), 66_000, [0]), whole[1:])
    others = [edited(ids, column) for column in (0, 1, 65_535, 65_536, 69_999)]
    others += [ids.roll(1, dims=1), ids.flip(1), ids + 1]
    exchanged = ids.clone()
    exchanged[0, :2] = ids[0, :2].flip(0)
    digests = [int(digest_of(each, 0, pads)[0]) for each in (ids, *others, exchanged)]
    assert len(set(digests)) == len(digests)


def test_a_transcript_without_ids_takes_any():
    assert Transcript().common_length(prompt(9), 3, 10, [0]) == 10
