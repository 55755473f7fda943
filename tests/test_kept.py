"""`kept_conversations`: a call that sends a whole conversation again reads only what is new, and says the same."""

import contextlib
import functools
import gc
import sys
import threading
import weakref

import pytest
import torch
from packaging.version import Version
from transformers import CompileConfig, GenerationConfig, LlamaForCausalLM, pipeline
from transformers.generation.streamers import BaseStreamer

from custom_generate.generate import CACHE, SinkCache, generate
from tests.support import ROOT
from tests.support.helpers import (
    RELEASE,
    at_the_ends,
    left_padded,
    loadable,
    prompt,
    seeded,
    small_model,
    small_tokenizer,
)
from tests.support.oracle import difference
from tests.test_hybrids import CORE, SERVED, hybrid

reading = sys.modules["custom_generate.generate"]  # the package has the function by that name
NEW_TOKENS = 6
SETTINGS = dict(max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
SETTINGS |= dict(return_dict_in_generate=True, output_logits=True)
# Prompt lookup of older releases needs a token that ends a text, and 5.0 takes no least length with an assistant.
WITH_DRAFTS = dict(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=210, suppress_tokens=[210])


@contextlib.contextmanager
def counting_tokens(model):
    """A list of how many tokens of a row each forward pass within the block got, but for those that read the model."""
    fed, embed = [], torch.nn.functional.embedding
    SinkCache(24, 4).bind(model)

    def counted(ids, *args, **kwargs):
        fed.append(ids.shape[1])
        return embed(ids, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:  # a hook would make it another model
        patch.setattr(torch.nn.functional, "embedding", counted)
        yield fed


def say(model, ids, kept_conversations=1, window_length=16, **kwargs):
    """What `generate` gives after `ids`, past a window of 16 with 4 sinks, and how many tokens were read before it."""
    kwargs = {**SETTINGS, "attention_mask": torch.ones_like(ids), **kwargs}
    with counting_tokens(model) as fed:
        output = generate(model, window_length, 4, input_ids=ids, kept_conversations=kept_conversations, **kwargs)
    return output, sum(fed) - (output.sequences.shape[1] - ids.shape[1] - 1)


def check_as_anew(model, ids, most_read, kept_conversations=1, **kwargs):
    """The sequences that come after `ids`, which read at most so many tokens, and are those of reading all anew."""
    output, read = say(model, ids, kept_conversations, **kwargs)
    anew, _ = say(model, ids, 0, **kwargs)
    assert torch.equal(output.sequences, anew.sequences)
    logits, expected = (torch.stack(each.logits).flatten(0, 1) for each in (output, anew))
    assert difference(logits, expected) < 1e-5
    assert read <= most_read
    return output.sequences


def longer(ids, number, seed):
    return torch.cat([ids, prompt(number, rows=len(ids), seed=seed)], dim=1)


def test_a_turn_reads_what_is_new():
    model, ids = small_model(), prompt(30)
    for turn in range(4):
        new = ids.shape[1] if turn == 0 else 7 + 1  # the last token of an answer was not read yet
        ids = longer(check_as_anew(model, ids, new), 7, seed=turn)


@pytest.mark.ends_only
def test_a_turn_reads_the_last_answer_too_where_it_comes_back_changed():
    model, ids = small_model(), prompt(30)
    check_as_anew(model, ids, 30)
    for turn in range(3):
        ids = longer(longer(ids, 5, seed=turn), 7, seed=50 + turn)  # another answer than was given, and a question
        check_as_anew(model, ids, 5 + 7)


@pytest.mark.parametrize(
    "length, number", [(40, 2), *(at_the_ends(*case) for case in [(20, 1), (20, 16), (40, 1), (40, 16)])]
)
def test_what_a_template_puts_before_an_answer_may_be_left_out_later(number, length):
    # Window and sinks as by default, but of 24: chunks of 16 hold what is to be taken back.
    model, ids = small_model(), prompt(length)
    sizes = dict(window_length=24, num_sink_tokens=1)

    def read(ids, kept_conversations):
        with counting_tokens(model) as fed:
            output = generate(model, input_ids=ids, kept_conversations=kept_conversations, **sizes, **SETTINGS)
        return output, sum(fed) - NEW_TOKENS + 1

    read(ids, 1)
    later = longer(ids[:, :-number], 9, seed=1)
    (output, tokens_read), (anew, _) = read(later, 1), read(later, 0)
    assert tokens_read <= 9
    assert torch.equal(output.sequences, anew.sequences)


@pytest.mark.ends_only
def test_the_same_prompt_again_reads_one_token():
    model, ids = small_model(), prompt(40)
    check_as_anew(model, ids, 40)
    for _ in range(3):
        check_as_anew(model, ids, 1)


@pytest.mark.newest_only
def test_an_earlier_message_edited():
    model, ids = small_model(), prompt(40)
    sequences = check_as_anew(model, ids, 40)
    ids = sequences.clone()
    ids[0, 12] = ids[0, 12] % 200 + 2
    check_as_anew(model, ids, ids.shape[1])  # what the old one evicted is gone
    # While nothing is evicted all before the edited token is common.
    ids = prompt(10, seed=1)
    check_as_anew(model, ids, 10)
    edited = ids.clone()
    edited[0, 7] = ids[0, 7] % 200 + 2
    check_as_anew(model, edited, 3)


@pytest.mark.newest_only
def test_so_many_are_kept_and_the_one_used_longest_ago_makes_room():
    model, conversations = small_model(), [prompt(30, seed=seed) for seed in range(3, 6)]
    for turn in range(3):
        for number, ids in enumerate(conversations):
            sequences = check_as_anew(model, ids, ids.shape[1] if turn == 0 else 8, kept_conversations=3)
            conversations[number] = longer(sequences, 7, seed=20 * number + turn)
    three = SinkCache.kept_nbytes(model)
    _, read = say(model, conversations[1], kept_conversations=2)  # the first one goes
    assert read == 8
    _, read = say(model, conversations[0], kept_conversations=2)  # and then the third
    assert read == conversations[0].shape[1]
    assert SinkCache.kept_nbytes(model) < three
    _, read = say(model, conversations[2], kept_conversations=2)
    assert read == conversations[2].shape[1]


@pytest.mark.newest_only
def test_a_turn_does_not_push_its_own_conversation_out():
    model, one, other = small_model(), prompt(30), prompt(30, seed=1)
    for turn in range(4):
        most = 30 if turn == 0 else 5 + 7
        for ids in (one, other):
            check_as_anew(model, ids, most, kept_conversations=2)
        one, other = (longer(longer(ids, 5, seed=turn), 7, seed=9) for ids in (one, other))  # answers came back changed


@pytest.mark.newest_only
def test_conversations_that_begin_alike_are_two():
    model, system = small_model(), prompt(6)
    one, other = (longer(system, 5, seed=seed) for seed in (1, 2))
    one = check_as_anew(model, one, 11, kept_conversations=2)
    other = check_as_anew(model, other, 5, kept_conversations=2)
    check_as_anew(model, longer(one, 7, seed=3), 8, kept_conversations=2)
    check_as_anew(model, longer(other, 7, seed=4), 8, kept_conversations=2)


@pytest.mark.newest_only
def test_an_own_earlier_state_makes_room_first():
    # A template that leaves out the beginning of answers must not fill all places with one conversation.
    model, other = small_model(), check_as_anew(small_model(), prompt(30), 30)
    say(model, prompt(30), 2)
    ids = prompt(30, seed=1)
    for turn in range(4):
        check_as_anew(model, ids, 30 if turn == 0 else 9, kept_conversations=2)
        ids = longer(ids[:, :-2], 7, seed=turn)
    check_as_anew(model, longer(other, 7, seed=9), 8, kept_conversations=2)


@pytest.mark.newest_only
def test_the_memory_is_bounded_and_told():
    model, ids = small_model(), prompt(30)
    assert SinkCache.kept_nbytes(model) == 0
    for turn in range(6):
        output, _ = say(model, ids)
        window = output[CACHE].nbytes
        kept = SinkCache.kept_nbytes(model)
        # Two windows, what a chunk evicts, and 4 bytes for each token.
        assert 2 * window < kept - 4 * (output.sequences.shape[1] - 1) < 3 * window
        ids = longer(output.sequences, 7, seed=turn)
    SinkCache.forget_kept(model)
    assert SinkCache.kept_nbytes(model) == 0
    _, read = say(model, ids)
    assert read == ids.shape[1]


def test_nothing_is_kept_by_default_or_in_a_cache_that_was_passed():
    model, ids = small_model(), prompt(30)
    say(model, ids, kept_conversations=None)
    say(model, ids, window_length=None, past_key_values=SinkCache(16, 4))
    assert SinkCache.kept_nbytes(model) == 0


def test_a_generation_config_may_say_it():
    model, ids = small_model(), prompt(30)
    config = GenerationConfig(**SETTINGS, kept_conversations=1, pad_token_id=0)
    output, _ = say(model, ids, None, generation_config=config)
    ids = longer(output.sequences, 7, seed=1)
    assert say(model, ids, None, generation_config=config)[1] == 8
    model.generation_config.kept_conversations = 1  # as of the model's file
    assert say(model, ids, None)[1] == 1
    assert say(model, ids, 0)[1] == ids.shape[1]


def test_by_the_name_of_the_repository():
    # transformers reads the file at each call: what is kept must not go with it.
    model, ids = small_model(), prompt(30)
    stream = dict(custom_generate=loadable(ROOT), trust_remote_code=True, window_length=16, kept_conversations=1)
    for turn in range(3):
        with counting_tokens(model) as fed:
            sequences = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, **stream)
        if turn > 0:
            assert sum(fed) == 8 + 10 - 1
        ids = longer(sequences, 7, seed=turn)


def test_a_pipeline_that_gets_messages():
    tokenizer = small_tokenizer()
    model = small_model(vocab_size=len(tokenizer), eos_token_id=2)
    chat = pipeline("text-generation", model=model, tokenizer=tokenizer)
    stream = dict(custom_generate=loadable(ROOT), trust_remote_code=True, window_length=32, max_new_tokens=10)
    messages, length = [], 0
    for turn in range(5):
        messages.append({"role": "user", "content": f"And then? ({turn})"})
        with counting_tokens(model) as fed:
            said = chat(messages, **stream, kept_conversations=1, do_sample=False)[0]["generated_text"]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True).input_ids
        answered = sum(number == 1 for number in fed)
        assert turn == 0 or sum(fed) - answered <= len(ids) - length + 1
        assert said == chat(messages, **stream, do_sample=False)[0]["generated_text"]
        messages, length = said, len(ids)


