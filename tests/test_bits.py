"""Windows of 8 bits (`kv_bits=8`): the oracle's logits, where keys and values are rounded in the same places.

Rounding to codes is not continuous: float noise of 1e-7 makes a number another code now and then, and that shows until
its token leaves the window. So what is compared are medians over steps, of more than two windows.
"""

import copy
import json
import weakref

import pytest
import safetensors
import torch
from transformers import BloomConfig, CompileConfig, cache_utils

from custom_generate.generate import CACHE, SinkCache, generate
from tests.support.helpers import at_the_ends, left_padded, on_the_newest, prompt, seeded, small_model
from tests.support.oracle import RoundedCache, oracle, oracle_in_order, oracle_with_images
from tests.test_hybrids import SERVED, hybrid
from tests.test_towers import images_of, model_with_a_tower, typed

WINDOW = dict(window_length=16, num_sink_tokens=4, kv_bits=8)
CALL = dict(do_sample=True, return_dict_in_generate=True, output_logits=True)


def stream(model, ids, number=60, window=(16, 4), cache=None, seed=0, **kwargs):
    cache = SinkCache(*window, kv_bits=8) if cache is None else cache
    with seeded(seed):
        settings = dict(max_new_tokens=number, min_new_tokens=number, attention_mask=torch.ones_like(ids))
        settings |= CALL | kwargs
        return generate(model, input_ids=ids, past_key_values=cache, **settings)


def expected(model, tokens: list[int], cache, window=(16, 4)) -> torch.Tensor:
    """The oracle's logits of all `tokens`, with those behind the sinks rounded as `cache` has them."""
    cycle = cache.held.cycle if cache.held.cycle < len(tokens) else None
    columns, frequencies = range(window[1], len(tokens)), _frequencies(model) if cycle else None
    rounded = RoundedCache(model.config, columns, cycle, frequencies, cache.held.traits.factors)
    return oracle(model, tokens, *window, **{CACHE: rounded, "use_cache": True})


def _frequencies(model):
    return model.model.rotary_emb.inv_freq


