"""What can't be served correctly is refused by name, before the model runs for the generation, and changes nothing."""

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache, GenerationConfig, T5Config

from custom_generate.generate import CACHE, SinkCache, generate
from tests.support.helpers import RELEASE, at_the_ends, changing, prompt, remembering, small_model, with_the_old_class


def forward_passes(model) -> list[int]:
    """A list that grows by the number of tokens of each forward pass from now on."""
    lengths: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    return lengths


ARGUMENTS = [
    (dict(window_length="16"), TypeError, "`window_length` must be an int.*'16'"),
    (dict(window_length=16.0), TypeError, "`window_length` must be an int.*16.0"),
    (dict(window_length=True), TypeError, "`window_length` must be an int.*True"),
    (dict(window_length=0), ValueError, "`window_length` must be at least 1, got 0"),
    (dict(window_length=-5), ValueError, "`window_length` must be at least 1, got -5"),
    (dict(num_sink_tokens="4"), TypeError, "`num_sink_tokens` must be an int.*'4'"),
    (dict(num_sink_tokens=1.5), TypeError, "`num_sink_tokens` must be an int.*1.5"),
    (dict(num_sink_tokens=False), TypeError, "`num_sink_tokens` must be an int.*False"),
    (dict(num_sink_tokens=-1), ValueError, "`num_sink_tokens`.*got -1"),
    (
        dict(window_length=4, num_sink_tokens=4),
        ValueError,
        r"`num_sink_tokens`.*less than.*\(4\).*got 4",
    ),
    (dict(window_length=4, num_sink_tokens=9), ValueError, "`num_sink_tokens`.*got 9"),
    (dict(window_length=3), ValueError, r"`num_sink_tokens`.*\(3\).*got 4"),
    (dict(use_cache=False), ValueError, "`use_cache` must not be False"),
    (dict(generation_config=GenerationConfig(use_cache=False)), ValueError, "`use_cache` must not be False"),
    (dict(cache_implementation="static"), ValueError, "`cache_implementation`.*'static'"),
    (dict(generation_config=GenerationConfig(cache_implementation="static")), ValueError, "`cache_implementation`"),
    (dict(past_key_values=DynamicCache()), TypeError, f"`{CACHE}` must be.*DynamicCache"),
    (dict(past_key_values=((torch.zeros(1),),)), TypeError, f"`{CACHE}` must be.*tuple"),
    (dict(past_key_values=SinkCache(32, 4), window_length=16), ValueError, "`window_length` is 16.*made with 32"),
    (dict(past_key_values=SinkCache(32, 4), num_sink_tokens=2), ValueError, "`num_sink_tokens` is 2.*made with 4"),
    (dict(penalty_alpha=0.6, top_k=4), ValueError, "`penalty_alpha`"),
    (dict(position_ids=torch.arange(5)[None]), ValueError, "`position_ids` must not be given"),
    (dict(prefill_chunk_size=0), ValueError, "`prefill_chunk_size` must be at least 1, got 0"),
]


@pytest.mark.parametrize(
    "arguments, error, message", ARGUMENTS, ids=["-".join(arguments) for arguments, *_ in ARGUMENTS]
)
def test_arguments(arguments, error, message):
    model = small_model()
    passes = forward_passes(model)
    with pytest.raises(error, match=message):
        generate(model, input_ids=prompt(5), max_new_tokens=5, **arguments)
    assert passes == []
    cache = arguments.get("past_key_values")
    assert not isinstance(cache, SinkCache) or (not cache.is_bound and cache.get_seq_length() == 0)


MODES = [
    (
        dict(num_beams=4, num_beam_groups=2, diversity_penalty=0.5),
        "`num_beam_groups` asks for group beam search",
        "4.57",
    ),
    (dict(num_beams=4, force_words_ids=[[5, 6]]), "`force_words_ids` asks for constrained beam search", "4.57"),
    (
        dict(num_beams=4, constraints=[getattr(transformers, "PhrasalConstraint", list)([5, 6])]),
        "`constraints` asks for constrained beam search",
        "4.57",
    ),
    (dict(dola_layers="high"), "`dola_layers` asks for DoLa", "4.56"),
    (dict(generation_config=GenerationConfig(dola_layers=[1])), "`dola_layers` asks for DoLa", "4.56"),
]


