"""A stream gives the logits of the oracle, an answer that uses neither the cache nor its rotation."""

import pydoc_data.topics

import pytest
import torch
from packaging.version import Version
from transformers import CodeGenConfig, GPTJConfig, MixtralConfig, Phi3Config

from custom_generate.generate import CACHE, SinkCache, generate
from tests.support.helpers import RELEASE, SMALL, answer, at_the_ends, on_the_newest, prompt, seeded, small_model
from tests.support.oracle import difference, oracle


def stream(model, input_ids, window_length, num_sink_tokens, max_new_tokens, **kwargs):
    """Sample, so that the stream never settles into a loop; return its tokens and the logits that they came from."""
    with seeded():
        output = generate(
            model,
            window_length,
            num_sink_tokens,
            input_ids=input_ids,
            max_new_tokens=max_new_tokens,
            min_new_tokens=max_new_tokens,
            do_sample=True,
            return_dict_in_generate=True,
            output_logits=True,
            **kwargs,
        )
    return output.sequences[0].tolist(), torch.cat(output.logits)


def error(model, input_ids, window_length, num_sink_tokens, max_new_tokens, **kwargs) -> float:
    tokens, logits = stream(model, input_ids, window_length, num_sink_tokens, max_new_tokens, **kwargs)
    assert len(logits) == max_new_tokens
    return difference(logits, oracle(model, tokens, window_length, num_sink_tokens)[input_ids.shape[1] - 1 : -1])


# Each architecture, and each window, is here with either attention.
@pytest.mark.parametrize(
    "architecture, window, attn_implementation",
    [
        ("llama", (16, 4), "sdpa"),
        ("llama", (16, 0), "eager"),
        on_the_newest("llama", (16, 1), "sdpa"),
        on_the_newest("llama", (5, 4), "eager"),
        at_the_ends("qwen3", (16, 4), "eager"),
        on_the_newest("qwen3", (16, 0), "sdpa"),
        at_the_ends("mistral", (16, 1), "eager"),
        on_the_newest("mistral", (5, 4), "sdpa"),
        at_the_ends("deepseek_v3", (16, 4), "sdpa"),
        on_the_newest("deepseek_v3", (5, 4), "eager"),
    ],
    ids=str,
)
def test_every_step_far_past_the_window(architecture, window, attn_implementation):
    model = small_model(architecture, attn_implementation)
    assert error(model, prompt(3), *window, max_new_tokens=50) < 1e-5


@pytest.mark.parametrize(
    "window, trained_length",
    [((16, 4), 16), *(on_the_newest(*case) for case in [((16, 4), 17), ((16, 0), 40), ((16, 15), 17), ((16, 0), 16)])],
    ids=str,
)
def test_every_step_while_positions_are_shifted_back(window, trained_length):
    # Positions may not pass the trained length, so the kept keys are shifted back at up to every step.
    positions = []
    model = small_model(max_position_embeddings=trained_length)
    hook = model.model.rotary_emb.register_forward_pre_hook(
        lambda module, args, kwargs: positions.append(kwargs.get("position_ids", args[-1])), with_kwargs=True
    )
    tokens, logits = stream(model, prompt(3), *window, max_new_tokens=60)
    hook.remove()
    assert max(int(ids.max()) for ids in positions) < trained_length
    assert min(int(ids.min()) for ids in positions) >= 0
    assert difference(logits, oracle(model, tokens, *window)[2:-1]) < 1e-5


def llama(length: int, **rope_scaling):
    return small_model(max_position_embeddings=length, rope_scaling=rope_scaling or None)


def phi3(length: int, long_factor: list[float]):
    scaling = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": long_factor}
    settings = {**SMALL, "max_position_embeddings": 4 * length, "original_max_position_embeddings": length}
    return small_model(Phi3Config(**settings, rope_scaling=scaling))


def with_a_table(config, length: int):
    sizes = dict(vocab_size=211, n_embd=64, n_layer=2, n_head=4, rotary_dim=8, eos_token_id=None, pad_token_id=0)
    return small_model(config(n_positions=length, **sizes), attn_implementation="eager")


