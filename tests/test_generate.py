"""`generate` with a sink cache is `model.generate` in all but what it forgets."""

import functools
import gc
import threading
import weakref

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from custom_generate.generate import CACHE, SinkCache, generate
from tests.support.helpers import RELEASE, at_the_ends, left_padded, prompt, seeded, small_model


def tokens(model, *args, seed: int = 0, **kwargs) -> torch.Tensor:
    with seeded(seed):
        return generate(model, *args, **kwargs)


def state(model) -> dict:
    """All that a call could leave behind on a model."""
    return {
        "attributes": {name: id(value) for name, value in vars(model).items()},
        "config": model.config.to_dict(),
        "generation_config": model.generation_config.to_dict(),
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        "buffers": {name: buffer.clone() for name, buffer in model.named_buffers()},
    }


def assert_unchanged(model, before: dict) -> None:
    after = state(model)
    for name, buffer in before.pop("buffers").items():
        assert torch.equal(buffer, after["buffers"][name])
    after.pop("buffers")
    assert after == before


# --- nothing evicted: the same tokens as plain generate


SETTINGS = {
    "greedy": dict(do_sample=False),
    "sampled": dict(do_sample=True, temperature=1.3, top_k=20),
    "beams": dict(do_sample=False, num_beams=3),
    "sampled beams": dict(do_sample=True, num_beams=2),
    "several sequences": dict(do_sample=True, num_return_sequences=3),
}


@pytest.mark.parametrize("attn_implementation", ["sdpa", at_the_ends("eager")])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_the_same_tokens_while_nothing_is_evicted(settings, attn_implementation):
    model = small_model(attn_implementation=attn_implementation)
    arguments = dict(input_ids=prompt(10, rows=2), max_new_tokens=20, **settings)
    with seeded():
        plain = model.generate(**arguments)
    assert torch.equal(tokens(model, 30, 4, **arguments), plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, at_the_ends(torch.float16)])
def test_the_same_tokens_in_half_precision(dtype):
    model = small_model().to(dtype)
    arguments = dict(input_ids=prompt(10), max_new_tokens=30, do_sample=False)
    assert torch.equal(tokens(model, 60, 4, **arguments), model.generate(**arguments))


@pytest.mark.slow
@pytest.mark.newest_only
def test_the_same_tokens_on_the_real_model(real_model):
    model, tokenizer = real_model
    inputs = tokenizer("It was a bright cold day in April,", return_tensors="pt")
    arguments = dict(**inputs, max_new_tokens=8, do_sample=True, top_p=0.9)
    with seeded():
        plain = model.generate(**arguments)
    assert torch.equal(tokens(model, 64, 4, **arguments), plain)


@pytest.mark.slow
@pytest.mark.newest_only
def test_token_healing_generates_within_the_generation(real_model):
    model, tokenizer = real_model
    inputs = tokenizer(["The link is http:", "The site was http:"], return_tensors="pt")
    settings = dict(**inputs, tokenizer=tokenizer, token_healing=True, max_new_tokens=4, do_sample=False)
    assert torch.equal(tokens(model, 64, 4, **settings), model.generate(**settings))


def test_the_window_decides_past_it():
    model = small_model()
    arguments = dict(input_ids=prompt(10), max_new_tokens=40, do_sample=False)
    streamed = {window: tokens(model, window, 4, **arguments) for window in (16, 17, 50)}
    assert torch.equal(streamed[50], model.generate(**arguments))
    assert not torch.equal(streamed[16], streamed[50])
    assert not torch.equal(streamed[16], streamed[17])


# --- what goes in and what comes out


def test_the_output_holds_the_cache():
    output = generate(
        small_model(), 16, 4, input_ids=prompt(5), max_new_tokens=40, return_dict_in_generate=True, output_scores=True
    )
    cache = output[CACHE]
    assert isinstance(cache, SinkCache) and cache.is_bound
    assert cache.get_seq_length() == 5 + 40 - 1
    assert [tuple(keys.shape) for keys in cache.key_cache] == [(1, 2, 16, 16)] * 2
    assert len(output.scores) == 40


def test_defaults_are_a_window_of_256_and_4_sinks():
    cache = generate(small_model(), input_ids=prompt(5), max_new_tokens=2, return_dict_in_generate=True)[CACHE]
    assert (cache.window_length, cache.num_sink_tokens) == (256, 4)


def test_memory_is_the_same_from_the_first_token_to_the_last():
    sizes = []

    class Sizes(BaseStreamer):
        def put(self, value):
            sizes.append(cache.nbytes)

        def end(self):
            pass

    cache = SinkCache(16, 4)
    generate(small_model(), input_ids=prompt(5), past_key_values=cache, max_new_tokens=50, streamer=Sizes())
    assert len(set(sizes[1:])) == 1 and sizes[-1] > 0