@pytest.mark.parametrize("arguments, message, moved", MODES, ids=["-".join(arguments) for arguments, *_ in MODES])
def test_modes_that_moved_to_the_hub(arguments, message, moved):
    model = small_model()
    settings = dict(input_ids=prompt(10), max_new_tokens=40, **arguments)
    if RELEASE < Version(moved):  # there they are served
        assert torch.equal(generate(model, 64, 4, **settings), model.generate(**settings))
        assert generate(model, 16, 4, **settings).shape == (1, 50)
        return
    passes = forward_passes(model)
    with pytest.raises(ValueError, match=message):
        generate(model, 16, 4, **settings)
    assert passes == []
    assert generate(model, 16, 4, input_ids=prompt(5), num_beam_groups=1, max_new_tokens=40).shape == (1, 45)


@pytest.mark.parametrize(
    "mask",
    [[[1, 1, 0, 1, 1]], [[1, 1, 1, 1, 0]], [[0, 0, 0, 0, 0]], [[0, 1, 0, 1, 1]]],
    ids=["hole", "right padding", "no token", "left padding and a hole"],
)
def test_masks_that_are_not_left_padding(mask):
    model = small_model()
    generate(model, 16, 4, input_ids=prompt(5), max_new_tokens=1)  # reads the rotation
    passes = forward_passes(model)
    with pytest.raises(ValueError, match="`attention_mask` must be left padding"):
        generate(model, 16, 4, input_ids=prompt(5), attention_mask=torch.tensor(mask), max_new_tokens=5)
    assert passes == []


@pytest.mark.parametrize(
    "mask, message",
    [
        (dict(padding=[0, 2], hole=False), r"`attention_mask` has \[0, 2\].*began after \[2, 0\]"),
        (dict(padding=[0, 0], hole=False), r"`attention_mask` has \[0\].*began after \[2, 0\]"),
        (dict(padding=[2, 0], hole=True), "`attention_mask` must be left padding"),
    ],
    ids=["other rows padded", "no padding any more", "padding before the new tokens"],
)
def test_a_turn_whose_mask_is_not_that_of_the_turn_before(mask, message):
    def masked(length: int, padding: list[int]) -> torch.Tensor:
        return (torch.arange(length) >= torch.tensor(padding)[:, None]).long()

    model, cache = small_model(), SinkCache(16, 4)
    first = generate(
        model, input_ids=prompt(5, rows=2), attention_mask=masked(5, [2, 0]), past_key_values=cache, max_new_tokens=20
    )
    turn = torch.cat([first, prompt(3, rows=2)], dim=1)
    attention_mask = masked(turn.shape[1], mask["padding"])
    attention_mask[0, -3] = not mask["hole"]
    passes = forward_passes(model)
    with pytest.raises(ValueError, match=message):
        generate(model, input_ids=turn, attention_mask=attention_mask, past_key_values=cache, max_new_tokens=5)
    assert passes == [] and cache.get_seq_length() == 24
    generate(model, input_ids=turn, attention_mask=masked(28, [2, 0]), past_key_values=cache, max_new_tokens=5)


def test_a_cache_of_another_model():
    one, other = small_model(), small_model()
    other.model.layers[1].self_attn.k_proj.weight.data *= -1
    cache = SinkCache(16, 4).bind(one)
    SinkCache(16, 4).bind(other)  # reads the rotation
    passes = forward_passes(other)
    for refused in (lambda: generate(other, input_ids=prompt(5), past_key_values=cache), lambda: cache.bind(other)):
        with pytest.raises(ValueError, match=f"`{CACHE}` is bound to another model"):
            refused()
    assert passes == []
    assert cache.bind(one) is cache


def test_a_bound_cache_of_another_window():
    model = small_model()
    cache = SinkCache(16, 4).bind(model)
    with pytest.raises(ValueError, match="`window_length` is 32.*made with 16"):
        generate(model, 32, 4, input_ids=prompt(5), past_key_values=cache)