SCALED = dict(factor=4.0, original_max_position_embeddings=20)
# A model trained to 20 tokens, and one for the oracle, which has the frequencies that the first may never give up.
ROPE = {
    "default": (lambda: llama(20), lambda: llama(512)),
    "linear": (lambda: llama(20, rope_type="linear", factor=4.0), lambda: llama(512, rope_type="linear", factor=4.0)),
    "llama3": (
        lambda: llama(80, rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0, **SCALED),
        lambda: llama(512, rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0, **SCALED),
    ),
    "yarn": (lambda: llama(80, rope_type="yarn", **SCALED), lambda: llama(80, rope_type="yarn", **SCALED)),
    "dynamic, which changes": (lambda: llama(20, rope_type="dynamic", factor=2.0), lambda: llama(512)),
    "longrope, Phi-3, which starts over": (lambda: phi3(20, [2.0] * 8), lambda: phi3(20, [1.0] * 8)),
    "a table, GPT-J, which ends": (lambda: with_a_table(GPTJConfig, 20), lambda: with_a_table(GPTJConfig, 512)),
    "a table, CodeGen, which ends": (lambda: with_a_table(CodeGenConfig, 20), lambda: with_a_table(CodeGenConfig, 512)),
}


@pytest.mark.parametrize(
    "model, reference",
    [case if "dynamic" in name or "longrope" in name else at_the_ends(*case) for name, case in ROPE.items()],
    ids=ROPE,
)
def test_four_times_the_trained_length(model, reference):
    model, positions = model(), []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: positions.append(kwargs["position_ids"]), with_kwargs=True
    )
    tokens, logits = stream(model, prompt(3), 16, 4, max_new_tokens=50)
    hook.remove()
    assert 0 <= min(int(ids.min()) for ids in positions) and max(int(ids.max()) for ids in positions) < 20
    assert difference(logits, oracle(reference(), tokens, 16, 4)[2:-1]) < 1e-5


def test_latent_attention_while_positions_are_shifted_back():
    # From 5.17 at the latest, it caches what turns of its keys as values.
    assert error(small_model("deepseek_v3", max_position_embeddings=17), prompt(3), 16, 4, max_new_tokens=50) < 1e-5


def test_a_model_that_slides_further_than_the_window():
    # 60 tokens are well past both the cache's window and the model's own.
    model = small_model("mistral", sliding_window=24)
    reference = small_model("mistral")
    tokens, logits = stream(model, prompt(3), 16, 4, max_new_tokens=60)
    assert difference(logits, oracle(reference, tokens, 16, 4)[2:-1]) < 1e-5


@pytest.mark.parametrize("length", [on_the_newest(15), 16, on_the_newest(17), 40])
def test_a_prompt_fed_token_by_token(length):
    assert error(small_model(), prompt(length), 16, 4, max_new_tokens=20, prefill_chunk_size=1) < 1e-5


@pytest.mark.parametrize("length", [on_the_newest(15), 16])
def test_a_prompt_that_the_window_holds_at_once(length):
    assert error(small_model(), prompt(length), 16, 4, max_new_tokens=20) < 1e-5


CHUNKS = [((16, 4), 1), ((16, 4), 2), ((16, 4), "W - S"), ((16, 4), 100), ((16, 0), None), ((16, 0), 100)]
CHUNKS += [((16, 15), None), ((16, 15), 7), ((12, 1), 2), ((12, 1), 7), ((12, 1), "W - S")]


@pytest.mark.parametrize(
    "window, prefill_chunk_size", [((16, 4), None), ((16, 4), 7), *(on_the_newest(*case) for case in CHUNKS)], ids=str
)
def test_a_long_prompt_in_chunks(window, prefill_chunk_size):
    if prefill_chunk_size == "W - S":
        prefill_chunk_size = window[0] - window[1]
    assert error(small_model(), prompt(70), *window, max_new_tokens=5, prefill_chunk_size=prefill_chunk_size) < 1e-5


@pytest.mark.ends_only
@pytest.mark.parametrize(
    "architecture, prefill_chunk_size", [("qwen3", 7), ("mistral", None), ("deepseek_v3", 7), ("deepseek_v3", None)]
)
def test_a_long_prompt_in_chunks_of_other_architectures(architecture, prefill_chunk_size):
    model = small_model(architecture)
    assert error(model, prompt(50), 16, 4, max_new_tokens=5, prefill_chunk_size=prefill_chunk_size) < 1e-5


