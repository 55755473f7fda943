"""Assisted decoding past the window: the tokens of decoding without it, in the memory of a window for each model."""

import contextlib
import copy
import gc
import weakref

import pytest
import torch
from packaging.version import Version
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from custom_generate.generate import CACHE, SinkCache, generate
from tests.support.helpers import RELEASE, SMALL, at_the_ends, prompt, seeded, small_model
from tests.support.oracle import difference, oracle

EARLY_EXITS_FAIL = Version("5.0") <= RELEASE < Version("5.1")  # an argument is left out there
EOS = 210  # until 4.52 prompt lookup asks for one
NEW_TOKENS = 40


def target(**settings):
    return small_model(eos_token_id=EOS, **settings)


def drafting(**settings):
    """An assistant that is never too unsure to draft on."""
    assistant = target(**settings)
    assistant.generation_config.assistant_confidence_threshold = 0.0
    assistant.generation_config.num_assistant_tokens = 6
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    return assistant


class Passes:
    """How many tokens each forward pass of a model gets, and how many bytes its cache has then."""

    def __init__(self, model):
        self.lengths, self.sizes = [], []
        self.handle = model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module, args, kwargs):
        self.lengths.append(kwargs["input_ids"].shape[1])
        if isinstance(kwargs.get(CACHE), SinkCache):
            self.sizes.append(kwargs[CACHE].nbytes)


def said(model, ids, window=(16, 4), max_new_tokens=NEW_TOKENS, **kwargs) -> torch.Tensor:
    """So many tokens of greedy decoding: in older releases transformers' assisted decoding says a few more."""
    settings = dict(do_sample=False, suppress_tokens=[EOS], max_new_tokens=max_new_tokens)
    settings["attention_mask"] = torch.ones_like(ids)
    return generate(model, *window, input_ids=ids, **{**settings, **kwargs})[:, : ids.shape[1] + max_new_tokens]


ASSISTANCE = {
    "prompt lookup": lambda model: dict(prompt_lookup_num_tokens=5),
    "the model itself": lambda model: dict(assistant_model=drafting()),  # all drafts are taken
    "a stranger": lambda model: dict(assistant_model=drafting(num_hidden_layers=1)),  # hardly one is
}
if not EARLY_EXITS_FAIL:
    ASSISTANCE["an early exit"] = lambda model: dict(assistant_early_exit=1)


# Each kind of assistance past a full window, and each window and length once more.
ASSISTED = [("the model itself", 5, (16, 4)), ("a stranger", 60, (16, 0)), ("prompt lookup", 60, (12, 1))]
ASSISTED += [("the model itself", 60, (16, 0)), ("a stranger", 60, (16, 4))]


@pytest.mark.parametrize(
    "assistance, length, window",
    [(name, 60, (16, 4)) for name in ASSISTANCE if name != "a stranger"] + [at_the_ends(*case) for case in ASSISTED],
    ids=str,
)
def test_the_tokens_of_greedy_decoding(length, window, assistance):
    model = target(max_position_embeddings=64)
    ids = prompt(length)
    expected = said(model, ids, window, 40)
    assert torch.equal(said(model, ids, window, 40, **ASSISTANCE[assistance](model)), expected)


@pytest.mark.slow
def test_drafts_that_are_taken_and_drafts_that_are_not():
    model, ids = target(), prompt(16)
    expected = said(model, ids)
    taken = {}
    for assistance in ("the model itself", "a stranger"):
        kwargs = ASSISTANCE[assistance](model)
        passes = Passes(model)
        assert torch.equal(said(model, ids, **kwargs), expected)
        passes.handle.remove()
        taken[assistance] = NEW_TOKENS / len(passes.lengths)
    assert taken["the model itself"] > 5  # tokens a forward pass
    assert taken["a stranger"] < 1.5