def test_a_cache_that_took_in_tokens_unbound():
    model, cache = small_model(), SinkCache(16, 4)
    with torch.no_grad():
        model(input_ids=prompt(5), **{CACHE: cache})
    with pytest.raises(ValueError, match="was not bound when it took in its 5 tokens"):
        generate(model, input_ids=prompt(6), past_key_values=cache)
    assert cache.get_seq_length() == 5 and not cache.is_bound


def test_a_conversation_that_the_cache_has_seen():
    model, cache = small_model(), SinkCache(16, 4)
    sequences = generate(model, input_ids=prompt(5), past_key_values=cache, max_new_tokens=30)
    passes = forward_passes(model)
    for seen in (sequences[:, :33], prompt(3)):
        with pytest.raises(ValueError, match="`input_ids` must be the whole conversation, longer than the 34 tokens"):
            generate(model, input_ids=seen, past_key_values=cache, max_new_tokens=5)
    assert passes == [] and cache.get_seq_length() == 34


@pytest.mark.parametrize("seen, missing, new", [(34, 1, 1), (34, 5, 2), (0, 3, 5)])
def test_tokens_that_the_cache_has_not_seen_and_is_not_given(seen, missing, new):
    model, cache = small_model(), SinkCache(16, 4)
    if seen:
        generate(model, input_ids=prompt(5), past_key_values=cache, max_new_tokens=seen - 4)
    passes = forward_passes(model)
    with pytest.raises(ValueError, match=f"`input_ids` must go on after the {seen} tokens.*: {missing} are missing"):
        mask = torch.ones(1, seen + missing + new)
        generate(model, input_ids=prompt(new), attention_mask=mask, past_key_values=cache, max_new_tokens=5)
    assert passes == [] and cache.get_seq_length() == seen


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_batch_of_another_size(rows):
    model, cache = small_model(), SinkCache(16, 4)
    sequences = generate(model, input_ids=prompt(5, rows=rows), past_key_values=cache, max_new_tokens=20)
    passes = forward_passes(model)
    with pytest.raises(ValueError, match=f"`{CACHE}` holds a batch of {rows}, got one of 6"):
        generate(model, input_ids=sequences[:1].repeat(2, 1), past_key_values=cache, max_new_tokens=5, num_beams=3)
    assert passes == []


@pytest.mark.parametrize("seen, changed", [(10, 0), (34, -8)], ids=["before an eviction", "after"])
def test_another_conversation(seen, changed):
    model, cache = small_model(), SinkCache(16, 4)
    sequences = generate(model, input_ids=prompt(5), past_key_values=cache, max_new_tokens=seen - 4)
    turn = torch.cat([sequences, prompt(5)], dim=1)
    turn[0, changed] += 1  # one of the tokens that the cache has seen
    passes = forward_passes(model)
    with pytest.raises(ValueError, match=f"`input_ids` must continue the conversation in `{CACHE}`"):
        generate(model, input_ids=turn, past_key_values=cache, max_new_tokens=5)
    assert passes == [] and cache.get_seq_length() == seen


def tiny(model_type: str, **settings):
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](vocab_size=211, **settings)).eval()


def swept(model_type: str):
    """The model that `make architectures` tries; newer releases only have all that it needs."""
    from tools.architectures import MODEL_TYPES, WITH_IMAGES, build

    return build(model_type, 512, {}, MODEL_TYPES if model_type in MODEL_TYPES else WITH_IMAGES)


def breaks_on_its_own():
    model = small_model()
    model.model.rotary_emb.forward = lambda x, position_ids: torch.zeros(1)[position_ids]
    return model


def scales_its_queries():
    model = small_model()
    attention = model.model.layers[1].self_attn
    rotary = model.model.rotary_emb
    remembering(rotary)
    changing(attention.q_proj, lambda queries: queries * (1 + rotary.latest[..., None] / 2048) ** 0.1)
    return model


def mixes_its_tokens():
    model = small_model()
    changing(model.model.layers[1].mlp, lambda states: states + states.mean(dim=(0, 1), keepdim=True))
    return model


