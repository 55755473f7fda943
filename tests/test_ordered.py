"""Models that know the order of tokens by the columns of their cache, as by ALiBi, get their keys in order."""

import copy

import pytest
import torch
from packaging.version import Version
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BloomConfig,
    CompileConfig,
    DynamicCache,
    FalconConfig,
    GPT2Config,
    MptConfig,
    OPTConfig,
)

from custom_generate.generate import CACHE, SinkCache, generate, read_model
from tests.support.helpers import (
    RELEASE,
    SMALL,
    at_the_ends,
    changing,
    left_padded,
    on_the_newest,
    prompt,
    seeded,
    small_model,
    stream,
)
from tests.support.oracle import difference, oracle_in_order
from tests.test_synced import Others
from tests.test_taking_back import feed

TINY = dict(vocab_size=SMALL["vocab_size"], initializer_range=0.3, eos_token_id=None, pad_token_id=None)
CONFIGS = {
    "bloom": lambda **settings: BloomConfig(**TINY, hidden_size=64, n_layer=2, n_head=4, **settings),
    "falcon": lambda **settings: FalconConfig(
        **TINY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, alibi=True, **settings
    ),
    # Heads that share keys, and more of them than a power of 2.
    "falcon, new": lambda: FalconConfig(
        **TINY,
        hidden_size=96,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_kv_heads=2,
        new_decoder_architecture=True,
        alibi=True,
    ),
    "mpt": lambda max_seq_len=32: MptConfig(**TINY, d_model=64, n_layers=2, n_heads=4, max_seq_len=max_seq_len),
}
if RELEASE < Version("4.54"):  # until then it has a cache of its own
    CONFIGS.pop("mpt")
# Between the ends, that every step is right shows that each is read rightly; the rest is the same code for all.
NAMES = [name if name == "bloom" else at_the_ends(name) for name in CONFIGS]


def ordered(name: str, **settings):
    with seeded():
        return AutoModelForCausalLM.from_config(CONFIGS[name](**settings)).eval()


def told(model) -> list[tuple]:
    """A list that grows by how many columns `model` is told of before each call, and by its inputs."""
    calls: list[tuple] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((kwargs[CACHE].get_seq_length(), kwargs)),
        with_kwargs=True,
    )
    return calls


OTHER_WINDOWS = [("bloom", (16, 0)), ("falcon", (5, 4)), ("falcon, new", (16, 15)), ("bloom", (1, 0))]
OTHER_WINDOWS += [("mpt", (16, 15))] if "mpt" in CONFIGS else []


@pytest.mark.parametrize(
    "name, window",
    [
        ("bloom", (16, 4)),
        *(at_the_ends(name, (16, 4)) for name in CONFIGS if name != "bloom"),
        *(on_the_newest(*case) for case in OTHER_WINDOWS),
    ],
    ids=str,
)
def test_every_step_far_past_the_window(name, window):
    model = ordered(name)
    with seeded():
        settings = dict(min_new_tokens=36, do_sample=True, return_dict_in_generate=True, output_logits=True)
        output = generate(model, *window, input_ids=prompt(3), max_new_tokens=36, **settings)
    expected = oracle_in_order(model, output.sequences[0].tolist(), *window)
    assert difference(torch.cat(output.logits), expected[2:-1]) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_a_model_that_counts_the_columns_of_its_cache_by_itself(name):
    model = ordered(name)
    own = model.forward

    def forward(attention_mask=None, **kwargs):  # as long as there is no padding
        return own(**kwargs, attention_mask=attention_mask if 0 in attention_mask else None)

    model.forward = forward
    output = stream(model, prompt(20))
    expected = oracle_in_order(ordered(name), output.sequences[0].tolist(), 16, 4)
    assert difference(torch.cat(output.logits), expected[19:-1]) < 1e-5


@pytest.mark.parametrize("attn_implementation", ["sdpa", at_the_ends("eager")])
def test_either_attention(attn_implementation):
    with seeded():
        model = AutoModelForCausalLM.from_config(CONFIGS["falcon"](), attn_implementation=attn_implementation).eval()
    output = stream(model, prompt(3))
    expected = oracle_in_order(model, output.sequences[0].tolist(), 16, 4)
    assert difference(torch.cat(output.logits), expected[2:-1]) < 1e-5