def own_loop(model, tokens, window_length, num_sink_tokens, updates, prepared) -> float:
    cache = SinkCache(window_length, num_sink_tokens).bind(model)
    logits = []
    with torch.no_grad():
        for ids in tokens.split(updates, dim=1):
            inputs = cache.prepare_inputs(ids) if prepared else {"input_ids": ids, CACHE: cache}
            logits.append(model(**inputs).logits[0])
    assert cache.get_seq_length() == tokens.shape[1]
    return difference(torch.cat(logits), oracle(model, tokens[0].tolist(), window_length, num_sink_tokens))


LOOPS = [((16, 0), "sdpa", False), ((16, 0), "eager", True), ((5, 4), "sdpa", True), ((1, 0), "eager", False)]
LOOPS += [((1, 0), "sdpa", True)]


@pytest.mark.parametrize(
    "window, attn_implementation, prepared",
    [((16, 4), "sdpa", True), ((16, 4), "eager", False), *(on_the_newest(*case) for case in LOOPS)],
    ids=str,
)
def test_a_loop_of_ones_own(window, attn_implementation, prepared):
    model = small_model(attn_implementation=attn_implementation)
    assert own_loop(model, prompt(60), *window, [1] * 60, prepared) < 1e-5


UPDATES = [[10, 5, 3, 7, 12, 1, 1, 11], [2, 14, 16, 1], [40, 1, 30, 1, 1], [3, 2, 60]]
WINDOWS = [(16, 4), (16, 0), (16, 15), (12, 1), (1, 0)]
CUTS = [(updates, window) for updates in UPDATES for window in WINDOWS]


@pytest.mark.parametrize(
    "updates, window, attn_implementation",
    [(UPDATES[0], (16, 4), "sdpa"), (UPDATES[2], (16, 4), "eager")]
    + [on_the_newest(*case, ["sdpa", "eager"][number % 2]) for number, case in enumerate(CUTS) if case[1] != (16, 4)],
    ids=str,
)
def test_updates_of_several_tokens_in_a_loop_of_ones_own(updates, window, attn_implementation):
    model = small_model(attn_implementation=attn_implementation)
    assert own_loop(model, prompt(sum(updates)), *window, updates, prepared=True) < 1e-5


@pytest.mark.parametrize("trained_length", [24, on_the_newest(33)])
def test_updates_of_several_tokens_while_positions_are_shifted_back(trained_length):
    model, updates = small_model(max_position_embeddings=trained_length), [7, 20, 1, 13, 1, 19, 20, 2, 20, 1, 1, 16]
    assert own_loop(model, prompt(sum(updates)), 16, 4, updates, prepared=True) < 1e-5


def test_several_tokens_that_evict_need_the_mask_of_prepare_inputs():
    model = small_model()
    assert own_loop(model, prompt(16), 16, 4, [10, 6], prepared=False) < 1e-5
    with pytest.raises(ValueError, match="these 7 tokens evict some.*prepare_inputs"):
        own_loop(model, prompt(17), 16, 4, [10, 7], prepared=False)


@pytest.mark.newest_only
def test_a_prepared_loop_keeps_positions_bounded():
    model = small_model(max_position_embeddings=17)
    assert own_loop(model, prompt(60), 16, 4, [1] * 60, prepared=True) < 1e-5


def test_a_loop_goes_on_prepared_where_the_model_may_not_count_further():
    model, tokens = small_model(max_position_embeddings=40), prompt(100)
    cache = SinkCache(16, 4).bind(model)
    with torch.no_grad():
        logits = [model(input_ids=ids, **{CACHE: cache}).logits[0] for ids in tokens[:, :40].split(1, dim=1)]
        with pytest.raises(ValueError, match="past the 40 that it was trained on.*prepare_inputs"):
            model(input_ids=tokens[:, 40:41], **{CACHE: cache})
        logits += [model(**cache.prepare_inputs(ids)).logits[0] for ids in tokens[:, 40:].split(1, dim=1)]
        with pytest.raises(ValueError, match="positions shifted back.*prepare_inputs"):
            model(input_ids=prompt(1), **{CACHE: cache})
    assert difference(torch.cat(logits), oracle(model, tokens[0].tolist(), 16, 4)) < 1e-5