def off(logits: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """The relative difference of each step: both `[steps, vocab_size]`."""
    return (logits - expected).norm(dim=-1) / expected.norm(dim=-1)


def assert_right(logits: torch.Tensor, expected: torch.Tensor) -> None:
    """The median step is the oracle's, and none is off by more than 8 bits are anyway."""
    differences = off(logits, expected)
    assert differences.median() < 1e-5
    assert differences.max() < 0.05


def assert_exact(model, output, start: int, window=(16, 4)) -> None:
    """`output` of `stream` after `start` tokens has the oracle's logits."""
    right = expected(model, output.sequences[0].tolist(), output[CACHE], window)
    assert_right(torch.cat(output.logits), right[start - 1 : -1])


@pytest.mark.parametrize(
    "architecture, window",
    [
        ("llama", (16, 4)),
        on_the_newest("llama", (16, 0)),
        on_the_newest("llama", (5, 4)),
        at_the_ends("qwen3", (16, 1)),
        at_the_ends("deepseek_v3", (16, 4)),  # whose "values" rotate
    ],
    ids=str,
)
def test_every_step_far_past_the_window(architecture, window):
    model = small_model(architecture)
    output = stream(model, prompt(3), 80, window)
    assert_exact(model, output, 3, window)
    # And 8 bits make a difference: what is tested above is not the window of 16.
    plain = oracle(model, output.sequences[0].tolist(), *window)[2:-1]
    assert off(torch.cat(output.logits), plain).median() > 1e-3


@pytest.mark.newest_only
def test_how_often_a_number_gets_another_code():
    model, differences = small_model(), []
    for seed in range(6):
        ids, cache = prompt(200, seed=seed), SinkCache(**WINDOW).bind(model)
        with torch.no_grad():
            logits = torch.cat([model(**cache.prepare_inputs(token)).logits[0] for token in ids.split(1, 1)])
        differences.append(off(logits, expected(model, ids[0].tolist(), cache)))
    differences = torch.cat(differences)
    assert differences.median() < 1e-6
    assert (differences > 1e-5).float().mean() < 0.15


@pytest.mark.parametrize(
    "length, start", [(17, 50), *(on_the_newest(*case) for case in [(16, 3), (16, 50), (24, 50), (40, 3)])]
)
def test_no_lowering_of_positions_rounds_again(length, start):
    # Positions stay below `length`. A cycle of half of it ends up to 14 times.
    model = small_model(max_position_embeddings=length)
    output = stream(model, prompt(start), 110, prefill_chunk_size=5)
    assert output[CACHE].held.cycle < length
    differences = off(
        torch.cat(output.logits),
        expected(model, output.sequences[0].tolist(), output[CACHE])[start - 1 : -1],
    )
    assert differences[-40:].median() < 2e-6
    assert differences.max() < 0.05


@pytest.mark.ends_only
def test_however_tokens_are_cut():
    model, ids = small_model(max_position_embeddings=40), prompt(70)
    right = None
    for chunk_size in (1, 3, 8, 11, None):
        cache = SinkCache(**WINDOW).bind(model)
        generate(model, input_ids=ids, past_key_values=cache, max_new_tokens=1, prefill_chunk_size=chunk_size)
        with torch.no_grad():
            logits = torch.cat(
                [model(**cache.prepare_inputs(token)).logits[0] for token in prompt(30, seed=1).split(1, 1)]
            )
        if right is None:
            right = expected(model, ids[0].tolist() + prompt(30, seed=1)[0].tolist(), cache)[70:]
        assert_right(logits, right)


@pytest.mark.ends_only
def test_each_row_as_if_alone():
    model = small_model(max_position_embeddings=40)
    prompts = [prompt(length, seed=length) for length in (30, 9, 2, 17)]
    settings = dict(max_new_tokens=40, do_sample=False, return_dict_in_generate=True, output_logits=True)
    batch = generate(model, **left_padded(prompts), **WINDOW, **settings)
    for row, ids in enumerate(prompts):
        tokens = ids[0].tolist() + batch.sequences[row, 30:].tolist()
        right = expected(model, tokens, batch[CACHE])[ids.shape[1] - 1 : -1]
        assert_right(torch.stack(batch.logits)[:, row], right)


@pytest.mark.ends_only
def test_turns_copies_and_files_are_one_stream(tmp_path):
    model = small_model(max_position_embeddings=24)
    output = stream(model, prompt(3), 30)
    cache, said = output[CACHE], output.sequences
    for turn in range(3):
        cache.save(tmp_path / "conversation")
        copied, loaded = copy.deepcopy(cache), SinkCache.load(tmp_path / "conversation", model)
        assert loaded.kv_bits == copied.kv_bits == 8
        assert all(torch.equal(one, other) for one, other in zip(loaded.key_cache, cache.key_cache))
        said = torch.cat([said, prompt(1 + turn, seed=turn)], dim=1)
        outputs = [stream(model, said, 9, cache=each) for each in (cache, copied, loaded)]
        for output in outputs:
            assert torch.equal(torch.cat(output.logits), torch.cat(outputs[0].logits))
        assert_exact(model, outputs[0], said.shape[1])
        said, cache = outputs[0].sequences, outputs[-1][CACHE]


@pytest.mark.newest_only
def test_half_a_file_and_half_the_memory(tmp_path):
    model = small_model(hidden_size=256, num_attention_heads=4).bfloat16()
    sizes, memory = [], []
    for bits in (None, 8):
        cache = SinkCache(256, 4, kv_bits=bits)
        generate(model, input_ids=prompt(300), past_key_values=cache, max_new_tokens=2)
        cache.save(tmp_path / "conversation")
        sizes.append((tmp_path / "conversation").stat().st_size)
        memory.append(cache.nbytes)
    assert sizes[1] < 0.6 * sizes[0]
    assert memory[1] < 0.56 * memory[0]  # of which the last chunk's evicted tokens are some
    assert {keys.dtype for keys in cache.key_cache} == {torch.bfloat16}
    with safetensors.safe_open(tmp_path / "conversation", "pt") as file:
        assert json.loads(file.metadata()["sink_cache"])["kv_bits"] == 8
        assert file.get_tensor("keys.0").dtype == torch.int8


@pytest.mark.ends_only
@pytest.mark.parametrize("length", [16, 40])
def test_tokens_taken_back(length):
    model, ids, logits = small_model(max_position_embeddings=length), prompt(80), []
    cache = SinkCache(**WINDOW).bind(model)
    with torch.no_grad():
        for start in range(0, 70, 5):
            model(**cache.prepare_inputs(prompt(5, seed=start)))
            cache.crop(-5) if start else cache.reset()
            logits.append(model(**cache.prepare_inputs(ids[:, start : start + 5])).logits[0])
        cache.activate_past_recording()
        for token in prompt(6, seed=1).split(1, 1):
            model(**cache.prepare_inputs(token))
        cache.crop(-6)
        logits.append(model(**cache.prepare_inputs(ids[:, 70:])).logits[0])
    assert_right(torch.cat(logits), expected(model, ids[0].tolist(), cache))
    assert off(logits[-1], expected(model, ids[0].tolist(), cache)[70:]).max() < 0.01


@pytest.mark.ends_only
def test_rows_in_another_order():
    model, ids = small_model(max_position_embeddings=24), prompt(120, rows=2)
    cache = SinkCache(**WINDOW).bind(model)
    right = torch.stack([expected(model, row.tolist(), cache) for row in ids])
    with torch.no_grad():
        for token in ids[:, :30].split(1, 1):
            model(**cache.prepare_inputs(token))
        cache.reorder_cache(torch.tensor([1, 0]))
        logits = torch.cat([model(**cache.prepare_inputs(token)).logits for token in ids[[1, 0], 30:].split(1, 1)], 1)
    for row in (0, 1):
        assert_right(logits[row], right[1 - row, 30:])


@pytest.mark.newest_only
def test_one_graph_for_compiled_steps():
    model, graphs = small_model(num_hidden_layers=2, max_position_embeddings=24), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    config._compile_all_devices = True
    for ids in (prompt(2), prompt(30), left_padded([prompt(9), prompt(3)])["input_ids"]):  # sinks that are decoded too
        if len(ids) > 1:
            graphs.clear()
            torch.compiler.reset()
        output = stream(model, ids, 60, compile_config=config)
        eager = stream(model, ids, 60, disable_compile=True)
        assert off(torch.cat(output.logits), torch.cat(eager.logits)).median() < 1e-5
        assert_exact(model, output, ids.shape[1]) if len(ids) == 1 else None
    assert len(graphs) <= 2


@pytest.mark.ends_only
@pytest.mark.parametrize("assistance", ["assistant_model", "prompt_lookup_num_tokens"])
def test_drafts(assistance):
    model = small_model(max_position_embeddings=64)
    assistant = small_model(num_hidden_layers=1, max_position_embeddings=64)
    settings = {assistance: assistant if assistance == "assistant_model" else 3}
    ids = prompt(6).repeat(1, 5)
    output = stream(model, ids, 40, do_sample=False, eos_token_id=1, **settings)
    assert_exact(model, output, 30)


@pytest.mark.ends_only
@pytest.mark.parametrize("name", ["gemma3_text", "falcon_h1"])
def test_layers_of_several_kinds(name):
    if name not in SERVED:
        pytest.skip("this release of transformers can't stream it")
    model = hybrid(name)
    output = stream(model, prompt(20), 40)
    if name == "gemma3_text":
        assert_exact(model, output, 20)
    again = stream(model, prompt(20), 40, prefill_chunk_size=3)
    assert off(torch.cat(output.logits), torch.cat(again.logits)).median() < 1e-5
    assert output[CACHE].nbytes < stream(model, prompt(20), 40, cache=SinkCache(16, 4))[CACHE].nbytes


@pytest.mark.skipif(not hasattr(cache_utils, "DynamicIndexedLayer"), reason="this release caches no keys of an index")
@pytest.mark.ends_only
def test_attention_that_chooses_by_an_index():
    from tests.test_indexed import indexed

    model = indexed()
    output = stream(model, prompt(40, seed=7), 40, seed=7)
    assert_exact(model, output, 40)
    assert output[CACHE].layers[0].indexer.keys.dtype == torch.float32  # it chooses, so it stays whole


@pytest.mark.ends_only
def test_a_model_that_goes_by_columns():
    sizes = dict(hidden_size=64, n_layer=3, n_head=4, initializer_range=0.3)
    model = small_model(BloomConfig(vocab_size=211, eos_token_id=None, pad_token_id=None, **sizes), "eager")
    output = stream(model, prompt(3), 60)
    tokens = output.sequences[0].tolist()
    rounded = RoundedCache(model.config, range(4, len(tokens)))
    assert_right(torch.cat(output.logits), oracle_in_order(model, tokens, 16, 4, rounded)[2:-1])


@pytest.mark.ends_only
@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])  # the latter with positions of several axes
def test_images(name):
    try:
        model = model_with_a_tower(name)
    except (ImportError, KeyError):
        pytest.skip("this release of transformers does not have it")
    ids, image, other = images_of(model, name)
    cache = SinkCache(**WINDOW)
    said = torch.cat([ids, prompt(9).clamp(2, 200), ids], dim=1)
    images = {key: torch.cat([image[key], other[key]]) for key in image}
    settings = dict(max_new_tokens=40, do_sample=False, suppress_tokens=[0, 208, 209, 210])
    settings |= dict(return_dict_in_generate=True, output_logits=True, past_key_values=cache)
    output = generate(model, input_ids=said, **images, **typed(said, name), **settings)
    rounded = RoundedCache(model.config, range(4, output.sequences.shape[1]))
    right = oracle_with_images(
        model, output.sequences, 16, 4, **images, **typed(output.sequences, name), **{CACHE: rounded, "use_cache": True}
    )
    assert_right(torch.cat(output.logits), right[said.shape[1] - 1 : -1])