PROMPTS = [("bloom", 15, None), ("bloom", 16, 1), ("bloom", 17, None), ("falcon", 40, 7), ("falcon, new", 40, 1)]
PROMPTS += [("mpt", 40, None), ("mpt", 17, 7)] if "mpt" in CONFIGS else []


@pytest.mark.parametrize(
    "name, length, prefill_chunk_size",
    [("bloom", 16, None), ("bloom", 40, None), *(on_the_newest(*case) for case in PROMPTS)],
)
def test_a_prompt_of_any_length(name, length, prefill_chunk_size):
    model = ordered(name)
    output = stream(model, prompt(length), max_new_tokens=10, prefill_chunk_size=prefill_chunk_size)
    expected = oracle_in_order(model, output.sequences[0].tolist(), 16, 4)
    assert difference(torch.cat(output.logits), expected[length - 1 : -1]) < 1e-5


def test_a_prompt_goes_in_at_once_up_to_the_window_and_then_token_by_token():
    model, cache = ordered("bloom"), SinkCache(16, 4)
    cache.bind(model)
    calls = told(model)
    stream(model, prompt(20), max_new_tokens=3, past_key_values=cache)
    assert [kwargs["input_ids"].shape[1] for _, kwargs in calls] == [16, 1, 1, 1, 1, 1, 1]
    assert [kept for kept, _ in calls] == [0, *[15] * 6]
    assert all(kwargs["attention_mask"].tolist() == [[1] * 16] for _, kwargs in calls)
    assert all(kwargs.get("position_ids") is None for _, kwargs in calls)
    assert cache.get_seq_length() == 22


@pytest.mark.parametrize(
    "name, prefill_chunk_size",
    [("bloom", None), at_the_ends("bloom", 5), at_the_ends("falcon, new", 1), at_the_ends("falcon", None)],
)
def test_each_row_as_if_alone(name, prefill_chunk_size):
    model = ordered(name)
    prompts = [prompt(length, seed=length) for length in (3, 30, 12)]
    settings = dict(max_new_tokens=24, do_sample=False, return_dict_in_generate=True, output_logits=True)
    batch = generate(model, 16, 4, **left_padded(prompts, padding=7), prefill_chunk_size=prefill_chunk_size, **settings)
    for row, ids in enumerate(prompts):
        alone = generate(model, 16, 4, input_ids=ids, **settings)
        assert difference(torch.stack(batch.logits)[:, row], torch.cat(alone.logits)) < 1e-5


@pytest.mark.ends_only
@pytest.mark.parametrize("name, lengths", [("bloom", (9, 9)), ("falcon, new", (4, 4, 4)), ("falcon", (4, 4, 4))])
def test_rows_that_are_padded_alike(name, lengths):
    model = ordered(name)
    prompts = [prompt(length, seed=row) for row, length in enumerate(lengths)]
    inputs = {key: value[:, -12:] for key, value in left_padded([*prompts, prompt(12)], padding=7).items()}
    inputs = {key: value[:-1] for key, value in inputs.items()}
    settings = dict(max_new_tokens=30, do_sample=False, return_dict_in_generate=True, output_logits=True)
    batch = generate(model, 16, 4, **inputs, **settings)
    for row, ids in enumerate(prompts):
        alone = generate(model, 16, 4, input_ids=ids, **settings)
        assert difference(torch.stack(batch.logits)[:, row], torch.cat(alone.logits)) < 1e-5


OTHER_UPDATES = [("bloom", [12]), ("falcon", [10, 2]), ("falcon, new", [11, 1, 3, 1])]