@pytest.mark.ends_only
def test_a_generate_of_the_class_that_runs_the_loop_twice():
    class Twice(LlamaForCausalLM):
        def generate(self, input_ids, **kwargs):
            kwargs.pop("attention_mask", None)
            sequences = super().generate(input_ids, **kwargs)
            return super().generate(sequences, **kwargs)

    model = small_model()
    model.__class__ = Twice
    settings = dict(max_new_tokens=10, do_sample=False)
    sequences = generate(model, 16, 4, input_ids=prompt(30), kept_conversations=1, **settings)
    assert torch.equal(sequences, generate(model, 16, 4, input_ids=prompt(30), **settings))
    again = generate(model, 16, 4, input_ids=longer(sequences, 7, seed=1), kept_conversations=1, **settings)
    assert torch.equal(again, generate(model, 16, 4, input_ids=longer(sequences, 7, seed=1), **settings))


CHANGES = {
    "another window": lambda model: dict(window_length=24),
    "a weight, behind torch's back": lambda model: model.model.layers[1].mlp.up_proj.weight.data.mul_(2),
    "a weight, in place": lambda model: torch.nn.init.normal_(model.model.layers[1].mlp.up_proj.weight),
    "a layer exchanged": lambda model: setattr(model.model.layers[1], "mlp", small_model("llama").model.layers[0].mlp),
    "training": lambda model: model.train(),
    "a setting": lambda model: setattr(model.model.layers[0].self_attn, "scaling", 0.3),
}