@pytest.mark.ends_only
def test_kept_conversations():
    model = small_model()
    settings = dict(kept_conversations=2, max_new_tokens=30, do_sample=False) | WINDOW
    read = []  # by a hook from the start: with other hooks, a conversation is another
    model.model.layers[0].register_forward_pre_hook(lambda module, args: read.append(args[0].shape[1]))
    said = generate(model, input_ids=prompt(40), **settings)
    memory = SinkCache.kept_nbytes(model)
    said = torch.cat([said, prompt(3)], dim=1)
    read.clear()
    again = generate(model, input_ids=said, **settings)
    assert sum(read) == 3 + 1 + 29  # the new tokens, the last answer's last one, and this answer's
    assert torch.equal(again, generate(model, input_ids=said, max_new_tokens=30, do_sample=False, **WINDOW))
    generate(model, input_ids=said, **(settings | dict(kv_bits=None)))
    assert SinkCache.kept_nbytes(model) > 2.5 * memory  # whose window is another, and larger
    SinkCache.forget_kept(model)


@pytest.mark.parametrize("value, error", [(4, ValueError), (16, ValueError), (True, TypeError), ("8", TypeError)])
def test_other_values_are_refused_by_name(value, error):
    with pytest.raises(error, match="`kv_bits` must be"):
        SinkCache(16, 4, kv_bits=value)
    with pytest.raises(error, match="`kv_bits` must be"):
        generate(small_model(), input_ids=prompt(3), max_new_tokens=1, kv_bits=value)


