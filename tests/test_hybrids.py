"""Layers that slide, attend by chunks or keep a state stay what they are beside those that get a sink cache."""

import copy

import pytest
import safetensors
import safetensors.torch
import torch
from packaging.version import Version
from transformers import CONFIG_MAPPING, AttentionInterface, AutoModelForCausalLM

from custom_generate.generate import CACHE, SinkCache, SinkLayer, generate
from tests.support.helpers import RELEASE, SMALL, at_the_ends, left_padded, prompt, seeded, small_model, stream
from tests.support.oracle import difference, oracle

FULL, SLIDING, CHUNKED, LINEAR = "full_attention", "sliding_attention", "chunked_attention", "linear_attention"
EXPERTS = dict(num_local_experts=2, num_experts_per_tok=1)
MAMBA2 = dict(mamba_n_heads=8, mamba_d_head=16, mamba_d_state=8, mamba_chunk_size=16)
SLIDE = {
    "gemma3_text": dict(layer_types=[SLIDING, FULL], sliding_window=10),  # two kinds of rotation
    "cohere2": dict(layer_types=[SLIDING, FULL], sliding_window=10),  # no positions where it is full
    "gpt_oss": dict(layer_types=[SLIDING, FULL], sliding_window=24, **EXPERTS),  # sinks of its own
    "llama4_text": dict(layer_types=[CHUNKED, FULL], attention_chunk_size=10, intermediate_size_mlp=64, **EXPERTS),
}
KEEP_A_STATE = {
    "qwen3_next": dict(
        layer_types=[LINEAR, FULL],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    ),
    "lfm2": dict(layer_types=["conv", FULL]),  # convolutions
    "bamba": dict(attn_layer_indices=[1], **MAMBA2),
    "falcon_h1": dict(mamba_d_ssm=64, **MAMBA2 | dict(mamba_n_heads=4)),  # both in each layer
    "jamba": dict(  # no positions, and its states are forgotten where several tokens come at once
        num_experts=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        mamba_dt_rank=4,
        mamba_d_state=8,
        use_mamba_kernels=False,
    ),
}
SERVED = [
    *(SLIDE if Version("4.56") <= RELEASE else []),
    *(KEEP_A_STATE if Version("5.15") <= RELEASE else []),
]
pytestmark = pytest.mark.skipif(not SERVED, reason="transformers caches layers of several kinds from 4.56")

# Between the ends, one of each kind of layer has more to do than to give the right logits while positions are shifted.
CORE = ["gemma3_text", "llama4_text", "qwen3_next", "falcon_h1"]
SOME = [name if name in CORE else at_the_ends(name) for name in SERVED]

with_states = pytest.mark.skipif(RELEASE < Version("5.15"), reason="until 5.14 transformers forgets states on its way")


def hybrid(name: str, **settings):
    config = CONFIG_MAPPING[name](**{**SMALL, "head_dim": 16, **{**SLIDE, **KEEP_A_STATE}[name], **settings})
    return small_model(config, attn_implementation="eager" if name == "gpt_oss" else "sdpa")


@pytest.mark.ends_only
@pytest.mark.parametrize("name", SERVED)
def test_every_step_far_past_the_window(name):
    model = hybrid(name)
    output = stream(model, prompt(3))
    assert difference(torch.cat(output.logits), oracle(model, output.sequences[0].tolist(), 16, 4)[2:-1]) < 1e-5
    kinds = {isinstance(layer, SinkLayer) for layer in output[CACHE].layers}
    assert kinds == ({True} if name == "falcon_h1" else {True, False})


@pytest.mark.parametrize("name", SERVED)
def test_every_step_while_positions_are_shifted_back(name):
    # Those of the keys in sliding layers too, and in bounds that are below what such a layer reaches across.
    model = hybrid(name, max_position_embeddings=20)
    output = stream(model, prompt(3))
    assert difference(torch.cat(output.logits), oracle(model, output.sequences[0].tolist(), 16, 4)[2:-1]) < 1e-5


@pytest.mark.parametrize("name", SOME)
def test_a_long_prompt_in_chunks(name):
    model = hybrid(name)
    output = stream(model, prompt(60), max_new_tokens=10, prefill_chunk_size=7)
    expected = oracle(model, output.sequences[0].tolist(), 16, 4)[59:-1]
    assert difference(torch.cat(output.logits), expected) < 1e-5


@pytest.mark.parametrize("name", SOME)
def test_each_row_as_if_alone(name):
    model = hybrid(name, max_position_embeddings=20)
    prompts = [prompt(length, seed=length) for length in (3, 30, 12)]
    settings = dict(
        max_new_tokens=20,
        do_sample=False,
        prefill_chunk_size=7,
        return_dict_in_generate=True,
        output_logits=True,
    )
    # Padded by some token: the embedding of the model's own is zero, and would go unnoticed.
    batch = generate(model, 16, 4, **left_padded(prompts, padding=7), **settings)
    for row, ids in enumerate(prompts):
        alone = generate(model, 16, 4, input_ids=ids, **settings)
        assert difference(torch.stack(batch.logits)[:, row], torch.cat(alone.logits)) < 1e-5