@pytest.mark.newest_only
@pytest.mark.parametrize("change", CHANGES)
def test_other_weights_settings_and_windows_do_not_meet(change):
    model, ids = small_model(), prompt(30)
    ids = longer(say(model, ids, 2)[0].sequences, 7, seed=1)
    settings = CHANGES[change](model)
    settings = settings if isinstance(settings, dict) else {}
    check_as_anew(model, ids, ids.shape[1], kept_conversations=2, **settings)
    _, read = say(model, ids, 2, **settings)
    assert read == 1  # and what was read since is found


@pytest.mark.newest_only
def test_adapters_do_not_meet():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    with seeded():
        model = peft.get_peft_model(small_model(), config).eval()
        model.add_adapter("other", config)
    ids = longer(check_as_anew(model, prompt(30), 30, 4), 7, seed=1)
    model.set_adapter("other")
    check_as_anew(model, ids, ids.shape[1], 4)
    with model.disable_adapter():
        check_as_anew(model, ids, ids.shape[1], 4)


@pytest.mark.newest_only
def test_autocast_does_not_meet_the_dtype_of_the_model():
    model, ids = small_model(), prompt(30)
    ids = longer(say(model, ids)[0].sequences, 7, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert say(model, ids)[1] == ids.shape[1]
        assert say(model, ids)[1] == 1


@pytest.mark.newest_only
def test_two_models_do_not_meet():
    one, other = small_model(), small_model("qwen3")
    ids = longer(say(one, prompt(30))[0].sequences, 7, seed=1)
    assert SinkCache.kept_nbytes(other) == 0
    check_as_anew(other, ids, ids.shape[1])


@pytest.mark.newest_only
def test_what_is_kept_goes_with_its_model():
    model = small_model()
    say(model, prompt(30))
    there = weakref.ref(model)
    del model
    gc.collect()
    assert there() is None


@pytest.mark.newest_only
def test_what_a_caller_gets_is_its_own():
    model, ids = small_model(), prompt(30)
    output, _ = say(model, ids)
    ids = longer(output.sequences, 7, seed=1)
    cache = output[CACHE]
    say(model, ids, window_length=None, past_key_values=cache)  # it goes on, and is spoiled
    for keys in cache.key_cache:
        keys.fill_(7)
    check_as_anew(model, ids, 8)


@pytest.mark.ends_only
def test_rows_that_go_on_alike():
    model, batch = small_model(), left_padded([prompt(30), prompt(22, seed=1)])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    for turn in range(3):
        check = dict(attention_mask=mask)
        ids = longer(check_as_anew(model, ids, 30 if turn == 0 else 8, **check), 7, seed=turn)
        mask = torch.cat([mask, mask.new_ones(2, ids.shape[1] - mask.shape[1])], dim=1)
    # The same tokens behind other padding, and with one row alone, are other conversations.
    mask[1, 8] = 0
    check_as_anew(model, ids, ids.shape[1], attention_mask=mask)
    check_as_anew(model, ids[:1], ids.shape[1])


@pytest.mark.parametrize(
    "kwargs", [dict(num_beams=3), at_the_ends(dict(do_sample=True, num_return_sequences=2))], ids=str
)
def test_beams_and_returned_sequences(kwargs):
    model, ids = small_model(), prompt(30)
    if kwargs.get("num_beams"):
        kwargs["output_logits"] = False
    read = []
    for turn in range(3):
        outputs = []
        for kept_conversations in (1, 0):
            with seeded(turn):
                output, tokens = say(model, ids, kept_conversations, **kwargs)
            outputs.append(output.sequences)
            read.append(tokens)
        assert torch.equal(*outputs)
        ids = longer(outputs[0][:1], 7, seed=turn)
    assert read[2] <= 10 + 7 + 1 and read[4] <= 10 + 7 + 1  # from the prompt on, where all rows agreed


@pytest.mark.ends_only
@pytest.mark.parametrize("name", [name for name in SERVED if name in (*CORE, "jamba")])
def test_layers_of_several_kinds(name):
    # What their layers evicted is gone, so the prompt is kept before what a template may leave out.
    model, ids = hybrid(name), prompt(40)
    steps = not model.config.get_text_config().model_type == "jamba"
    ids = longer(check_as_anew(model, ids, 40), 7, seed=1)
    ids = check_as_anew(model, ids, 8)
    later = longer(ids[:, : -NEW_TOKENS - 3], 9, seed=2)  # the prompt without its last tokens, and another answer
    check_as_anew(model, later, 16 + 9 if steps else later.shape[1])


@pytest.mark.parametrize("kwargs", [dict(prompt_lookup_num_tokens=3), at_the_ends(dict(assistant=True))], ids=str)
def test_drafts(kwargs):
    model, ids = small_model(), prompt(20).repeat(1, 2)
    if kwargs.pop("assistant", False):
        kwargs["assistant_model"] = small_model(num_hidden_layers=1)
    sequences, plain = ids, ids
    for turn in range(3):
        sequences = generate(model, 16, 4, input_ids=sequences, kept_conversations=1, **kwargs, **WITH_DRAFTS)
        plain = generate(model, 16, 4, input_ids=plain, **WITH_DRAFTS)
        sequences, plain = longer(sequences, 7, seed=turn), longer(plain, 7, seed=turn)
        assert torch.equal(sequences, plain)
    ids = longer(longer(ids, 5, seed=4), 7, seed=5)
    say(model, ids)
    check_as_anew(model, sequences, sequences.shape[1])


@pytest.mark.ends_only
def test_a_call_after_drafts_goes_on_in_what_they_left():
    model, ids = small_model(), prompt(40)
    drafts = dict(kept_conversations=1, prompt_lookup_num_tokens=3, **WITH_DRAFTS)
    sequences = generate(model, 16, 4, input_ids=ids, **drafts)
    check_as_anew(model, longer(sequences, 7, seed=1), 8)
    SinkCache.forget_kept(model)
    generate(model, 16, 4, input_ids=ids, **drafts)
    check_as_anew(model, longer(ids[:, :-2], 7, seed=2), 16 + 7)  # another answer, from before the prompt's end


class HangUp(BaseStreamer):
    """A client that goes away after so many tokens."""

    def __init__(self, after):
        self.left = after + 1  # the prompt comes first

    def put(self, value):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt

    def end(self): ...


@pytest.mark.newest_only
@pytest.mark.parametrize("after", [0, 1, 5])
def test_an_aborted_answer_leaves_the_prompt(after):
    model, ids = small_model(), prompt(30)
    ids = longer(check_as_anew(model, ids, 30), 7, seed=1)
    with pytest.raises(KeyboardInterrupt):
        generate(model, 16, 4, input_ids=ids, kept_conversations=1, streamer=HangUp(after), **SETTINGS)
    check_as_anew(model, ids, 8 if after == 0 else 1)
    check_as_anew(model, longer(ids, 7, seed=2), 7)


@pytest.mark.newest_only
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("at", [0, 2, 5])
def test_an_error_in_the_middle_of_a_pass_leaves_what_was_there(at, layer):
    model, ids = small_model(), prompt(30)
    ids = longer(check_as_anew(model, ids, 30), 20, seed=1)
    passes = []

    def fail(module, args, output):
        passes.append(1)
        if len(passes) > at:
            raise RuntimeError("out of memory")

    hook = model.model.layers[layer].self_attn.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        say(model, ids)
    hook.remove()
    check_as_anew(model, ids, 21)


@pytest.mark.newest_only
def test_calls_at_the_same_time():
    model, conversations = small_model(), [prompt(30, seed=seed) for seed in range(2)]
    conversations = [longer(say(model, ids, 2)[0].sequences, 7, seed=3) for ids in conversations]
    expected = [generate(model, 16, 4, input_ids=ids, **SETTINGS).sequences for ids in conversations]
    outcomes, start = {}, threading.Barrier(6)

    def run(number):
        start.wait()
        ids = conversations[number % 2]
        outcomes[number] = generate(model, 16, 4, input_ids=ids, kept_conversations=2, **SETTINGS).sequences

    threads = [threading.Thread(target=run, args=[number]) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(outcomes[number], expected[number % 2]) for number in range(6))
    assert len(outcomes) == 6
    for sequences in expected:
        check_as_anew(model, longer(sequences, 7, seed=4), sequences.shape[1] + 7)


@pytest.mark.newest_only
@pytest.mark.parametrize("inference_mode", [False, True])
def test_kept_on_the_cpu(inference_mode):
    model, ids = small_model(), prompt(30)
    with torch.inference_mode(inference_mode):
        ids = longer(check_as_anew(model, ids, 30, offload_kept_conversations=True), 7, seed=1)
    check_as_anew(model, ids, 8, offload_kept_conversations=True)


def test_embeddings_and_tokens_of_another_type_are_not_kept():
    model, ids = small_model(), prompt(30)
    embedded = model.get_input_embeddings()(ids)
    generate(model, 16, 4, inputs_embeds=embedded, kept_conversations=1, **SETTINGS)
    assert SinkCache.kept_nbytes(model) == 0


@pytest.mark.newest_only
@pytest.mark.parametrize("value", [-1, 1.5, True, "2"])
def test_a_number_that_is_none(value):
    error = ValueError if value == -1 else TypeError
    with pytest.raises(error, match="`kept_conversations` must be .*got"):
        generate(small_model(), 16, 4, input_ids=prompt(5), kept_conversations=value)


@pytest.mark.slow
@pytest.mark.skipif(RELEASE < Version("4.56"), reason="transformers compiles single tokens from 4.56")
def test_compiled_steps():
    torch.compiler.reset()  # in a process that compiled the same code many times it would be left uncompiled
    model, ids = small_model(), prompt(30)
    compile_config = CompileConfig(backend="eager", fullgraph=True, mode=None)
    compile_config._compile_all_devices = True
    for turn in range(3):
        call = dict(input_ids=ids, compile_config=compile_config, **SETTINGS)
        sequences, anew = (generate(model, 16, 4, kept_conversations=kept, **call).sequences for kept in (1, 0))
        assert torch.equal(sequences, anew)
        _, read = say(model, ids)  # uncompiled, in what compiled steps left
        assert read == 1
        ids = longer(sequences, 7, seed=turn)
        _, read = say(model, ids)
        assert read == 8


def steered(module, args, output, by=1.0):
    return output * by


HOOKS = {
    "a hook": lambda model: model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: output + 0.5),
    "a hook before": lambda model: model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(
        lambda module, args: (2 * args[0],)
    ),
    "a hook of all modules": lambda model: torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, output: 2 * output if module is model.model.layers[0].mlp else None
    ),
    "a function with an argument": lambda model: model.model.layers[0].mlp.register_forward_hook(
        functools.partial(steered, by=3.0)
    ),
}


