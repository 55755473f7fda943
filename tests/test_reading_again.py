"""What was read off a model is read again where the model was changed since; an equal model is as good as the same."""

import copy
import pickle

import pytest
import torch

from custom_generate.generate import SinkCache, Stamp
from tests.support.helpers import answer, prompt, small_model, stream
from tests.support.oracle import difference, oracle

pytestmark = pytest.mark.newest_only


def error(model) -> float:
    """How far a stream of `model` past its window, in a new cache, is from the oracle on it."""
    output = stream(model, prompt(3))
    return difference(torch.cat(output.logits), oracle(model, output.sequences[0].tolist(), 16, 4)[2:-1])


def next_turn(model, cache, tokens):
    """The tokens after a turn more."""
    ids = torch.cat([tokens, prompt(3)], dim=1)
    return answer(model, cache, ids, attention_mask=torch.ones_like(ids)).sequences  # it may well say the pad token


def divided(model):
    model.model.rotary_emb.inv_freq /= 4


def divided_behind_torchs_back(model):
    model.model.rotary_emb.inv_freq.data.div_(4)


def exchanged(model):
    model.model.rotary_emb = small_model(rope_scaling={"rope_type": "linear", "factor": 4.0}).model.rotary_emb


def patched(model):
    rotary = model.model.rotary_emb
    forward = rotary.forward

    def backwards(*args, **kwargs):
        cos, sin = forward(*args, **kwargs)
        return cos, -sin

    rotary.forward = backwards


def hooked(model):
    model.model.rotary_emb.register_forward_hook(lambda module, args, angles: (angles[0], -angles[1]))


def loaded(model):
    model.model.rotary_emb.register_buffer("inv_freq", model.model.rotary_emb.inv_freq.clone())
    state = model.state_dict()
    model.load_state_dict(state | {"model.rotary_emb.inv_freq": state["model.rotary_emb.inv_freq"] / 4})


def without_positions_in_a_layer(model):
    attention = model.model.layers[1].self_attn
    forward = attention.forward

    def unturned(*args, **kwargs):
        cos, sin = kwargs["position_embeddings"]
        return forward(*args, **{**kwargs, "position_embeddings": (torch.ones_like(cos), torch.zeros_like(sin))})

    attention.forward = unturned


CHANGES = [
    divided,
    divided_behind_torchs_back,
    exchanged,
    patched,
    hooked,
    loaded,
    without_positions_in_a_layer,
]


@pytest.mark.parametrize("change", CHANGES)
def test_rotary_embeddings_that_were_changed(change, tmp_path):
    model, cache = small_model(), SinkCache(16, 4)
    tokens = answer(model, cache, prompt(3)).sequences
    cache.save(tmp_path / "conversation")
    pickled = pickle.dumps(cache)
    change(model)
    assert error(model) < 1e-5
    # Tokens whose keys were rotated otherwise don't fit to new ones, however they are kept.
    for kept in (cache, pickle.loads(pickled)):
        with pytest.raises(ValueError, match="`model` rotates its keys otherwise than for the 22 tokens.*`reset"):
            next_turn(model, kept, tokens)
    with pytest.raises(ValueError, match="comes from a conversation with another model"):
        SinkCache.load(tmp_path / "conversation", model)
    assert cache.get_seq_length() == 22
    SinkCache.load(tmp_path / "conversation", small_model())
    cache.reset()
    logits = answer(model, cache, prompt(3), 60)
    expected = oracle(model, logits.sequences[0].tolist(), 16, 4)[2:-1]
    assert difference(torch.cat(logits.logits), expected) < 1e-5
    cache.save(tmp_path / "conversation")
    assert SinkCache.load(tmp_path / "conversation", model).get_seq_length() == 62


def negated(model):
    model.load_state_dict({name: -weight for name, weight in model.state_dict().items()})


def negated_behind_torchs_back(model):
    for weight in model.parameters():
        weight.data.mul_(-1)


@pytest.mark.parametrize("change", [negated, negated_behind_torchs_back])
def test_weights_that_were_changed(change, tmp_path):
    model, cache = small_model(), SinkCache(16, 4)
    answer(model, cache, prompt(3))
    cache.save(tmp_path / "old")
    change(model)
    with pytest.raises(ValueError, match="comes from a conversation with another model"):
        SinkCache.load(tmp_path / "old", model)
    SinkCache.load(tmp_path / "old", small_model())
    new = SinkCache(16, 4)
    answer(model, new, prompt(3))
    new.save(tmp_path / "new")
    again = small_model()
    change(again)
    SinkCache.load(tmp_path / "new", again)
    with pytest.raises(ValueError, match="comes from a conversation with another model"):
        SinkCache.load(tmp_path / "new", small_model())