MODELS = {
    "learned positions": (
        lambda: tiny("gpt2", n_embd=32, n_layer=2, n_head=2, n_positions=128),
        "keys of its layer 0 change with their position, but not by a rotation",
    ),
    "learned positions, OPT": (
        lambda: tiny(
            "opt",
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=128,
        ),
        "keys of its layer 0 change with their position, but not by a rotation",
    ),
    "learned positions that are not passed, BART": (
        lambda: tiny("bart", d_model=32, encoder_layers=2, decoder_layers=2, decoder_ffn_dim=32),
        "changes with its place in the sequence|does not cache the keys and values of its layers",
    ),
    "learned positions, Whisper": (
        lambda: tiny(
            "whisper",
            d_model=32,
            decoder_layers=2,
            decoder_attention_heads=2,
            decoder_ffn_dim=32,
            max_target_positions=128,
            pad_token_id=0,
        ),
        "(keys of its layer 0 change with their position|changes with its place|does not cache the keys and values)",
    ),
    "codes of sound": (
        lambda: transformers.MusicgenForCausalLM(
            transformers.MusicgenDecoderConfig(
                vocab_size=211, hidden_size=32, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2
            )
        ).eval(),
        "(it has more than one table of embeddings|a cache of its own)",
    ),
    "a table of positions that grows with the sequence": (
        breaks_on_its_own,
        "failed on a few tokens at positions 0 and 511",
    ),
    "queries that grow with their position": (
        scales_its_queries,
        "changes when all move by the same distance",
    ),
    "tokens that see those after them, and other rows": (
        mixes_its_tokens,
        "what it gives for a token depends on tokens after it",
    ),
    "no attention": (
        lambda: tiny("mamba", hidden_size=32, num_hidden_layers=2),
        "(none of its layers attends to all tokens|a cache of its own|can't cache its kinds of layers)",
    ),
}


if RELEASE >= Version("5.0"):
    MODELS["attention that is bidirectional"] = (
        lambda: tiny("gemma3_text", hidden_size=32, num_hidden_layers=2, use_bidirectional_attention=True),
        "what it gives for a token depends on tokens after it",
    )
if RELEASE < Version("4.56"):
    MODELS["layers of two kinds"] = (
        lambda: tiny("gemma2", hidden_size=32, num_hidden_layers=2, head_dim=16),
        r"transformers 4\.5.* can't cache its kinds of layers \(full.* sliding",
    )
elif Version("4.57") <= RELEASE < Version("5.15"):
    MODELS["layers with a state"] = (
        lambda: tiny("qwen3_next", hidden_size=32, num_hidden_layers=2, num_experts=2, moe_intermediate_size=8),
        "(can't cache its kinds of layers|a cache of its own)",
    )
elif RELEASE >= Version("5.17"):
    MODELS["layers that cache what several tokens become"] = (
        lambda: swept("deepseek_v4"),
        "its layers cache more than keys and values",
    )
    MODELS["an index that looks up the positions of its keys"] = (
        lambda: swept("qwen4_exp"),
        "(its layers cache more than keys and values|takes these from the columns of the cache)",
    )


if RELEASE >= Version("5.24"):
    MODELS["an index that pools the columns of the cache"] = (
        lambda: swept("glm5_next"),
        "takes these from the columns of the cache",
    )


@pytest.mark.parametrize("build, reason", MODELS.values(), ids=MODELS.keys())
def test_models(build, reason):
    model = build()
    passes = forward_passes(model)
    with pytest.raises(ValueError, match=f"`model`.*can't be streamed.*{reason}"):
        generate(model, input_ids=prompt(5), max_new_tokens=5)
    # At most those that read the rotation, of single tokens, and see whether four give the same elsewhere; before them,
    # where positions are not named, those of single tokens that see whether columns tell the order; last, those that
    # see whether two give the same without the rest.
    lengths = ([1] * columns + read for columns in (0, 1, 2) for read in ([], [1, 1], [1, 1, 4, 4, 4]))
    assert passes in (*lengths, [1, 1, 4, 4, 4, 2])