@pytest.mark.parametrize(
    "name, updates", [("bloom", [11, 1, 3, 1]), *(on_the_newest(*case) for case in OTHER_UPDATES)], ids=str
)
def test_a_loop_of_ones_own_with_padded_rows(name, updates):
    # Rows go on with fewer tokens than others, are full one after the other, and lie in the ring in other places.
    model = ordered(name)
    cache = SinkCache(16, 4).bind(model)
    inputs, then = left_padded([prompt(length, seed=length) for length in (12, 5, 3)], padding=7), prompt(40, rows=3)
    tokens = torch.cat([inputs["input_ids"], then], dim=1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(then)], dim=1)
    logits, updates = [], [*updates, *[1] * (52 - sum(updates))]
    with torch.no_grad():
        for ids in tokens.split(updates, dim=1):
            end = cache.get_seq_length() + ids.shape[1]
            logits.append(model(**cache.prepare_inputs(ids, mask[:, :end])).logits)
    for row, length in enumerate((12, 5, 3)):
        expected = oracle_in_order(model, tokens[row, -40 - length :].tolist(), 16, 4)
        assert difference(torch.cat(logits, dim=1)[row, -40:], expected[-40:]) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_turns_copies_files_and_resets_are_one_stream(name, tmp_path):
    model = ordered(name)
    first = stream(model, prompt(30), 10)
    cache = first[CACHE]
    cache.save(tmp_path / "conversation")
    caches = [copy.deepcopy(cache), SinkCache.load(tmp_path / "conversation", model), cache]
    said = torch.cat([first.sequences, prompt(5)], dim=1)
    for cache in caches:
        output = stream(model, said, 12, past_key_values=cache)
        expected = oracle_in_order(model, output.sequences[0].tolist(), 16, 4)
        assert difference(torch.cat(output.logits), expected[44:-1]) < 1e-5
    cache.reset()
    again = stream(model, prompt(30), 10, past_key_values=cache)
    assert difference(torch.cat(again.logits), torch.cat(first.logits)) < 1e-6
    with pytest.raises(ValueError, match="another model"):
        SinkCache.load(tmp_path / "conversation", small_model())


@pytest.mark.parametrize("name", NAMES)
def test_a_second_turn_while_the_window_has_room(name):
    model, cache = ordered(name), SinkCache(16, 4)
    output = stream(model, prompt(4), 3, past_key_values=cache)
    said = torch.cat([output.sequences, prompt(6)], dim=1)
    output = stream(model, said, 20, past_key_values=cache)
    expected = oracle_in_order(model, output.sequences[0].tolist(), 16, 4)
    assert difference(torch.cat(output.logits), expected[said.shape[1] - 1 : -1]) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_beams_follow_their_hypotheses(name):
    # A beam's score is that of its tokens streamed by themselves.
    model = ordered(name)
    settings = dict(num_beams=3, num_return_sequences=3, max_new_tokens=24, return_dict_in_generate=True)
    output = generate(model, 16, 4, input_ids=prompt(3), do_sample=False, output_scores=True, **settings)
    for sequence, score in zip(output.sequences, output.sequences_scores):
        logits = oracle_in_order(model, sequence.tolist(), 16, 4)[2:-1].log_softmax(dim=-1)
        assert abs(logits.gather(1, sequence[3:, None]).mean() - score) < 1e-4


@pytest.mark.parametrize(
    "seen, taken", [(30, 5), *(on_the_newest(*case) for case in [(10, 5), (16, 1), (16, 5), (30, 1)])]
)
def test_tokens_taken_back(seen, taken):
    model = ordered("bloom")
    cache, tokens = SinkCache(16, 4).bind(model), prompt(seen)
    feed(model, cache, tokens, [min(seen, 16), *[1] * (seen - 16)])
    if taken > 1:
        cache.activate_past_recording()
    feed(model, cache, prompt(taken, seed=1), [1] * taken)
    cache.crop(-taken)
    then = prompt(20, seed=2)
    logits = feed(model, cache, then, [1] * 20)
    expected = oracle_in_order(model, torch.cat([tokens, then], dim=1)[0].tolist(), 16, 4)
    assert difference(logits[0], expected[-20:]) < 1e-5


@pytest.mark.ends_only
@pytest.mark.parametrize("name", ["bloom", "falcon"])
def test_an_error_in_the_middle_of_a_forward_pass_loses_nothing(name):
    model, cache = ordered(name), SinkCache(16, 4)
    said = stream(model, prompt(3), 30, past_key_values=cache).sequences
    expected = stream(model, said, 20, past_key_values=copy.deepcopy(cache))
    layer = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))[1]
    hook = layer.register_forward_pre_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        stream(model, said, 20, past_key_values=cache)
    hook.remove()
    output = stream(model, said, 20, past_key_values=cache)
    assert torch.equal(output.sequences, expected.sequences)


def test_an_error_before_the_first_layer_leaves_the_count_of_tokens():
    model, cache = ordered("falcon"), SinkCache(16, 4)
    said = stream(model, prompt(3), 30, past_key_values=cache).sequences
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        stream(model, said, 20, past_key_values=cache)
    hook.remove()
    assert cache.get_seq_length() == 32


