"""A conversation goes on where it was: over turns, in copies, cropped, and in another process."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch

from custom_generate.generate import CACHE, SinkCache, generate
from tests.support import ROOT
from tests.support.helpers import answer, at_the_ends, left_padded, prompt, seeded, small_model
from tests.support.oracle import difference, oracle

# --- turns


WHOLE, NEW = "the whole conversation", "the new tokens, with the mask of all"


@pytest.mark.parametrize(
    "prompt_length, convention", [(40, WHOLE), (3, NEW), at_the_ends(3, WHOLE), at_the_ends(40, NEW)]
)
def test_turns_are_one_stream(prompt_length, convention):
    model, cache = small_model(), SinkCache(16, 4)
    conversation = prompt(prompt_length)
    for turn in range(3):
        start, seen = conversation.shape[1], cache.get_seq_length()
        given = conversation if convention == WHOLE else conversation[:, seen:]
        # With a mask: a random model may well say the pad token, which transformers would take for padding.
        output = answer(model, cache, given, seed=turn, attention_mask=torch.ones_like(conversation))
        assert torch.equal(output.sequences[:, : given.shape[1]], given)
        conversation = torch.cat([conversation, output.sequences[:, given.shape[1] :]], dim=1)
        assert conversation.shape[1] == start + 20
        expected = oracle(model, conversation[0].tolist(), 16, 4)[start - 1 : -1]
        assert difference(torch.cat(output.logits), expected) < 1e-5
        conversation = torch.cat([conversation, prompt(7, seed=turn)], dim=1)


def test_turns_of_padded_rows_by_their_new_tokens():
    model, cache = small_model(), SinkCache(16, 4)
    ids, mask = prompt(9, rows=2), torch.ones(2, 9, dtype=torch.long)
    ids[0, :4] = mask[0, :4] = 0
    first = answer(model, cache, ids, attention_mask=mask).sequences
    turn = torch.cat([first, prompt(3, rows=2, seed=1)], dim=1)
    mask = torch.cat([mask, torch.ones(2, 23, dtype=torch.long)], dim=1)
    again = copy.deepcopy(cache)
    whole = answer(model, cache, turn, attention_mask=mask)
    new = answer(model, again, turn[:, again.get_seq_length() :], attention_mask=mask)
    assert torch.equal(new.sequences[:, -20:], whole.sequences[:, -20:])


def test_new_tokens_of_which_the_cache_has_seen_some():
    model, cache = small_model(), SinkCache(16, 4)
    said = torch.cat([answer(model, cache, prompt(40)).sequences, prompt(7)], dim=1)
    mask, seen = torch.ones_like(said), cache.get_seq_length()
    again = copy.deepcopy(cache)
    expected = answer(model, cache, said, attention_mask=mask).sequences
    assert torch.equal(
        answer(model, again, said[:, seen - 4 :], attention_mask=mask).sequences, expected[:, seen - 4 :]
    )


# --- as an object


def next_tokens(model, cache, sequences):
    turn = torch.cat([sequences, prompt(3, rows=len(sequences), seed=9)], dim=1)
    return generate(model, input_ids=turn, past_key_values=cache, max_new_tokens=30, do_sample=False)


def a_conversation(seen=40, rows=1, **settings):
    """A model, a cache that has seen so many tokens, its tokens, and what greedy decoding says next."""
    model, cache = small_model(**settings), SinkCache(16, 4)
    sequences = generate(
        model, input_ids=prompt(5, rows), past_key_values=cache, max_new_tokens=seen - 4, do_sample=False
    )
    return model, cache, sequences, next_tokens(model, copy.deepcopy(cache), sequences)


@pytest.mark.parametrize(
    "seen, dtype", [(40, torch.float32), at_the_ends(10, torch.float32), at_the_ends(40, torch.bfloat16)]
)
def test_copied_pickled_and_saved(seen, dtype, tmp_path):
    model, cache, sequences, expected = a_conversation(seen, rows=2, max_position_embeddings=20)
    model = model.to(dtype)
    cache = SinkCache(16, 4)
    generate(model, input_ids=sequences[:, :-1], past_key_values=cache, max_new_tokens=1)
    expected = next_tokens(model, copy.deepcopy(cache), sequences)
    cache.save(tmp_path / "conversation.safetensors")
    copies = copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))
    for other in (*copies, SinkCache.load(tmp_path / "conversation.safetensors", model), cache):
        assert torch.equal(next_tokens(model, other, sequences), expected)


def test_a_copy_is_bound_and_a_pickled_cache_must_be_again():
    model, cache, *_ = a_conversation()
    copied, unpickled = copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))
    with pytest.raises(ValueError, match="must be bound first"):
        unpickled.prepare_inputs(prompt(1))
    with torch.no_grad():
        expected = model(**copied.prepare_inputs(prompt(1))).logits
        assert torch.equal(model(**unpickled.bind(model).prepare_inputs(prompt(1))).logits, expected)


@pytest.mark.slow
@pytest.mark.newest_only
def test_a_conversation_goes_on_in_another_process(tmp_path):
    model, cache, sequences, expected = a_conversation()
    model.save_pretrained(tmp_path)
    cache.save(tmp_path / "conversation.safetensors")
    torch.save(sequences, tmp_path / "sequences")
    code = f"""if True:
        import torch
        from tests.test_conversation import SinkCache, next_tokens
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})
        cache = SinkCache.load({str(tmp_path / "conversation.safetensors")!r}, model)
        print(next_tokens(model, cache, torch.load({str(tmp_path / "sequences")!r})).tolist())"""
    said = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT)
    assert said.strip().splitlines()[-1] == str(expected.tolist())


def test_a_saved_conversation_is_of_one_model(tmp_path):
    model, cache, *_ = a_conversation()
    cache.save(tmp_path / "conversation.safetensors")
    with seeded(1):
        stranger = small_model()
        stranger.init_weights()
    for parameter in stranger.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    for resume in (
        lambda: SinkCache.load(tmp_path / "conversation.safetensors", stranger),
        lambda: pickle.loads(pickle.dumps(cache)).bind(stranger),
    ):
        with pytest.raises(ValueError, match="comes from a conversation with another model"):
            resume()
    # In another dtype it is the same model.
    cache = SinkCache.load(tmp_path / "conversation.safetensors", model.bfloat16())
    assert cache.get_seq_length() == 40


def test_what_can_not_be_saved_or_loaded(tmp_path):
    _, cache, *_ = a_conversation()
    with pytest.raises(OSError, match="`path` can't be written, got .*nowhere"):
        cache.save(tmp_path / "nowhere" / "conversation.safetensors")
    with pytest.raises(ValueError, match="Only a bound `SinkCache` that holds tokens can be saved"):
        SinkCache(16, 4).save(tmp_path / "empty.safetensors")
    model = small_model()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`path` must be a file that `SinkCache.save` wrote.*model.safetensors"):
        SinkCache.load(tmp_path / "model.safetensors", model)
    with pytest.raises(ValueError, match="`path` must be a file that `SinkCache.save` wrote.*config.json"):
        SinkCache.load(tmp_path / "config.json", model)
    with pytest.raises(FileNotFoundError):
        SinkCache.load(tmp_path / "nothing", model)


def test_reset_starts_another_conversation():
    model, cache, *_ = a_conversation()
    cache.reset()
    assert cache.is_bound and cache.get_seq_length() == 0
    expected = generate(model, 16, 4, input_ids=prompt(9, seed=3), max_new_tokens=30, do_sample=False)
    again = generate(model, input_ids=prompt(9, seed=3), past_key_values=cache, max_new_tokens=30, do_sample=False)
    assert torch.equal(again, expected)


@pytest.mark.parametrize("max_length", [9, *map(at_the_ends, (-3, 1, 12, 40))])
def test_cropped_as_if_it_had_not_been_said(max_length):
    model, cache, sequences, _ = a_conversation(seen=12)
    cache.crop(max_length)
    kept = {9: 9, -3: 9, 1: 1}.get(max_length, 12)
    assert cache.get_seq_length() == kept
    fresh = SinkCache(16, 4)
    turn = torch.cat([sequences[:, :kept], prompt(20, seed=5)], dim=1)
    settings = dict(input_ids=turn, prefill_chunk_size=1, max_new_tokens=30, do_sample=False)
    expected = generate(model, past_key_values=fresh, **settings)
    assert torch.equal(generate(model, past_key_values=cache, **settings), expected)


def test_what_was_cropped_is_not_asked_for_again():
    model, cache, sequences, _ = a_conversation(seen=10)
    cache.crop(-4)
    said_instead = prompt(4, seed=8)
    with torch.no_grad():
        model(**cache.prepare_inputs(said_instead))
    conversation = torch.cat([sequences[:, :6], said_instead, prompt(3)], dim=1)
    settings = dict(input_ids=conversation, max_new_tokens=20, do_sample=False)
    expected = generate(model, 16, 4, **settings)
    assert torch.equal(generate(model, past_key_values=cache, **settings), expected)


def test_inputs_that_were_prepared_and_not_used_change_nothing():
    model, cache = small_model(max_position_embeddings=16), SinkCache(16, 4)
    cache.bind(model)
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    with pytest.raises(ValueError, match="at most 16 tokens at a time"):
        cache.prepare_inputs(prompt(17))
    cache.prepare_inputs(prompt(5), mask)
    assert cache.prepare_inputs(prompt(5))["position_ids"].tolist() == [[0, 1, 2, 3, 4]]  # no mask: no padding
    with torch.no_grad():
        model(**cache.prepare_inputs(prompt(16)))
    cache.prepare_inputs(prompt(1))  # which shifts all keys back
    cache.crop(-3)
    cache.prepare_inputs(prompt(9))  # and again
    with torch.no_grad():
        logits = model(**cache.prepare_inputs(prompt(9, seed=1))).logits[0]
    tokens = prompt(16)[0, :13].tolist() + prompt(9, seed=1)[0].tolist()
    assert difference(logits, oracle(small_model(), tokens, 16, 4)[13:]) < 1e-5


def test_cropping_what_evicted_is_refused():
    model, cache, sequences, expected = a_conversation(seen=20)
    with pytest.raises(ValueError, match="can forget 1 of the 20 tokens seen, got -2.*evicted from the window of 16"):
        cache.crop(-2)
    assert torch.equal(next_tokens(model, cache, sequences), expected)  # nothing was lost
    with pytest.raises(ValueError, match="can be cropped only if bound"):
        SinkCache(16, 4).crop(-1)
    model, cache, *_ = a_conversation(seen=10)
    cache = generate(
        model, 16, 4, **left_padded([prompt(9), prompt(3)]), max_new_tokens=2, return_dict_in_generate=True
    )[CACHE]
    for forgotten in (4, 9, 11):
        with pytest.raises(
            ValueError, match=f"must leave a token of each row, 7 columns.*got -{forgotten} of 10.*reset"
        ):
            cache.crop(-forgotten)
    assert cache.get_seq_length() == 10


def in_float64(forward):
    """The `forward` of a layer, which computes in float64, for states in float32."""

    def converting(states, *args, position_embeddings, **kwargs):
        position_embeddings = tuple(each.double() for each in position_embeddings)
        output = forward(states.double(), *args, position_embeddings=position_embeddings, **kwargs)
        return (output[0].float(), *output[1:]) if isinstance(output, tuple) else output.float()

    return converting


@pytest.mark.parametrize("moved", [[1], *map(at_the_ends, ([0], [0, 2], [0, 1, 2]))], ids=str)
def test_layers_that_are_in_several_places_now(moved):
    settings = dict(num_hidden_layers=3, max_position_embeddings=20)
    settings |= dict(attn_implementation="eager")  # which takes a mask of any dtype
    model, cache, sequences, expected = a_conversation(40, rows=2, **settings)
    # As if they were on other devices: some of them compute in float64 now.
    for layer_idx in moved:
        layer = model.model.layers[layer_idx].double()
        layer.forward = in_float64(layer.forward)
    turn = torch.cat([sequences, prompt(3, rows=2, seed=9)], dim=1)
    settings = dict(past_key_values=cache, do_sample=False)
    said = generate(model, input_ids=turn, max_new_tokens=10, **settings)
    dtypes = [torch.float64 if layer_idx in moved else torch.float32 for layer_idx in range(3)]
    assert [layer.keys.dtype for layer in cache.layers] == dtypes
    cache.batch_select_indices(torch.tensor([1, 0]))
    said = generate(model, input_ids=said[[1, 0]], max_new_tokens=20, **settings)
    assert torch.equal(said[[1, 0]], expected)


def test_saving_runs_the_model_only_if_it_was_changed(tmp_path, monkeypatch):
    # One process alone could not run a model whose weights are spread over several.
    model, cache, *_ = a_conversation()
    read, runs = SinkCache.save.__globals__["_fingerprint"], []

    def counted(*args):
        runs.append(args)
        return read(*args)

    monkeypatch.setitem(SinkCache.save.__globals__, "_fingerprint", counted)
    for copied in (cache, copy.deepcopy(cache)):
        copied.save(tmp_path / "conversation")
    assert runs == []
    with torch.no_grad():
        model.model.embed_tokens.weight.neg_()
    cache.save(tmp_path / "conversation")
    assert len(runs) == 1
    assert SinkCache.load(tmp_path / "conversation", model).get_seq_length() == 40