def test_a_cache_has_its_own_bits():
    model, cache = small_model(), SinkCache(16, 4, kv_bits=8)
    states = torch.ones(1, 2, 1, 16)
    with pytest.raises(ValueError, match="`kv_bits` is 8, which a `SinkCache` has only if it is bound"):
        cache.update(states, states, 0)
    generate(model, input_ids=prompt(3), max_new_tokens=1, past_key_values=cache, kv_bits=8)
    with pytest.raises(ValueError, match="`kv_bits` is 8, but the `SinkCache` in .* was made with None"):
        generate(model, input_ids=prompt(3), max_new_tokens=1, past_key_values=SinkCache(16, 4), kv_bits=8)


def test_a_generation_config_may_say_it():
    model = small_model()
    model.generation_config.kv_bits = 8
    output = generate(model, 16, 4, input_ids=prompt(3), max_new_tokens=1, return_dict_in_generate=True)
    assert output[CACHE].kv_bits == 8


@pytest.mark.ends_only
def test_numbers_that_are_not_finite_stay_so_and_are_named(tmp_path):
    model = small_model()
    output = stream(model, prompt(20), 3)
    hook = model.model.layers[1].self_attn.v_proj.register_forward_hook(lambda module, args, out: out * torch.inf)
    logits = stream(model, torch.cat([output.sequences, prompt(1)], 1), 1, cache=output[CACHE], do_sample=False).logits
    hook.remove()
    assert logits[0].isnan().all()
    with pytest.raises(ValueError, match="its 'values_scale.1' holds numbers that are not finite"):
        output[CACHE].save(tmp_path / "conversation")