@pytest.mark.newest_only
@pytest.mark.parametrize("hooked", HOOKS)
def test_what_hooks_changed_does_not_meet_what_they_did_not(hooked):
    model = small_model()
    ids = longer(check_as_anew(model, prompt(30), 30, 2), 7, seed=1)
    hook = HOOKS[hooked](model)
    try:
        _, read = say(model, ids, 2)
        assert read == ids.shape[1]
        ids = longer(check_as_anew(model, ids, 1, 2), 7, seed=2)
        check_as_anew(model, ids, 8, 2)
    finally:
        hook.remove()
    _, read = say(model, ids, 2)
    assert read > 8
    check_as_anew(model, ids, 1, 2)


@pytest.mark.newest_only
def test_a_hook_that_is_made_again_for_each_call_is_known_by_what_it_is_made_of():
    class Steering:
        def after(self, module, args, output):
            return output + 0.5

    model, steering, ids = small_model(), Steering(), prompt(30)
    for made in (lambda: steering.after, lambda: functools.partial(steered, by=2.0)):
        for turn in range(3):
            hook = model.model.layers[0].mlp.register_forward_hook(made())
            ids = longer(check_as_anew(model, ids, 8 if turn else ids.shape[1]), 7, seed=turn)
            hook.remove()


@pytest.mark.newest_only
def test_hooks_by_which_transformers_gives_hidden_states_change_nothing():
    model = small_model()
    ids = longer(check_as_anew(model, prompt(30), 30), 7, seed=1)
    ids = longer(check_as_anew(model, ids, 8, output_hidden_states=True, output_attentions=True), 7, seed=2)
    check_as_anew(model, ids, 8)


