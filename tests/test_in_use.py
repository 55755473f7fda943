"""A cache is in use by one call of `generate` at a time; whatever else is asked of it meanwhile is refused."""

import copy
import pickle
import threading

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from custom_generate.generate import CACHE, SinkCache, generate
from tests.support.helpers import prompt, small_model

pytestmark = pytest.mark.newest_only

IN_USE = f"`SinkCache` in `{CACHE}` is in use by another call of `generate`"
SETTINGS = dict(max_new_tokens=20, do_sample=False)


class Pause(LogitsProcessor):
    """Calls `do` when so many tokens were seen, as a web page's handlers may at any time."""

    def __init__(self, do, at=25):
        self.do, self.at = do, at

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] == self.at:
            self.do()
        return scores


def in_thread(function):
    """Run `function` in another thread; what it returned, or the error that it raised."""
    outcome = []

    def run():
        try:
            outcome.append(function())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert outcome, "it waits"
    return outcome[0]


MEANWHILE = {
    "the same call": lambda cache, model, path: generate(
        model, input_ids=prompt(10), past_key_values=cache, **SETTINGS
    ),
    "a new turn": lambda cache, model, path: generate(
        model, input_ids=prompt(40, seed=1), past_key_values=cache, **SETTINGS
    ),
    "transformers' generate": lambda cache, model, path: model.generate(
        input_ids=prompt(40, seed=1), **{CACHE: cache}, **SETTINGS
    ),
    "a forward pass": lambda cache, model, path: model(prompt(1), **{CACHE: cache}),
    "prepare_inputs": lambda cache, model, path: cache.prepare_inputs(prompt(1)),
    "bind": lambda cache, model, path: cache.bind(small_model("mistral")),
    "reset": lambda cache, model, path: cache.reset(),
    "crop": lambda cache, model, path: cache.crop(-1),
    "save": lambda cache, model, path: cache.save(path),
    "reorder_cache": lambda cache, model, path: cache.reorder_cache(torch.tensor([0])),
    "batch_repeat_interleave": lambda cache, model, path: cache.batch_repeat_interleave(2),
    "deepcopy": lambda cache, model, path: copy.deepcopy(cache),
    "pickle": lambda cache, model, path: pickle.dumps(cache),
}


@pytest.mark.parametrize("place", ["between steps", "within a forward pass"])
@pytest.mark.parametrize("second", MEANWHILE)
def test_a_second_use_is_refused_and_the_first_goes_on(second, place, tmp_path):
    model, cache, undisturbed = small_model(), SinkCache(16, 4), SinkCache(16, 4)
    turn = torch.cat([prompt(10), prompt(15, seed=2)], dim=1)
    for either in (cache, undisturbed):
        generate(model, input_ids=prompt(10), past_key_values=either, max_new_tokens=1)
    expected = generate(model, input_ids=turn, past_key_values=undisturbed, **SETTINGS)
    outcomes = []

    def meanwhile(*args):
        outcomes.append(in_thread(lambda: MEANWHILE[second](cache, model, tmp_path / "conversation")))

    processors, hooks = LogitsProcessorList(), []
    if place == "between steps":
        processors.append(Pause(meanwhile, at=30))
    else:  # where one layer has taken in the token, and the others have not

        def once(*args):
            if cache.layers[0].get_seq_length() == 30 and not outcomes:
                meanwhile()

        hooks.append(model.model.layers[1].register_forward_pre_hook(once))
    tokens = generate(model, input_ids=turn, past_key_values=cache, logits_processor=processors, **SETTINGS)
    for hook in hooks:
        hook.remove()
    assert len(outcomes) == 1 and isinstance(outcomes[0], ValueError), outcomes
    with pytest.raises(ValueError, match=IN_USE):
        raise outcomes[0]
    assert torch.equal(tokens, expected)
    assert not (tmp_path / "conversation").exists()
    # It is free again, and as if nothing had happened.
    turn = torch.cat([tokens, prompt(3)], dim=1)
    expected = generate(model, input_ids=turn, past_key_values=undisturbed, **SETTINGS)
    assert torch.equal(generate(model, input_ids=turn, past_key_values=cache, **SETTINGS), expected)


def test_of_many_calls_at_once_one_goes_on():
    model, cache, calls = small_model(), SinkCache(16, 4), 8
    expected = generate(model, 16, 4, input_ids=prompt(10), **SETTINGS)
    together, others_refused = threading.Barrier(calls), threading.Event()
    answers, errors = [], []

    def call():
        together.wait(60)
        wait = Pause(lambda: others_refused.wait(60))
        try:
            processors = LogitsProcessorList([wait])
            answers.append(
                generate(model, input_ids=prompt(10), past_key_values=cache, logits_processor=processors, **SETTINGS)
            )
        except Exception as error:
            errors.append(error)
            if len(errors) == calls - 1:
                others_refused.set()

    threads = [threading.Thread(target=call) for _ in range(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert [type(error) for error in errors] == [ValueError] * (calls - 1)
    assert all("is in use" in str(error) for error in errors)
    assert len(answers) == 1 and torch.equal(answers[0], expected)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_call_that_an_error_ended_leaves_its_cache_free(error):
    model, cache = small_model(), SinkCache(16, 4)
    expected = generate(model, 16, 4, input_ids=prompt(10), **SETTINGS)

    def fail():
        raise error("stop")

    with pytest.raises(error, match="stop"):
        generate(
            model,
            input_ids=prompt(10),
            past_key_values=cache,
            logits_processor=LogitsProcessorList([Pause(fail)]),
            **SETTINGS,
        )
    assert cache.get_seq_length() == 25
    settings = dict(past_key_values=cache, do_sample=False)
    for _ in range(2):  # an error in the arguments leaves it free, too
        with pytest.raises(ValueError, match="must be the whole conversation"):
            generate(model, input_ids=prompt(10), max_new_tokens=5, **settings)
    rest = in_thread(lambda: generate(model, input_ids=expected[:, :26], max_new_tokens=4, **settings))
    assert torch.equal(rest, expected)


def test_a_call_within_a_call():
    model, cache = small_model(), SinkCache(16, 4)
    expected = generate(model, 16, 4, input_ids=prompt(10), **SETTINGS)
    refused, saved = [], []

    def within():
        with pytest.raises(ValueError, match=IN_USE):
            generate(model, input_ids=prompt(40), past_key_values=cache, **SETTINGS)
        refused.append(True)
        saved.append(copy.deepcopy(cache))  # between two steps, in the call's own thread

    processors = LogitsProcessorList([Pause(within)])
    tokens = generate(model, input_ids=prompt(10), past_key_values=cache, logits_processor=processors, **SETTINGS)
    assert refused and torch.equal(tokens, expected)
    # The copy was never in use.
    rest = generate(model, input_ids=expected[:, :26], past_key_values=saved[0], max_new_tokens=4, do_sample=False)
    assert torch.equal(rest, expected)