@pytest.mark.ends_only
@pytest.mark.parametrize("name", SERVED)
def test_rows_that_hold_equally_many_tokens(name):
    # Their prompts are longer than the window, and so is none of the padding left when several tokens come.
    model = hybrid(name)
    settings = dict(max_new_tokens=10, do_sample=False, return_dict_in_generate=True, output_logits=True)
    alone = generate(model, 16, 4, input_ids=prompt(60, seed=1), **settings)
    batch = generate(model, 16, 4, **left_padded([prompt(60, seed=1), prompt(55, seed=2)], padding=7), **settings)
    assert difference(torch.stack(batch.logits)[:, 0], torch.cat(alone.logits)) < 1e-5


@pytest.mark.parametrize("name", SOME)
def test_turns_copies_files_and_resets_are_one_stream(name, tmp_path):
    model = hybrid(name, max_position_embeddings=20)
    first = stream(model, prompt(30), 10)
    cache = first[CACHE]
    cache.save(tmp_path / "conversation")
    caches = [copy.deepcopy(cache), SinkCache.load(tmp_path / "conversation", model), cache]
    said = torch.cat([first.sequences, prompt(5)], dim=1)
    for cache in caches:
        # With a mask: a random model may well say the pad token, which transformers would take for padding.
        output = stream(model, said, 12, past_key_values=cache, attention_mask=torch.ones_like(said))
        expected = oracle(model, output.sequences[0].tolist(), 16, 4)
        assert difference(torch.cat(output.logits), expected[44:-1]) < 1e-5
    cache.reset()
    again = stream(model, prompt(30), 10, past_key_values=cache)
    assert difference(torch.cat(again.logits), torch.cat(first.logits)) < 1e-6


@pytest.mark.parametrize("name", SOME)
def test_beams_follow_their_hypotheses(name):
    # A beam's score is that of its tokens streamed by themselves.
    model = hybrid(name, max_position_embeddings=20)
    settings = dict(num_beams=3, num_return_sequences=3, max_new_tokens=25, return_dict_in_generate=True)
    output = generate(model, 16, 4, input_ids=prompt(3), do_sample=False, output_scores=True, **settings)
    for sequence, score in zip(output.sequences, output.sequences_scores):
        logits = oracle(model, sequence.tolist(), 16, 4)[2:-1].log_softmax(dim=-1)
        assert abs(logits.gather(1, sequence[3:, None]).mean() - score) < 1e-4


@pytest.mark.ends_only
@pytest.mark.parametrize("name", [name for name in SERVED if name in CORE])
def test_a_bound_cache_follows_its_batch(name):
    model, tokens, rows = hybrid(name, max_position_embeddings=20), prompt(30, rows=2), torch.tensor([1, 1, 0])
    logits = []
    for rearranged in (False, True):
        cache = SinkCache(16, 4).bind(model)
        with torch.no_grad():
            for ids in tokens[:, :29].split(1, dim=1):
                model(**cache.prepare_inputs(ids, torch.ones(2, cache.get_seq_length() + 1)))
            if rearranged:
                cache.batch_select_indices(rows)
            last = tokens[rows, 29:] if rearranged else tokens[:, 29:]
            logits.append(model(**cache.prepare_inputs(last)).logits[:, 0])
    assert difference(logits[1], logits[0][rows]) < 1e-6


@pytest.mark.parametrize("prepared", [at_the_ends(False), True], ids=["by itself", "prepared"])
@pytest.mark.parametrize("name", SOME)
def test_a_loop_of_ones_own(name, prepared):
    # Bamba gives position 0 to every token that comes alone.
    model, tokens = hybrid(name, max_position_embeddings=20 if prepared else 512), prompt(50)
    cache, logits = SinkCache(16, 4).bind(model), []
    with torch.no_grad():
        for ids in tokens.split([10] + [1] * 40, dim=1):
            inputs = cache.prepare_inputs(ids) if prepared else {"input_ids": ids, CACHE: cache}
            if name == "bamba" and not prepared and cache.get_seq_length() > 0:
                with pytest.raises(ValueError, match="the model would start over from position 0"):
                    model(**inputs)
                return
            logits.append(model(**inputs).logits[0])
    assert difference(torch.cat(logits), oracle(model, tokens[0].tolist(), 16, 4)) < 1e-5


@pytest.mark.parametrize("no_rope_layers, length", [([1, 0], 30), at_the_ends([1, 1], 3)], ids=str)
def test_positions_and_places_stay_below_where_a_model_scales_its_queries(no_rope_layers, length):
    settings = dict(no_rope_layers=no_rope_layers, attn_scale=0.5)
    model = hybrid("llama4_text", floor_scale=17, **settings)
    output = stream(model, prompt(length), 40)
    expected = oracle(hybrid("llama4_text", **settings), output.sequences[0].tolist(), 16, 4)[length - 1 : -1]
    assert difference(torch.cat(output.logits), expected) < 1e-5
    batch = generate(model, 16, 4, **left_padded([prompt(length), prompt(9, seed=1)]), max_new_tokens=20)
    alone = generate(model, 16, 4, input_ids=prompt(9, seed=1), max_new_tokens=20)
    assert torch.equal(batch[1, -20:], alone[0, -20:])
    with pytest.raises(ValueError, match="`window_length` must be at most 16, got 17"):
        generate(model, 17, 4, input_ids=prompt(3))