def with_large_channels(model, factor: float):
    """`model` with two channels of each key `factor` times as large, and those of the queries as much smaller.

    The two are a pair that rotates together, so what the model gives stays the same.
    """
    for layer in model.model.layers:
        for projection, by in ((layer.self_attn.k_proj, factor), (layer.self_attn.q_proj, 1 / factor)):
            heads = projection.weight.data.unflatten(0, (-1, 2, layer.self_attn.head_dim // 2))
            heads[:, :, 1] *= by
    return model


@pytest.mark.ends_only
def test_channels_that_stand_out(tmp_path):
    # A power of 2, by which numbers are divided before they are coded: so the codes are those without it.
    plain, model = small_model(), with_large_channels(small_model(), 64)
    ids = prompt(70)
    output, same = stream(model, ids, 40), stream(plain, ids, 40)
    own = oracle(plain, same.sequences[0].tolist(), 16, 4)[69:-1]
    cost = [off(torch.cat(each.logits), own).median() for each in (output, same)]
    assert torch.equal(output.sequences, same.sequences)
    assert cost[0] < 1.5 * cost[1]
    # They go with a copy and a file, and are those of the file where the model's own would be others.
    output[CACHE].save(tmp_path / "conversation")
    with safetensors.safe_open(tmp_path / "conversation", "pt") as file:
        assert set(file.get_tensor("keys_factor.0").unique().tolist()) == {1, 64}
    loaded, said = SinkCache.load(tmp_path / "conversation", model), torch.cat([output.sequences, prompt(1)], dim=1)
    expected = stream(model, said, 20, cache=copy.deepcopy(output[CACHE]))
    assert torch.equal(torch.cat(stream(model, said, 20, cache=loaded).logits), torch.cat(expected.logits))


@pytest.mark.ends_only
def test_a_model_called_by_itself():
    # It makes positions itself, which reach a cycle's end before the stream would lower them.
    model, ids = small_model(max_position_embeddings=40), prompt(40)
    cache = SinkCache(**WINDOW).bind(model)
    with torch.no_grad():
        logits = torch.cat([model(token, use_cache=True, **{CACHE: cache}).logits[0] for token in ids.split(1, 1)])
    assert cache.held.cycle < 40
    assert_right(logits, expected(model, ids[0].tolist(), cache))


@pytest.mark.newest_only
def test_no_more_than_one_layer_is_whole_at_a_time():
    model, cache = small_model(num_hidden_layers=4), SinkCache(**WINDOW)
    said = stream(model, prompt(20), 1, cache=cache).sequences
    update, seen, whole = cache.update, [], []

    def watched(*args, **kwargs):
        whole.append(sum(reference() is not None for reference in seen))
        keys, values = update(*args, **kwargs)
        seen.append(weakref.ref(keys))
        return keys, values

    cache.update = watched
    stream(model, said, 3, cache=cache)
    assert len(whole) > 8 and max(whole) == 0