# --- a model called by itself


@pytest.mark.parametrize(
    "name, updates",
    [("bloom", [9, 1, 6]), on_the_newest("falcon", [1] * 16), on_the_newest("falcon, new", [10, 6])],
    ids=str,
)
def test_called_by_itself_until_it_must_evict(name, updates):
    model, tokens = ordered(name), prompt(40)
    cache, logits = SinkCache(16, 4).bind(model), []
    with torch.no_grad():
        for ids in tokens[:, :16].split(updates, dim=1):
            logits.append(model(input_ids=ids, **{CACHE: cache}, use_cache=True).logits[0])
        with pytest.raises(ValueError, match="can't go on outside of its `generate`.*columns"):
            model(input_ids=tokens[:, 16:17], **{CACHE: cache}, use_cache=True)
        assert cache.get_seq_length() == 16
        logits.append(feed(model, cache, tokens[:, 16:], [1] * 24)[0])
        with pytest.raises(ValueError, match="can't go on outside of its `generate`.*columns"):
            model(input_ids=tokens[:, :1], **{CACHE: cache}, use_cache=True)
        logits.append(feed(model, cache, prompt(3), [1] * 3)[0])
    expected = oracle_in_order(model, tokens[0].tolist() + prompt(3)[0].tolist(), 16, 4)
    assert difference(torch.cat(logits), expected) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_generate_of_transformers_with_a_bound_cache(name):
    model = ordered(name)
    settings = dict(input_ids=prompt(5), use_cache=True, do_sample=False)
    expected = model.generate(**settings, max_new_tokens=11, **{CACHE: DynamicCache()})
    assert torch.equal(model.generate(**settings, max_new_tokens=11, **{CACHE: SinkCache(16, 4).bind(model)}), expected)
    with pytest.raises(ValueError, match="can't go on outside of its `generate`.*columns"):
        model.generate(**settings, max_new_tokens=20, **{CACHE: SinkCache(16, 4).bind(model)})


def test_several_tokens_that_evict_go_in_one_by_one():
    model = ordered("bloom")
    cache = SinkCache(16, 4).bind(model)
    feed(model, cache, prompt(12), [12])
    with pytest.raises(ValueError, match="These 5 tokens evict some.*Pass one token at a time"):
        cache.prepare_inputs(prompt(5))
    logits = feed(model, cache, prompt(9, seed=1), [4, *[1] * 5])
    tokens = torch.cat([prompt(12), prompt(9, seed=1)], dim=1)[0].tolist()
    assert difference(logits[0], oracle_in_order(model, tokens, 16, 4)[-9:]) < 1e-5


# --- other ways to decode


@pytest.mark.parametrize("assistance", [dict(prompt_lookup_num_tokens=3), "assistant_model"], ids=str)
def test_drafts_are_not_checked(assistance):
    model = ordered("bloom")
    assistance = dict(assistant_model=small_model()) if isinstance(assistance, str) else assistance
    (name,) = assistance
    with pytest.raises(ValueError, match=f"`{name}` checks several tokens at once.*columns"):
        generate(model, 16, 4, input_ids=prompt(5), max_new_tokens=5, do_sample=False, **assistance)


@pytest.mark.slow
def test_drafts_are_made():
    model, assistant = small_model(), ordered("bloom")
    assistant.generation_config.assistant_confidence_threshold = 0.0
    settings = dict(input_ids=prompt(5), max_new_tokens=25, do_sample=False)
    expected = generate(model, 16, 4, **settings)
    assert torch.equal(generate(model, 16, 4, assistant_model=assistant, **settings), expected)