@pytest.mark.slow
def test_a_text_that_repeats_itself_is_looked_up():
    # The model is made to say a line again and again, of which prompt lookup then finds the rest.
    model = target()
    line = list(range(20, 40))

    class Again(torch.nn.Module):
        def forward(self, input_ids, scores):
            scores = scores.clone()
            following = {token: line[(place + 1) % 20] for place, token in enumerate(line)}
            for row, token in enumerate(input_ids[:, -1].tolist()):
                scores[row, following[token]] += 100
            return scores

    ids = torch.tensor([line * 3])
    expected = said(model, ids, logits_processor=[Again()])
    passes = Passes(model)
    looked_up = said(model, ids, logits_processor=[Again()], prompt_lookup_num_tokens=5)
    assert torch.equal(looked_up, expected)
    assert sum(length == 6 for length in passes.lengths) >= NEW_TOKENS / 6 - 2


@pytest.mark.parametrize(
    "assistance",
    [name if name == "prompt lookup" else at_the_ends(name) for name in ASSISTANCE if name != "a stranger"],
)
def test_sampled_logits_are_those_of_the_oracle(assistance):
    model, ids = target(max_position_embeddings=64), prompt(40)
    settings = dict(return_dict_in_generate=True, output_logits=True, output_scores=True)
    with seeded():
        output = generate(
            model,
            16,
            4,
            input_ids=ids,
            do_sample=True,
            suppress_tokens=[EOS],
            max_new_tokens=40,
            **settings,
            **ASSISTANCE[assistance](model),
        )
    tokens = output.sequences[0].tolist()
    assert len(output.logits) == len(output.scores) == len(tokens) - 40 >= 40
    assert difference(torch.cat(output.logits), oracle(model, tokens, 16, 4)[39:-1]) < 1e-5
    assert isinstance(output[CACHE], SinkCache)
    assert output[CACHE].get_seq_length() == len(tokens) - 1


@pytest.mark.slow
@pytest.mark.parametrize("assistance", ["prompt lookup", "the model itself"])
def test_the_same_samples_as_transformers_while_nothing_is_evicted(assistance):
    model, ids = target(), prompt(10)
    settings = dict(input_ids=ids, do_sample=True, suppress_tokens=[EOS], max_new_tokens=40)
    with seeded():
        plain = model.generate(**settings, **ASSISTANCE[assistance](model))
    with seeded():
        assert torch.equal(generate(model, 100, 4, **settings, **ASSISTANCE[assistance](model)), plain)


@pytest.mark.slow
@pytest.mark.parametrize("assistance", ASSISTANCE)
def test_turns_of_one_conversation_with_and_without(assistance, tmp_path):
    model = target(max_position_embeddings=64)
    both, plain, conversation = SinkCache(16, 4), SinkCache(16, 4), prompt(9)
    for turn, kwargs in enumerate((ASSISTANCE[assistance](model), {}, ASSISTANCE[assistance](model))):
        settings = dict(window=(None, None), max_new_tokens=25)
        expected = said(model, conversation, past_key_values=plain, **settings)
        assert torch.equal(said(model, conversation, past_key_values=both, **settings, **kwargs), expected)
        conversation = torch.cat([expected, prompt(4 + turn, seed=turn)], dim=1)
        both.save(tmp_path / "conversation")
        both = copy.deepcopy(SinkCache.load(tmp_path / "conversation", model))


@pytest.mark.slow
def test_streamers_and_stopping_criteria():
    class Streamer(BaseStreamer):
        def __init__(self):
            self.parts = []

        def put(self, value):
            self.parts.append(value.flatten())

        def end(self):
            self.parts.append("end")

    class StopAt(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= 65, dtype=torch.bool)

    model, ids, streamer = target(), prompt(30), Streamer()
    expected = said(model, ids)
    tokens = said(model, ids, streamer=streamer, stopping_criteria=[StopAt()], assistant_model=target())
    assert torch.equal(tokens, expected[:, : tokens.shape[1]]) and 65 <= tokens.shape[1] < 110
    assert streamer.parts[-1] == "end" and torch.equal(torch.cat(streamer.parts[:-1]), tokens[0])
    assert len(streamer.parts) < 30