@pytest.mark.parametrize("padded", [False, True])
def test_nothing_but_the_ids_grows_as_it_generates(padded):
    model, sizes = small_model(), []
    prepare = model.prepare_inputs_for_generation

    @functools.wraps(prepare)
    def weighed(input_ids, *args, **kwargs):
        sizes.append(sum(value.numel() for value in kwargs.values() if isinstance(value, torch.Tensor)))
        return prepare(input_ids, *args, **kwargs)

    model.prepare_inputs_for_generation = weighed
    inputs = left_padded([prompt(9), prompt(3 if padded else 9, seed=1)])
    generate(model, 16, 4, **inputs, max_new_tokens=40)
    assert sizes[0] >= 18 and max(sizes[1:]) <= 4


def test_memory_is_given_back_with_the_cache():
    gc.collect()
    gc.disable()  # which would come too late for a GPU
    try:
        cache = SinkCache(16, 4)
        generate(small_model(), input_ids=prompt(5), past_key_values=cache, max_new_tokens=20)
        keys = weakref.ref(cache.layers[0].keys)
        del cache
        assert keys() is None
    finally:
        gc.enable()


def test_a_streamer_gets_each_token_as_it_comes():
    put = []

    class Streamer(BaseStreamer):
        def put(self, value):
            put.append(value.flatten())

        def end(self):
            put.append("end")

    sequences = generate(small_model(), 16, 4, input_ids=prompt(40), max_new_tokens=30, streamer=Streamer())
    assert put[-1] == "end"
    assert torch.equal(torch.cat(put[:-1]), sequences[0])
    assert [len(part) for part in put[:-1]] == [40] + [1] * 30


