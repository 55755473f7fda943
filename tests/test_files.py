"""What a model's files say of the cache is no wish of the call: a stream replaces it."""

import copy

import pytest
import torch
from transformers import GenerationConfig

from custom_generate.generate import generate
from tests.support import ROOT
from tests.support.helpers import loadable, prompt, small_model

pytestmark = pytest.mark.newest_only

SETTINGS = dict(max_new_tokens=24, do_sample=False)
FILES = {
    "cache_implementation": "hybrid",
    "use_cache": False,
    "return_legacy_cache": True,
    "prefill_chunk_size": 3,
}
MESSAGES = {
    "cache_implementation": "`cache_implementation` must not be given, got 'hybrid'",
    "use_cache": "`use_cache` must not be False",
    "return_legacy_cache": "`return_legacy_cache` must not be True",
}


def by_name(model, **kwargs):
    window = dict(window_length=16, num_sink_tokens=4)
    return model.generate(prompt(5), custom_generate=loadable(ROOT), trust_remote_code=True, **window, **kwargs)


def by_hand(model, **kwargs):
    return generate(model, 16, 4, input_ids=prompt(5), **kwargs)


@pytest.fixture(scope="module")
def expected():
    return by_hand(small_model(), **SETTINGS)


@pytest.mark.parametrize("door", [by_name, by_hand])
@pytest.mark.parametrize("name", FILES)
def test_what_a_models_files_say_is_served(name, door, expected):
    model = small_model()
    setattr(model.generation_config, name, FILES[name])
    before = model.generation_config.to_dict()
    assert torch.equal(door(model, **SETTINGS), expected)
    config = copy.deepcopy(model.generation_config)  # the model's own, handed back
    assert torch.equal(door(model, generation_config=config, **SETTINGS), expected)
    config.max_new_tokens, config.do_sample = 24, False
    asked = config.to_dict()
    assert torch.equal(door(model, generation_config=config, return_dict_in_generate=True).sequences, expected)
    assert config.to_dict() == asked and model.generation_config.to_dict() == before


@pytest.mark.parametrize("door", [by_name, by_hand])
def test_a_model_configuration_without_a_cache(door, expected):
    model = small_model()
    model.config.use_cache = False
    assert torch.equal(door(model, **SETTINGS), expected)
    config = GenerationConfig.from_model_config(model.config)
    config.pad_token_id = 0
    assert torch.equal(door(model, generation_config=config, **SETTINGS), expected)
    assert model.config.use_cache is False


@pytest.mark.parametrize("door", [by_name, by_hand])
@pytest.mark.parametrize("name", MESSAGES)
def test_what_a_call_says_is_refused(name, door):
    model, passes = small_model(), []
    model.register_forward_pre_hook(lambda *args: passes.append(args))
    # Another configuration than the model's, or an argument, whatever the files say.
    with pytest.raises(ValueError, match=MESSAGES[name]):
        door(model, generation_config=GenerationConfig(**{name: FILES[name]}), **SETTINGS)
    for says in (getattr(model.generation_config, name, None), FILES[name]):
        setattr(model.generation_config, name, says)
        with pytest.raises(ValueError, match=MESSAGES[name]):
            door(model, **{name: FILES[name]}, **SETTINGS)
    assert passes == []
    if name == "use_cache":
        door(model, use_cache=True, **SETTINGS)
