"""Other `custom_generate` repositories: a bound cache handed to them streams, or is refused by name."""

import functools
from pathlib import Path

import pytest
import torch
from packaging.version import Version

from custom_generate.generate import CACHE, SinkCache, generate
from tests.support import ROOT
from tests.support.helpers import RELEASE, loadable, prompt, small_model
from tests.support.oracle import difference, oracle

GROUPS = "transformers-community/group-beam-search"
DOLA = "transformers-community/dola"
takes_functions = pytest.mark.skipif(RELEASE < Version("4.57"), reason="`generate` has these modes itself until then")


@pytest.fixture
def others(hub) -> None:
    for repo, name in ((GROUPS, "group_beams.py"), (DOLA, "dola.py")):
        source = Path(__file__).parent / "support" / name
        hub.commit(repo, {"custom_generate/generate.py": source.read_bytes()})


def decoded(model, ids, cache, repo=GROUPS, **settings):
    """What the code of a repository makes of a prompt, with four beams in a cache."""
    beams = dict(num_beams=4) if repo == GROUPS else {}
    call = dict(custom_generate=repo, trust_remote_code=True, max_new_tokens=30, pad_token_id=0)
    return model.generate(ids, **call | beams | settings, **{CACHE: cache})


def read(model, ids, rows: int) -> SinkCache:
    """A cache that has read all of a prompt but its last token, and has `rows` of it."""
    cache = SinkCache(16, 4).bind(model)
    with torch.no_grad():
        for piece in ids[:, :-1].split(5, dim=1):
            model(**cache.prepare_inputs(piece))
    cache.batch_repeat_interleave(rows)
    return cache


def probabilities(model, row, start: int, window: int) -> float:
    """The sum of the logarithms for the tokens of a row from `start` on."""
    logits = oracle(model, row.tolist(), window, 4).log_softmax(-1)
    return float(logits[start - 1 : -1].gather(1, row[start:, None]).sum())


@takes_functions
@pytest.mark.parametrize("length, is_read", [(5, False), (5, True), (40, True)])
def test_group_beams_in_a_bound_cache(others, length, is_read):
    model, ids = small_model(), prompt(length)
    cache = read(model, ids, 4) if is_read else SinkCache(16, 4).bind(model)
    rows, scores = decoded(model, ids, cache)
    assert rows.shape == (2, length + 30)
    for row, score in zip(rows, scores):
        assert abs(probabilities(model, row, length, 16) - score) < 1e-3
        assert abs(probabilities(model, row, length, 100) - score) > 1e-2  # it is the window that tells


@takes_functions
@pytest.mark.parametrize("length, is_read", [(5, False), (40, True)])
def test_dola_in_a_bound_cache(others, length, is_read):
    model, ids = small_model(), prompt(length)
    cache = read(model, ids, 1) if is_read else SinkCache(16, 4).bind(model)
    ids, logits = decoded(model, ids, cache, DOLA)
    assert difference(logits[0], oracle(model, ids[0].tolist(), 16, 4)[length - 1 : -1]) < 1e-5


def passed(model) -> list:
    """A list that grows with each forward pass that came to logits."""
    passes: list = []
    model.lm_head.register_forward_hook(lambda *args: passes.append(1))
    return passes


@takes_functions
def test_what_such_code_can_not_have(others):
    model, ids, with_pads = small_model(), prompt(40), torch.nn.functional.pad(prompt(5), (2, 0))
    passes = passed(model)
    with pytest.raises(ValueError, match="can't go on outside .* these 40 tokens evict some"):
        decoded(model, ids, SinkCache(16, 4).bind(model))
    cache = read(model, ids, 2)
    passes.clear()
    with pytest.raises(ValueError, match="holds a batch of 2, got one of 4: `batch_repeat_interleave` it first"):
        decoded(model, ids, cache)
    assert passes == [] and cache.get_seq_length() == 39
    # Which of several rows are padded matters, and is known, as soon as they evict.
    with pytest.raises(ValueError, match="some of these 4 rows may be padded"):
        decoded(model, with_pads, SinkCache(16, 4).bind(model), attention_mask=(with_pads > 0).long())


def by_hand(model, ids, **settings):
    return generate(model, 16, 4, input_ids=ids, max_new_tokens=20, **settings)


def by_carrying(model, ids, **settings):
    """A model that was loaded from a repository with this file."""
    model.generate = functools.partial(generate, model=model)
    return model.generate(ids, window_length=16, max_new_tokens=20, **settings)


@pytest.mark.parametrize("door", [by_hand, by_carrying])
@pytest.mark.parametrize("name", [GROUPS, "no/where", lambda *args: None], ids=["other code", "no code", "a function"])
def test_other_code_in_a_stream(others, door, name):
    model = small_model()
    passes = passed(model)
    with pytest.raises(ValueError, match="`custom_generate` asks for another way of decoding, .* got"):
        door(model, prompt(5), custom_generate=name, trust_remote_code=True)
    assert passes == []


@pytest.mark.parametrize("door", [by_hand, by_carrying])
def test_this_code_in_a_stream(hub, door):
    model, ids = small_model(), prompt(5)
    expected = door(model, ids)
    for name in ("org/sink_cache", loadable(ROOT)):
        assert torch.equal(door(model, ids, custom_generate=name, trust_remote_code=True), expected)
