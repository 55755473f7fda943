"""What model code and transformers ask of any cache, a `SinkCache` answers by the names that the release has for it."""

import inspect

import pytest
import torch
from transformers import Cache

from custom_generate.generate import CACHE, SinkCache
from tests.support.helpers import prompt, small_model

METHODS = [name for name, method in vars(Cache).items() if inspect.isfunction(method) and not name.startswith("_")]


@pytest.mark.parametrize("name", METHODS)
def test_each_argument_of_a_cache_is_taken_by_its_name_and_by_position(name):
    parameters = list(inspect.signature(getattr(Cache, name)).parameters.values())[1:]
    names = [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    ours = inspect.signature(getattr(SinkCache, name))
    ours.bind(None, *names)
    ours.bind(None, **dict.fromkeys(names))


@pytest.mark.parametrize("bound", [True, False], ids=["bound", "unbound"])
def test_new_tokens_are_counted_by_either_name(bound):
    cache = SinkCache(16, 4)
    if bound:
        model = small_model()
        model(input_ids=prompt(5), **{CACHE: cache.bind(model)})
    columns = torch.arange(5, 8) if bound else torch.arange(3)
    expected = cache.get_mask_sizes(3, 0)
    assert expected[0] == len(columns) + cache.get_seq_length()
    assert cache.get_mask_sizes(query_length=3, layer_idx=0) == expected
    assert cache.get_mask_sizes(cache_position=columns, layer_idx=0) == expected
    assert cache.get_mask_sizes(columns, 0) == expected


@pytest.mark.parametrize("bound", [True, False], ids=["bound", "unbound"])
def test_tokens_seen_and_room_beside_new_ones(bound):
    model, cache = small_model(), SinkCache(16, 4)
    if bound:
        for ids in prompt(20).split(1, dim=1):
            model(**cache.bind(model).prepare_inputs(ids))
    else:
        keys, angles = torch.zeros(1, 1, 20, 8), dict(sin=torch.zeros(16, 8), cos=torch.ones(16, 8))
        for states in keys.split(1, dim=2):
            cache.update(states, states, 0, angles)
    assert cache.seen_tokens == 20
    assert cache.get_usable_length(1) == 15