def test_a_conversation_goes_on_after_an_interrupt_among_drafts():
    model, cache, ids = target(), SinkCache(16, 4), prompt(30)
    expected, parts = said(model, ids), []

    class Breaks(BaseStreamer):
        def put(self, value):
            if len(parts) == 4:
                raise KeyboardInterrupt
            parts.append(value.flatten())

        def end(self):
            pass

    kwargs = dict(assistant_model=target())
    with pytest.raises(KeyboardInterrupt):
        said(model, ids, past_key_values=cache, streamer=Breaks(), **kwargs)
    so_far = torch.cat(parts)[None]
    rest = said(
        model, so_far, (None, None), past_key_values=cache, max_new_tokens=expected.shape[1] - so_far.shape[1], **kwargs
    )
    assert torch.equal(rest, expected)


@pytest.mark.slow
@pytest.mark.parametrize("do_sample", [False, True])
def test_an_assistant_s_memory_is_a_window_too(do_sample):
    model, assistant = target(), target(num_hidden_layers=1)
    passes = Passes(assistant)
    with seeded():
        said(model, prompt(40), assistant_model=assistant, max_new_tokens=70, do_sample=do_sample)
    settled = passes.sizes[len(passes.sizes) // 5 :]
    window = 16 * 2 * 16 * 2 * 4  # tokens, heads, dimensions, keys and values, bytes
    assert len(settled) > 40 and min(settled) >= window and max(settled) <= 2.5 * window


@pytest.mark.skipif(EARLY_EXITS_FAIL, reason="early exits fail in transformers 5.0")
def test_an_early_exit_leaves_the_model_as_it_was():
    model, depths = target(), []
    model.model.layers[0].register_forward_pre_hook(lambda *args: depths.append(0))
    model.model.layers[1].register_forward_pre_hook(lambda *args: depths.append(1))

    class Breaks(BaseStreamer):
        def put(self, value):
            if len(depths) > 60:
                raise KeyboardInterrupt

        def end(self):
            pass

    before = model.config.to_dict()
    with pytest.raises(KeyboardInterrupt):
        said(model, prompt(30), assistant_early_exit=1, streamer=Breaks(), max_new_tokens=200)
    assert depths.count(0) > depths.count(1) > 0
    assert model.config.to_dict() == before and model.model.config is model.config


def words(vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer of a word a token, which has its own number for each word."""
    names = [f"w{token * 7 % vocabulary}" for token in range(vocabulary)]
    tokenizer = Tokenizer(models.WordLevel({name: token for token, name in enumerate(names)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="w1", pad_token="w2")


@pytest.mark.slow
def test_an_assistant_with_another_tokenizer():
    model, assistant = target(), small_model(vocab_size=151, num_hidden_layers=1)
    kwargs = dict(assistant_model=assistant, tokenizer=words(211), assistant_tokenizer=words(151))
    passes = Passes(assistant)
    assert torch.equal(said(model, prompt(30), **kwargs), said(model, prompt(30)))
    assert len(passes.lengths) > NEW_TOKENS
    window = 16 * 2 * 16 * 2 * 4  # tokens, heads, dimensions, keys and values, bytes
    assert max(passes.sizes) <= 2.5 * window


REFUSED = [
    (dict(use_mtp=True), ValueError, "`use_mtp` can't be used in a stream"),
    (dict(prompt_lookup_num_tokens=16), ValueError, r"`prompt_lookup_num_tokens` must be less than.*\(16\), got 16"),
    (
        dict(assistant_model=target(), tokenizer=words(211), assistant_tokenizer=words(151), do_sample=True),
        ValueError,
        "`assistant_tokenizer` can't be used with `do_sample`.*another head",
    ),
    (dict(assistant_model=torch.nn.Linear(1, 1)), TypeError, "`assistant_model` must be a transformers.*got Linear"),
]


@pytest.mark.parametrize("arguments, error, message", REFUSED, ids=lambda value: str(value)[:20])
def test_what_can_not_be_assisted(arguments, error, message):
    model, cache = target(), SinkCache(16, 4)
    passes = Passes(model)
    with pytest.raises(error, match=message):
        generate(model, input_ids=prompt(5), past_key_values=cache, max_new_tokens=5, **arguments)
    assert not cache.is_bound and set(passes.lengths) <= {1, 2, 4}  # of those that read the model


def test_an_assistant_that_can_not_be_streamed():
    assistant = target()
    del assistant.model.rotary_emb.inv_freq
    with pytest.raises(ValueError, match="`assistant_model` can't draft in a stream of its own"):
        said(target(), prompt(5), assistant_model=assistant)


@pytest.mark.parametrize("ends", ["in an answer", at_the_ends("by an error")])
@pytest.mark.parametrize("assistance", [name for name in ASSISTANCE if name != "a stranger"])
def test_what_drafts_were_made_in_is_freed_when_the_call_ends(assistance, ends):
    class Breaks(BaseStreamer):
        def put(self, value):
            if len(caches) > 6:
                raise InterruptedError

        def end(self):
            pass

    def run():
        with contextlib.suppress(InterruptedError):
            said(model, prompt(30), **kwargs, **(dict(streamer=Breaks()) if ends == "by an error" else {}))

    model = target()
    kwargs, caches = ASSISTANCE[assistance](model), []
    for each in (model, kwargs.get("assistant_model", model)):
        each.register_forward_pre_hook(
            lambda module, args, kwargs: caches.append(weakref.ref(kwargs[CACHE])), with_kwargs=True
        )
    generate(model, 16, 4, input_ids=prompt(5), max_new_tokens=1)  # reads the model, whose runs are not looked at
    caches.clear()
    gc.collect()
    gc.disable()
    try:
        run()
        assert len(caches) > 6 and not any(isinstance(cache(), SinkCache) for cache in caches)
    finally:
        gc.enable()


def text_model(name: str, **settings):
    """A model of a family whose last layer reads the keys of the one before."""
    shared = dict(num_kv_shared_layers=1, hidden_size_per_layer_input=8, vocab_size_per_layer_input=211)
    return small_model(CONFIG_MAPPING[name](**{**SMALL, **shared, "head_dim": 16, "eos_token_id": EOS, **settings}))


@pytest.mark.skipif(RELEASE < Version("5.24"), reason="refused before: layers read keys that they can't find")
@pytest.mark.parametrize(
    "name, settings",
    [
        ("gemma4_text", dict(global_head_dim=16, layer_types=["full_attention"] * 2)),
        (
            "gemma4_text",
            dict(
                global_head_dim=16,
                sliding_window=8,
                num_hidden_layers=4,
                layer_types=["sliding_attention", "full_attention"] * 2,
            ),
        ),
        (
            "gemma3n_text",
            dict(
                layer_types=["full_attention"] * 2,
                intermediate_size=[96] * 2,
                activation_sparsity_pattern=[0.0] * 2,
                laurel_rank=8,
            ),
        ),
    ],
)
def test_layers_that_hold_nothing_can_take_back(name, settings):
    model, ids, cache = text_model(name, **settings), prompt(30), SinkCache(16, 4)
    expected = said(model, ids)
    assert torch.equal(said(model, ids, prompt_lookup_num_tokens=4), expected)
    if "sliding_attention" not in settings["layer_types"]:
        said(model, ids[:, :10], (None, None), past_key_values=cache, max_new_tokens=1)
        cache.crop(-4)
        assert torch.equal(said(model, ids, (None, None), past_key_values=cache), expected)


@pytest.mark.newest_only
def test_an_assistant_without_keys_of_its_own_is_named():
    text = dict(SMALL, head_dim=16, global_head_dim=16, num_kv_shared_layers=2)
    text |= dict(hidden_size_per_layer_input=0, vocab_size_per_layer_input=0)
    config = CONFIG_MAPPING["gemma4_assistant"](text_config=text, backbone_hidden_size=64, use_ordered_embeddings=False)
    model = text_model("gemma4_text", global_head_dim=16, layer_types=["full_attention"] * 2)
    passes = Passes(model)
    with pytest.raises(ValueError, match="`assistant_model` .Gemma4AssistantForCausalLM. can't draft.*no keys of its"):
        said(model, prompt(5), assistant_model=AutoModelForCausalLM.from_config(config))
    assert set(passes.lengths) <= {1, 2, 4}  # of those that read the model