def test_steps_are_not_compiled():
    model, graphs = ordered("falcon"), []
    config = CompileConfig(fullgraph=True, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    config._compile_all_devices = True
    settings = dict(input_ids=prompt(5), max_new_tokens=20, do_sample=False)
    expected = generate(model, 16, 4, **settings)
    assert torch.equal(generate(model, 16, 4, compile_config=config, **settings), expected)
    assert graphs == []


@pytest.mark.newest_only
@pytest.mark.parametrize("name", CONFIGS)
def test_a_rank_that_waits_for_others(name, monkeypatch):
    model, cache = ordered(name), SinkCache(16, 4)
    settings = dict(input_ids=prompt(20), max_new_tokens=5, do_sample=False)
    expected = generate(model, 16, 4, **settings)
    Others(monkeypatch, steps=9, prompt_passes=7)
    assert torch.equal(generate(model, past_key_values=cache, synced_gpus=True, **settings), expected)
    assert cache.get_seq_length() == 24


# --- which models are ordered


@pytest.mark.skipif("mpt" not in CONFIGS, reason="until 4.53 MPT has a cache of its own")
def test_no_window_is_longer_than_the_bias_of_the_model():
    model, calls = ordered("mpt", max_seq_len=24), []
    generate(model, 24, 4, input_ids=prompt(3), max_new_tokens=30)
    for length in (25, 300):
        with pytest.raises(ValueError, match=f"`window_length` must be at most 24, got {length}"):
            SinkCache(length, 4).bind(model)
    changing(model.lm_head, lambda logits: calls.append(1) or logits)
    SinkCache(20, 4).bind(model)  # which reads it anew, as it was changed
    calls.clear()
    generate(model, 20, 4, input_ids=prompt(3), max_new_tokens=1)
    assert len(calls) == 1


def mask_counts_positions():
    return AutoModelForCausalLM.from_config(
        OPTConfig(
            **{**TINY, "init_std": 0.3}, hidden_size=32, word_embed_proj_dim=32, ffn_dim=32, num_attention_heads=2
        )
    )


def cache_counts_positions():
    return AutoModelForCausalLM.from_config(GPT2Config(**TINY, n_embd=32, n_layer=2, n_head=2, n_positions=128))


def positions_are_not_named():
    sizes = dict(d_model=32, decoder_ffn_dim=32, encoder_layers=2, decoder_layers=2, decoder_attention_heads=2)
    return AutoModelForCausalLM.from_config(BartConfig(vocab_size=211, is_decoder=True, **sizes))


@pytest.mark.parametrize("dtype", [torch.float32, at_the_ends(torch.bfloat16)])
@pytest.mark.parametrize("build", [mask_counts_positions, cache_counts_positions, positions_are_not_named])
def test_a_vector_for_each_place_is_not_an_order_of_columns(build, dtype):
    with seeded():
        model = build().to(dtype).eval()
    own = model.forward

    def forward(*args, position_ids=None, **kwargs):  # so that it is the columns that tell the model its positions
        return own(*args, **kwargs)

    model.forward = forward
    with pytest.raises(ValueError, match="what it makes of a token changes with its place in the sequence"):
        generate(model, 16, 4, input_ids=prompt(3), max_new_tokens=5)


def test_a_model_that_sees_padding_is_refused():
    model = ordered("bloom")
    own = model.forward
    model.forward = lambda attention_mask=None, **kwargs: own(**kwargs)
    with pytest.raises(ValueError, match="padding changes what it gives"):
        generate(model, 16, 4, input_ids=prompt(3), max_new_tokens=5)


@pytest.mark.newest_only
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["bloom", "falcon, new"])
def test_narrow_dtypes(name, dtype):
    model = ordered(name).to(dtype)
    assert read_model(model).ordered
    output = stream(model, prompt(3))
    expected = oracle_in_order(model, output.sequences[0].tolist(), 16, 4)
    assert difference(torch.cat(output.logits).float(), expected[2:-1].float()) < 4 * torch.finfo(dtype).eps


@pytest.mark.ends_only
@pytest.mark.parametrize("name", ["bloom", "falcon"])
def test_memory_is_a_window(name):
    model, cache = ordered(name), SinkCache(16, 4)
    output = stream(model, prompt(3), 13, past_key_values=cache)
    size = cache.nbytes
    stream(model, output.sequences, 40, past_key_values=cache)
    assert cache.nbytes == size


@pytest.mark.skipif("mpt" in CONFIGS, reason="from 4.54 it uses the cache that it is given")
def test_a_model_with_a_cache_of_its_own_is_refused():
    config = MptConfig(**TINY, d_model=64, n_layers=2, n_heads=4, max_seq_len=32)
    with pytest.raises(ValueError, match="gives it a cache of its own"):
        generate(AutoModelForCausalLM.from_config(config).eval(), 16, 4, input_ids=prompt(3), max_new_tokens=5)