def adapted():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, lora_alpha=16, target_modules=["q_proj", "k_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    torch.manual_seed(0)
    return peft.get_peft_model(small_model(), config).eval()


def test_an_adapter_that_was_off_at_first(tmp_path):
    model = adapted()
    with model.disable_adapter():
        answer(model, SinkCache(16, 4), prompt(3))
    cache = SinkCache(16, 4)
    tokens = answer(model, cache, prompt(3)).sequences
    cache.save(tmp_path / "on")
    expected = next_turn(model, copy.deepcopy(cache), tokens)
    for resumed in (SinkCache.load(tmp_path / "on", adapted()), pickle.loads(pickle.dumps(cache)).bind(adapted())):
        assert torch.equal(next_turn(adapted(), resumed, tokens), expected)
    off = adapted()
    with off.disable_adapter(), pytest.raises(ValueError, match="comes from a conversation with another model"):
        SinkCache.load(tmp_path / "on", off)


def test_a_model_that_stays_as_it_is_runs_once():
    model, cache = small_model(), SinkCache(16, 4)
    tokens = answer(model, cache, prompt(3)).sequences
    passes = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    next_turn(model, cache, tokens)
    stream(model, prompt(3))
    assert set(passes) == {1}  # a row of the text each, and never the four of the reading


def test_equal_models_are_one():
    """A copy of a model, or the model loaded once more, goes on with what the first one said."""
    model, cache = small_model(), SinkCache(16, 4)
    tokens = answer(model, cache, prompt(3)).sequences
    for other in (copy.deepcopy(model), small_model(), model):
        expected = next_turn(model, copy.deepcopy(cache), tokens)
        tokens = next_turn(other, cache, tokens)
        assert torch.equal(tokens, expected)
    wide = copy.deepcopy(model)
    wide.model.rotary_emb.inv_freq /= 4
    with pytest.raises(ValueError, match="`model` rotates its keys otherwise"):
        next_turn(wide, cache, tokens)
    next_turn(model, cache, tokens)


def in_place(model):
    with torch.no_grad():
        model.lm_head.weight.mul_(2)


def weight_exchanged(model):
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())


def a_class_patched(model):
    mlp = model.model.layers[0].mlp
    mlp.__class__ = type("Patched", (type(mlp),), {"forward": lambda self, states: states})


def within(name, value):
    """Sets an attribute of an attention, or an entry of its `scalings`."""

    def change(model):
        attention = model.model.layers[1].self_attn
        if name == "scalings":
            attention.scalings["default"] = value
        else:
            setattr(attention, name, value)

    return change


SEEN = {
    "a weight in place": in_place,
    "a weight exchanged": weight_exchanged,
    "dtype": lambda model: model.bfloat16(),
    "another device": lambda model: model.lm_head.to("meta"),
    "a module exchanged": lambda model: setattr(model.model, "norm", copy.deepcopy(model.model.norm)),
    "a class patched": a_class_patched,
    "training": lambda model: model.model.layers[1].train(),
    "a number": within("scaling", 0.3),
    "an entry": within("scalings", 2.0),
    "a number that was none": within("nothing", 1),
    "a vector that was none": within("nothing", torch.ones(4)),
    "a vector that was a number": within("scaling", torch.ones(4)),
    "a number that was not there": within("new", 1),
    "the configuration": lambda model: setattr(model.config, "rms_norm_eps", 1e-3),
    "the attention's implementation": lambda model: setattr(model.config, "_attn_implementation", "eager"),
}


def stamped():
    """A model with settings of several kinds, and the stamp of it."""
    model = small_model()
    attention = model.model.layers[1].self_attn
    attention.scalings, attention.nothing, attention.calls = {"default": 1.0}, None, 0
    return model, Stamp(model)


@pytest.mark.parametrize("change", SEEN)
def test_a_stamp_sees(change):
    model, stamp = stamped()
    assert stamp.fits(model)
    SEEN[change](model)
    assert not stamp.fits(model)
    assert Stamp(model).fits(model)


def test_a_stamp_does_not_see_what_is_no_setting():
    model, stamp = stamped()
    attention = model.model.layers[1].self_attn
    attention.nothing, attention.more = [torch.ones(2, 3)], object()
    attention.scalings = dict(attention.scalings)
    model(input_ids=prompt(3), output_hidden_states=True)
    assert stamp.fits(model)


def test_a_stamp_leaves_out_what_a_model_counts_and_nothing_else():
    model, stamp = stamped()
    attention = model.model.layers[1].self_attn
    attention.calls, attention.more, attention.training = 5, 7.5, True
    stamp.leave_out_counters(model)
    attention.training = False
    assert stamp.fits(model)
    attention.calls, attention.more = 6, 8
    assert stamp.fits(model)
    attention.scaling = 0.3
    assert not stamp.fits(model)