@pytest.mark.newest_only
def test_rows_with_adapters_of_their_own_do_not_meet():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    with seeded():
        model = peft.get_peft_model(small_model(), config).eval()
        model.add_adapter("other", config)
    ids = prompt(30, rows=2)

    def says(names, kept_conversations=2):
        stream = dict(custom_generate=loadable(ROOT), trust_remote_code=True, window_length=16, adapter_names=names)
        stream |= dict(kept_conversations=kept_conversations, **SETTINGS)
        with counting_tokens(model.base_model.model) as fed:
            output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **stream)
        return torch.stack(output.logits).flatten(0, 1), sum(fed) - NEW_TOKENS + 1

    says(None, 0)  # the model is read
    for names in (["default", "other"], ["other", "__base__"]):
        logits, read = says(names)
        assert read == 30
        again, read = says(names)
        assert read == 1
        anew, _ = says(names, 0)
        assert difference(logits, anew) < 1e-5 and difference(again, anew) < 1e-5


def counted_by_a_hook(model):
    def count(module, args):
        module.calls = getattr(module, "calls", 0) + 1
        module.seen["tokens"] += args[0].shape[1]

    for layer in model.model.layers:
        layer.mlp.seen = {"tokens": 0}
        layer.mlp.register_forward_pre_hook(count)


def counted_by_its_code(model):
    class Counted(type(model.model.layers[0].mlp)):
        def forward(self, *args, **kwargs):
            self.calls += 1
            return super().forward(*args, **kwargs)

    for layer in model.model.layers:
        layer.mlp.__class__, layer.mlp.calls = Counted, 0


@pytest.mark.newest_only
@pytest.mark.parametrize("counted", [counted_by_a_hook, counted_by_its_code])
def test_a_model_that_counts_is_read_once(counted, monkeypatch):
    model, ids, readings = small_model(), prompt(30), []
    counted(model)
    read_anew = reading._read_anew
    monkeypatch.setattr(reading, "_read_anew", lambda model: readings.append(model) or read_anew(model))
    for turn in range(3):
        ids = longer(check_as_anew(model, ids, 8 if turn else 30), 7, seed=turn)
    assert len(readings) == 1
    # What the user sets between calls is no counter.
    model.model.layers[0].self_attn.scaling = 0.3
    ids = longer(check_as_anew(model, ids, ids.shape[1]), 7, seed=5)
    check_as_anew(model, ids, 8)
    assert len(readings) == 2