def test_a_model_in_training_mode_with_dropout():
    model = small_model(attention_dropout=0.5).train()  # in few layers, of which each row must meet it
    with pytest.raises(ValueError, match=r"`model`.*can't be streamed.*training mode.*`model.eval\(\)` first"):
        generate(model, input_ids=prompt(5), max_new_tokens=5)
    assert model.training
    generate(model.eval(), input_ids=prompt(5), max_new_tokens=5)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()  # renamed after 5.17
    generate(model, input_ids=prompt(5), max_new_tokens=5)
    passes = forward_passes(model.train())
    with pytest.raises(ValueError, match=r"`model`.*gradient checkpointing.*`model.eval\(\)` first"):
        generate(model, input_ids=prompt(5), max_new_tokens=5)
    assert passes == []


# --- a model called by itself, where the cache sees neither mask nor positions


def left_padded() -> dict[str, torch.Tensor]:
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[0, :2] = 0
    return dict(input_ids=prompt(5, rows=2) * mask, attention_mask=mask)


def test_a_padded_batch_that_must_evict():
    model = small_model()
    cache = SinkCache(16, 4).bind(model)
    settings = {"do_sample": False, CACHE: cache}
    expected = model.generate(**left_padded(), max_new_tokens=12, do_sample=False)
    assert torch.equal(model.generate(**left_padded(), max_new_tokens=12, **settings), expected)  # fills the window
    cache.reset()
    with pytest.raises(ValueError, match="some of these 2 rows may be padded.*prepare_inputs"):
        model.generate(**left_padded(), max_new_tokens=13, **settings)


@pytest.mark.parametrize("num_beams", [1, at_the_ends(3)])
def test_a_batch_without_padding_goes_on(num_beams):
    model, ids = small_model(), prompt(5, rows=2)
    settings = dict(max_new_tokens=40, do_sample=False, num_beams=num_beams)
    expected = generate(model, 16, 4, input_ids=ids, **settings)
    for given in ({}, dict(attention_mask=torch.ones_like(ids))):
        cache = SinkCache(16, 4).bind(model)
        assert torch.equal(model.generate(ids, **given, **settings, **{CACHE: cache}), expected)


@pytest.mark.parametrize(
    "given",
    [
        dict(attention_mask=torch.tensor([[0, 0, 1, 1, 1]])),
        dict(attention_mask=torch.tensor([[1, 1, 0, 1, 1]])),
        dict(position_ids=torch.tensor([[0, 1, 2, 4, 5]])),
        dict(position_ids=torch.arange(1, 6)[None]),
    ],
    ids=["padding", "a hole", "other positions", "moved positions"],
)
@torch.no_grad()
def test_what_a_row_alone_was_given_besides(given):
    model = small_model()
    cache = SinkCache(16, 4).bind(model)
    with pytest.raises(ValueError, match="was given padding, or positions that are not the numbers of tokens"):
        model(input_ids=prompt(5), **given, **{CACHE: cache})
    assert cache.get_seq_length() == 0
    model(input_ids=prompt(5), **{CACHE: cache})  # and goes on


def test_other_rows_than_a_cache_has():
    model = small_model()
    cache = SinkCache(16, 4).bind(model)
    with torch.no_grad():
        model(**cache.prepare_inputs(prompt(5, rows=2)))
        with pytest.raises(ValueError, match="holds a batch of 2, got one of 4"):
            model(prompt(1, rows=4), **{CACHE: cache})
        assert cache.get_seq_length() == 5
        model(prompt(1, rows=2), **{CACHE: cache})