@pytest.mark.parametrize("asked", [True, False], ids=["by an argument", "by the configuration"])
def test_routers_whose_loss_takes_no_mask_of_ours(asked):
    """It is made of a mask of padding, and a stream gives the model one over the keys that are kept."""
    experts = dict(num_local_experts=2, num_experts_per_tok=1, sliding_window=None, output_router_logits=not asked)
    model = small_model(MixtralConfig(**SMALL, **experts))
    argument = dict(output_router_logits=True) if asked else {}
    tokens, logits = stream(model, prompt(40), 16, 4, 5, **argument)
    expected = oracle(model, tokens, 16, 4, output_router_logits=False)
    assert difference(logits, expected[39:-1]) < 1e-5
    padded = dict(attention_mask=(torch.arange(40) >= torch.tensor([[0], [7]])).long())
    rows = torch.cat([prompt(40), prompt(40)])
    rows[1, :7], rows[1, 7:] = 0, prompt(40)[0, :33]
    with seeded():
        output = generate(model, 16, 4, input_ids=rows, max_new_tokens=5, do_sample=False, **padded, **argument)
    assert torch.equal(output[0], generate(model, 16, 4, input_ids=prompt(40), max_new_tokens=5, do_sample=False)[0])


def test_several_turns():
    model = small_model()
    cache = SinkCache(16, 4)
    tokens = prompt(10)
    for turn in range(3):
        before = tokens.shape[1]
        # With a mask: a random model may well say the pad token, which transformers would take for padding.
        output = answer(model, cache, tokens, seed=turn, attention_mask=torch.ones_like(tokens))
        expected = oracle(model, output.sequences[0].tolist(), 16, 4)[before - 1 : -1]
        assert difference(torch.cat(output.logits), expected) < 1e-5
        assert output[CACHE] is cache
        tokens = torch.cat([output.sequences, prompt(7, seed=turn)], dim=1)


STORY = """The lighthouse stood on the last rock before the open sea, and nobody had lived in it for thirty years when
the lamp was seen again. It was the boy who saw it first, from the harbour wall, and he told no one until the third
night, because the keeper had been his grandfather, and"""


@pytest.mark.slow
@pytest.mark.newest_only
def test_the_real_model(real_model):
    model, tokenizer = real_model
    input_ids = tokenizer(STORY, return_tensors="pt").input_ids
    assert error(model, input_ids[:, :40], 24, 4, max_new_tokens=8) < 1e-5


@pytest.mark.slow
@pytest.mark.newest_only
def test_the_perplexity_of_a_long_prompt_whatever_its_chunks(real_model):
    model, tokenizer = real_model
    tokens = tokenizer(pydoc_data.topics.topics["comparisons"], return_tensors="pt").input_ids[:, :65]
    perplexities = []
    for chunk_size in (1, 7, 25):
        cache, logits = SinkCache(40, 4).bind(model), []
        with torch.no_grad():
            for ids in tokens[:, :64].split([39] + [chunk_size] * (25 // chunk_size) + [25 % chunk_size], dim=1):
                logits += [model(**cache.prepare_inputs(ids)).logits[0]] if ids.shape[1] else []
        loss = torch.nn.functional.cross_entropy(torch.cat(logits)[39:], tokens[0, 40:])
        perplexities.append(float(loss.exp()))
    assert max(perplexities) - min(perplexities) < 5e-5 * min(perplexities)


@pytest.mark.slow
@pytest.mark.skipif(RELEASE < Version("4.56"), reason="transformers caches layers of several kinds from 4.56")
def test_a_real_model_whose_layers_slide(real_hybrid_model):
    # Five of six layers slide over the last 512 tokens; with the whole cache a step is 5e-6 off one pass over all.
    model, tokenizer = real_hybrid_model
    input_ids = tokenizer(STORY, return_tensors="pt").input_ids
    assert error(model, input_ids[:, :40], 24, 4, max_new_tokens=8) < 2e-5