def test_processors_criteria_and_a_generation_config_are_honoured():
    class OnlyEven(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores[:, 1::2] = -torch.inf
            return scores

    class StopAt35(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= 35, dtype=torch.bool)

    config = GenerationConfig(max_new_tokens=100, do_sample=False, pad_token_id=0)
    sequences = generate(
        small_model(),
        16,
        4,
        inputs=prompt(5),
        generation_config=config,
        logits_processor=[OnlyEven()],
        stopping_criteria=[StopAt35()],
    )
    assert sequences.shape == (1, 35)
    assert (sequences[:, 5:] % 2 == 0).all()


def test_a_cache_goes_on_where_it_was():
    model = small_model()
    whole = tokens(model, 16, 4, input_ids=prompt(5), max_new_tokens=40, do_sample=False)
    cache = SinkCache(16, 4)
    first = tokens(model, input_ids=prompt(5), past_key_values=cache, max_new_tokens=15, do_sample=False)
    rest = tokens(model, 16, 4, input_ids=first, past_key_values=cache, max_new_tokens=25, do_sample=False)
    assert torch.equal(rest, whole)


def test_beams_past_the_window_follow_their_hypotheses():
    # A beam's score is the sum of the log-probabilities that its tokens have when they are streamed alone.
    model = small_model()
    output = generate(
        model,
        16,
        4,
        input_ids=prompt(5, rows=2),
        max_new_tokens=40,
        num_beams=3,
        do_sample=False,
        length_penalty=0.0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    for row in range(2):
        cache = SinkCache(16, 4).bind(model)
        with torch.no_grad():
            logits = [model(input_ids=t, **{CACHE: cache}).logits for t in output.sequences[row, None].split(1, 1)]
        log_probs = torch.cat(logits, dim=1)[0, 4:-1].log_softmax(-1)
        score = log_probs.gather(1, output.sequences[row, 5:, None]).sum()
        torch.testing.assert_close(score, output.sequences_scores[row], rtol=1e-4, atol=1e-4)


def test_a_bound_cache_follows_its_batch():
    model = small_model()
    ids = prompt(30, rows=2)
    one, both = (SinkCache(16, 4).bind(model) for _ in range(2))
    with torch.no_grad():
        for token in ids.split(1, dim=1):
            one_logits = model(input_ids=token[1:], **{CACHE: one}).logits
            model(**both.prepare_inputs(token))
        both.batch_select_indices(torch.tensor([1]))
        both.batch_repeat_interleave(3)
        both.reorder_cache(torch.tensor([2, 0, 1]))
        follow = torch.full((1, 1), 7)
        one_logits = model(input_ids=follow, **{CACHE: one}).logits
        three_logits = model(input_ids=follow.expand(3, 1), **{CACHE: both}).logits
    torch.testing.assert_close(three_logits, one_logits.expand(3, -1, -1), rtol=1e-5, atol=1e-5)


def test_embeddings_for_a_prompt():
    model = small_model()
    embeddings = model.get_input_embeddings()(prompt(40))
    settings = dict(max_new_tokens=40, do_sample=False, prefill_chunk_size=1)
    expected = generate(model, 16, 4, input_ids=prompt(40), **settings)
    assert torch.equal(generate(model, 16, 4, inputs_embeds=embeddings, **settings), expected[:, 40:])


@pytest.mark.parametrize("rows", [1, 2])
def test_attentions_and_hidden_states_are_those_of_what_is_kept(rows):
    model = small_model(attn_implementation="eager")
    output = generate(
        model,
        16,
        4,
        input_ids=prompt(14, rows=rows),
        max_new_tokens=10,
        do_sample=False,
        return_dict_in_generate=True,
        output_attentions=True,
        output_hidden_states=True,
        output_scores=True,
    )
    assert len(output.attentions) == len(output.hidden_states) == len(output.scores) == 10
    lengths = [(14, 14), (1, 15)] + [(1, 16)] * 8  # new tokens, and the keys that they attend to
    for attentions, hidden_states, (length, keys) in zip(output.attentions, output.hidden_states, lengths):
        assert [tuple(layer.shape) for layer in attentions] == [(rows, 4, length, keys)] * 2
        assert [tuple(layer.shape) for layer in hidden_states] == [(rows, length, 64)] * 3
        torch.testing.assert_close(attentions[0].sum(-1), torch.ones(rows, 4, length))


@pytest.mark.parametrize(
    "settings",
    [
        dict(do_sample=False, repetition_penalty=1.3, no_repeat_ngram_size=3),
        at_the_ends(dict(do_sample=True, num_return_sequences=3, top_p=0.9)),
        dict(do_sample=True, num_beams=2, num_return_sequences=2),
        dict(do_sample=False, num_beams=4, num_beam_groups=2, diversity_penalty=0.5)
        if RELEASE < Version("4.56")
        else dict(do_sample=False, num_beams=4, length_penalty=2.0),
        dict(do_sample=False, guidance_scale=1.5),
        at_the_ends(dict(do_sample=False, bad_words_ids=[[7], [8, 9]], suppress_tokens=[10, 11])),
    ],
    ids=lambda settings: "-".join(settings),
)
def test_decoding_modes_past_the_window(settings):
    # A window that nothing leaves says what the mode does; one that is left says that the mode works there too.
    model = small_model()
    arguments = dict(input_ids=prompt(10, rows=2), max_new_tokens=20, min_new_tokens=20, **settings)
    with seeded():
        plain = model.generate(**arguments)
    assert torch.equal(tokens(model, 64, 4, **arguments), plain)
    assert tokens(model, 16, 4, **arguments).shape == plain.shape


def test_progress_of_a_long_prompt_is_shown_on_demand(capfd):
    arguments = dict(input_ids=prompt(100), max_new_tokens=2)
    transformers.logging.enable_progress_bar()
    try:
        generate(small_model(), 16, 4, **arguments)
        assert "prompt" not in capfd.readouterr().err
        generate(small_model(), 16, 4, prefill_progress=True, **arguments)
        assert "prompt" in capfd.readouterr().err
    finally:
        transformers.logging.disable_progress_bar()


# --- nothing stays behind


def test_nothing_is_left_on_the_model():
    model = small_model()
    model.generation_config.cache_implementation = (
        "static"  # a file of the model may say so; the sink cache replaces it
    )
    config = GenerationConfig(max_new_tokens=40, prefill_chunk_size=3)
    before, config_before = state(model), config.to_dict()
    generate(model, 16, 4, input_ids=prompt(5), generation_config=config)
    assert_unchanged(model, before)
    assert config.to_dict() == config_before


def test_nothing_is_left_after_an_exception():
    class Breaks(BaseStreamer):
        calls = 0

        def put(self, value):
            self.calls += 1
            if self.calls == 30:
                raise RuntimeError("the line went dead")

        def end(self):
            pass

    model = small_model()
    expected = tokens(model, 16, 4, input_ids=prompt(5), max_new_tokens=40, do_sample=False)
    before = state(model)
    with pytest.raises(RuntimeError, match="the line went dead"):
        generate(model, 16, 4, input_ids=prompt(5), max_new_tokens=40, streamer=Breaks())
    assert_unchanged(model, before)
    assert torch.equal(tokens(model, 16, 4, input_ids=prompt(5), max_new_tokens=40, do_sample=False), expected)


def test_a_seed_gives_the_same_tokens_the_first_time_and_later():
    # Reading the rotation, which the first call does, draws no random number.
    model, arguments = small_model(), dict(input_ids=prompt(5), max_new_tokens=40, do_sample=True)
    assert torch.equal(tokens(model, 16, 4, **arguments), tokens(model, 16, 4, **arguments))
    with seeded():
        plain = model.generate(**arguments)
    assert torch.equal(tokens(small_model(), 64, 4, **arguments), plain)


@pytest.mark.ends_only
def test_threads_generate_on_one_model():
    model = small_model()
    jobs = [dict(window_length=window, input_ids=prompt(5, seed=window)) for window in (8, 12, 16, 64)]
    settings = dict(num_sink_tokens=4, max_new_tokens=40, do_sample=False)
    alone = [generate(model, **job, **settings) for job in jobs] + [
        model.generate(prompt(5), max_new_tokens=40, do_sample=False)
    ]
    together: list = [None] * len(alone)
    start = threading.Barrier(len(alone))

    def run(index: int) -> None:
        start.wait()
        if index < len(jobs):
            together[index] = generate(model, **jobs[index], **settings)
        else:
            together[index] = model.generate(prompt(5), max_new_tokens=40, do_sample=False)

    before = state(model)
    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(alone))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_unchanged(model, before)
    for got, expected in zip(together, alone):
        assert torch.equal(got, expected)
