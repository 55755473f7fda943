"""Thoughts that a chat template leaves out of later turns are nowhere in the cache then."""

import functools
import runpy
import sys

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

import custom_generate
from custom_generate.generate import SinkCache
from tests.support import ROOT
from tests.support.documents import snippets
from tests.support.helpers import loadable, small_model, small_tokenizer
from tests.support.oracle import difference

pytestmark = pytest.mark.newest_only

# As Qwen3's: the last answer has its thoughts, or an empty one; those before it have none.
TEMPLATE = (
    "{% for message in messages %}<s>{{ message.role }}: "
    "{% if message.role != 'assistant' or loop.last and '</think>' in message.content %}{{ message.content }}"
    "{% elif loop.last %}<think></think>{{ message.content }}"
    "{% else %}{{ message.content.split('</think>')[-1] }}{% endif %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
# As DeepSeek-R1's, where a thought begins in the prompt.
TEMPLATES = {"in the answer": TEMPLATE, "in the prompt": TEMPLATE.replace("<s>assistant: ", "<s>assistant: <think>")}
BEGIN, END, LENGTH = 300, 301, 40  # of a thought, in tokens; the window holds 48
END_OF_TEXT = 2
SYSTEM = "You keep a lighthouse, and say little."


class Thinks(LogitsProcessor):
    """Has each answer begin with a thought, and end ten tokens after it."""

    def __call__(self, input_ids, scores):
        answer = input_ids[0].tolist()
        answer = answer[len(answer) - answer[::-1].index(1) :]
        wanted = {LENGTH: END, LENGTH + 10: END_OF_TEXT}.get(len(answer)) if BEGIN in answer else BEGIN
        if wanted is not None:
            return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([wanted]), 0.0)
        return scores.index_fill(1, torch.tensor([0, 1, END_OF_TEXT, BEGIN, END]), -torch.inf)


@pytest.fixture(params=TEMPLATES.values(), ids=TEMPLATES.keys())
def thinking(request):
    """A model and a tokenizer with one of the templates; what `model.generate` says begins with a thought."""
    tokenizer = small_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = request.param
    model = small_model("qwen3", vocab_size=302, num_hidden_layers=2)
    model.generation_config.eos_token_id = END_OF_TEXT
    model.generate = functools.partial(model.generate, logits_processor=LogitsProcessorList([Thinks()]))
    return model, tokenizer


def logits_after(cache, model, ids):
    """The logits of the token after `ids`, int64 `[1, tokens]`, of which the cache has seen the first ones."""
    with torch.no_grad():
        for token in ids[:, cache.get_seq_length() :].split(1, dim=1):
            logits = model(**cache.prepare_inputs(token)).logits
    return logits[:, -1]


def check_without_thoughts(cache, model, ids):
    """The cache, which has seen the first of `ids`, goes on as one that has never seen anything else."""
    assert 48 < cache.get_seq_length() < ids.shape[1] and BEGIN not in ids and END not in ids
    fresh = SinkCache(48, cache.num_sink_tokens).bind(model)
    assert difference(logits_after(cache, model, ids), logits_after(fresh, model, ids)) < 1e-5


def ran(document, part, model, tokenizer):
    """The names that the block of code of a document with `part` in it leaves, with a window of 48."""
    code = next(code for code in snippets(document, "python") if part in code).replace("1024", "48")
    stream = dict(custom_generate=loadable(ROOT), trust_remote_code=True)
    names = dict(model=model, tokenizer=tokenizer, stream=stream, SinkCache=SinkCache)
    exec(code.replace('"org/sink_cache"', repr(loadable(ROOT))).replace("tokens=200", "tokens=60"), names)
    assert all("</think>" in message["content"] for message in names["messages"] if message["role"] == "assistant")
    return names


def test_in_a_cache_of_ones_own(thinking):
    names = ran("docs/usage.md", "messages, cache = ", *thinking)
    messages = [*names["messages"], {"role": "user", "content": "And then?"}]
    check_without_thoughts(names["cache"], thinking[0], names["tokens_of"](messages).input_ids)


def test_in_a_conversation_that_is_kept(thinking):
    model, _ = thinking
    names = ran("README.md", "kept_conversations", *thinking)
    sizes = dict(window_length=48, num_sink_tokens=names["num_sink_tokens"])
    assert names["prompt"].input_ids.shape[1] > 48 and SinkCache.kept_nbytes(model) > 0
    call = dict(custom_generate=loadable(ROOT), trust_remote_code=True, max_new_tokens=60)
    anew = model.generate(**names["prompt"], **call, **sizes)
    assert torch.equal(names["said"], anew)


def test_in_the_chat(thinking, monkeypatch):
    monkeypatch.setitem(sys.modules, "sink_cache", custom_generate)
    model, tokenizer = thinking
    settings = dict(max_new_tokens=60, do_sample=False, logits_processor=LogitsProcessorList([Thinks()]))
    Chat = runpy.run_path(str(ROOT / "examples/chat.py"))["Chat"]
    chat, messages = Chat(model, tokenizer, 48, SYSTEM, **settings), []
    in_later_turns = chat.later

    def noted(message, answer):
        messages.extend([message, {"role": "assistant", "content": answer}])
        return in_later_turns(message, answer)

    chat.later = noted
    for question in ("Who are you?", "What did you see last night?", "And then?"):
        chat.answer(question)
    assert all("</think>" in message["content"] for message in messages[1::2])
    ids = chat.ids(chat.text([*messages, {"role": "user", "content": "And now?"}]))
    check_without_thoughts(chat.cache, model, ids)