def test_rows_that_were_padded_go_on_prepared_only():
    model = small_model()
    cache = generate(model, 16, 4, **left_padded(), max_new_tokens=5, return_dict_in_generate=True)[CACHE]
    with torch.no_grad():
        with pytest.raises(ValueError, match="its rows were padded.*prepare_inputs"):
            model(input_ids=prompt(1, rows=2), **{CACHE: cache})
        model(**cache.prepare_inputs(prompt(1, rows=2)))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((prompt(1, rows=3),), "holds a batch of 2, got one of 3"),
        ((prompt(1, rows=2), torch.ones(2, 1)), r"`attention_mask` must be \[2, 6\], for 5 tokens.*got \[2, 1\]"),
        ((prompt(1, rows=2), torch.ones(2, 6)), "began after"),
    ],
    ids=["another batch", "a mask of the new tokens only", "other padding"],
)
def test_inputs_that_do_not_continue_a_prepared_loop(arguments, message):
    model = small_model()
    cache = SinkCache(16, 4).bind(model)
    with torch.no_grad():
        model(**cache.prepare_inputs(**left_padded()))
    with pytest.raises(ValueError, match=message):
        cache.prepare_inputs(*arguments)
    assert cache.get_seq_length() == 5


def test_an_unbound_cache_prepares_nothing():
    with pytest.raises(ValueError, match=r"must be bound first.*`cache.bind\(model\)`"):
        SinkCache(16, 4).prepare_inputs(prompt(1))


def test_an_encoder_decoder():
    model = transformers.T5ForConditionalGeneration(
        T5Config(vocab_size=99, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )
    with pytest.raises(ValueError, match="`model`.*encoder-decoder"):
        generate(model, input_ids=prompt(5) % 99, max_new_tokens=5)


def test_no_model():
    with pytest.raises(TypeError, match="`model` must be a transformers `PreTrainedModel` that generates, got Linear"):
        generate(torch.nn.Linear(1, 1), input_ids=prompt(5))


def test_a_window_that_the_model_does_not_reach_across():
    with pytest.raises(ValueError, match="`window_length` must be at most 24, got 25"):
        generate(small_model("mistral", sliding_window=24), 25, 4, input_ids=prompt(5), max_new_tokens=5)


def test_a_window_longer_than_unchanging_frequencies():
    model = small_model(max_position_embeddings=32, rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    with pytest.raises(ValueError, match="`window_length` must be at most 32, got 33"):
        generate(model, 33, 4, input_ids=prompt(5), max_new_tokens=5)
    assert generate(model, 32, 4, input_ids=prompt(5), max_new_tokens=60).shape == (1, 65)


@with_the_old_class
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_old_class():
    with pytest.raises(TypeError, match=f"`{CACHE}` must be this repository's `SinkCache`, got transformers"):
        generate(small_model(), input_ids=prompt(5), past_key_values=transformers.SinkCache(16, 4))


@pytest.mark.parametrize("lengths", [[1], [5], [5, 1], [20, 1, 1], [5, 3]], ids=str)
def test_gradients_through_a_bound_cache(lengths):
    model, cache = small_model(), SinkCache(32, 4)
    cache.bind(model)
    for length in lengths:
        logits = model(**cache.prepare_inputs(prompt(length))).logits
    with pytest.raises(ValueError, match="`backward` can't go through a bound `SinkCache`.*`DynamicCache`"):
        logits.sum().backward()
    assert cache.get_seq_length() == sum(lengths)
    with torch.no_grad():  # nothing was lost
        assert torch.equal(model(**cache.prepare_inputs(prompt(1))).logits, plain_logits(lengths))


def plain_logits(lengths: list[int]) -> torch.Tensor:
    """Those of a token more, without a thought of gradients."""
    model, cache = small_model(), SinkCache(32, 4)
    cache.bind(model)
    with torch.no_grad():
        for length in [*lengths, 1]:
            logits = model(**cache.prepare_inputs(prompt(length))).logits
    return logits


def test_gradients_that_pass_by_a_bound_cache():
    """Of what only queries depend on, as an adapter of the last layer's."""
    gradients = []
    for cache in (SinkCache(32, 4), DynamicCache()):
        model = small_model().requires_grad_(False)
        weight = model.model.layers[-1].self_attn.q_proj.weight.requires_grad_(True)
        for ids in prompt(12).split([10, 1, 1], dim=1):
            inputs = {"input_ids": ids, CACHE: cache}
            model(
                **cache.bind(model).prepare_inputs(ids) if isinstance(cache, SinkCache) else inputs
            ).logits.sum().backward()
        gradients.append(weight.grad)
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-5) and gradients[0].any()