def test_no_key_of_a_layer_that_slides_is_shifted_back_twice():
    # A key that is 5,999 tokens old has met one shift at most if 6,000 positions lie between two.
    model = hybrid("cohere2", sliding_window=6000, max_position_embeddings=10000)
    cache = SinkCache(16, 4).bind(model)
    with pytest.raises(ValueError, match="`input_ids` must be at most 6000 tokens at a time"):
        cache.prepare_inputs(prompt(6001))


def attention_with_alibi(module, query, key, value, attention_mask, scaling, **kwargs):
    """Attention with a bias that grows with a key's place in the cache (ALiBi, arXiv:2108.12409)."""
    key, value = (states.repeat_interleave(module.num_key_value_groups, dim=1) for states in (key, value))
    length, num_keys = query.shape[2], key.shape[2]
    weights = query @ key.transpose(2, 3) * scaling + 0.1 * torch.arange(num_keys)
    weights = weights.masked_fill(torch.ones(length, num_keys).triu(num_keys - length + 1).bool(), -torch.inf)
    return (weights.softmax(dim=-1) @ value).transpose(1, 2), weights


@with_states
def test_attention_by_the_order_in_the_cache_is_refused_beside_states_too():
    AttentionInterface.register("alibi", attention_with_alibi)
    model = hybrid("jamba")
    model.config._attn_implementation = "alibi"
    with pytest.raises(ValueError, match="no layer rotates its keys with their position"):
        stream(model, prompt(3))


@with_states
def test_a_model_that_forgets_its_states_gets_one_token_at_a_time_or_an_error():
    model, tokens = hybrid("jamba"), prompt(12)
    cache = SinkCache(16, 4).bind(model)
    with torch.no_grad():
        model(**cache.prepare_inputs(tokens[:, :5]))
        with pytest.raises(ValueError, match="`input_ids` must be at most 1 tokens at a time for this model, got 2"):
            cache.prepare_inputs(tokens[:, 5:7])
        with pytest.raises(ValueError, match="forgets its states where it gets several tokens at once"):
            model(input_ids=tokens[:, 5:7], **{CACHE: cache})


@with_states
def test_a_cache_whose_states_are_ahead_of_its_keys():
    # The first layer has taken the token in when the second fails: no count of tokens shows that.
    model = hybrid("qwen3_next")
    output = stream(model, prompt(3), 5)
    hook = model.model.layers[1].register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        stream(model, output.sequences, 5, past_key_values=output[CACHE])
    hook.remove()
    with pytest.raises(ValueError, match=f"`{CACHE}` was left in the middle of a forward pass"):
        stream(model, output.sequences, 5, past_key_values=output[CACHE])


@pytest.mark.ends_only
@pytest.mark.parametrize("name", SERVED)
def test_what_can_not_be_taken_back_is_not_cropped(name):
    cache = stream(hybrid(name), prompt(3), 5)[CACHE]
    with pytest.raises(ValueError, match="only if bound to a model with full attention in every layer"):
        cache.crop(-1)


@pytest.mark.ends_only
@pytest.mark.parametrize("name", SERVED)
def test_a_damaged_file_of_each_kind_of_layer(name, tmp_path):
    model, cache, path = hybrid(name), SinkCache(16, 4), tmp_path / "conversation"
    stream(model, prompt(30), max_new_tokens=10, past_key_values=cache)
    cache.save(path)
    with safetensors.safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name).clone() for name in file.keys()}
    for damaged in tensors.keys() - {"fingerprint", "latest_ids"}:
        cut = {**tensors, damaged: tensors[damaged][..., 1:].clone()}
        for others in (cut, {name: tensor for name, tensor in tensors.items() if name != damaged}):
            safetensors.torch.save_file(others, path, metadata)
            with pytest.raises(ValueError, match="conversation'.*something in it was changed after it was written"):
                SinkCache.load(path, model)


@pytest.mark.skipif(RELEASE < Version("5.8"), reason="this release has no such model")
def test_gemma4_without_layers_that_share_keys():
    """Up to 5.8 at least, transformers' cache then has no layers, and those that slide looked like any others."""
    settings = dict(global_head_dim=16, hidden_size_per_layer_input=0, num_kv_shared_layers=0, sliding_window=10)
    config = CONFIG_MAPPING["gemma4_text"](**{**SMALL, "head_dim": 16}, **settings, layer_types=[SLIDING, FULL])
    with seeded():
        model = AutoModelForCausalLM.from_config(config).eval()
    output = stream(model, prompt(5))
    assert difference(torch.cat(output.logits), oracle(model, output.sequences[0].tolist(), 16, 4)[4:-1]) < 1e-5
