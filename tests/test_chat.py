"""`examples/chat.py`, in a real terminal."""

import os
import pty
import re
import runpy
import signal
import sys
import termios
import time

import pexpect
import pytest
import torch
from pexpect.fdpexpect import fdspawn

import custom_generate
from tests.support import ROOT
from tests.support.helpers import small_model, small_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.newest_only]


@pytest.fixture
def terminal(carrier, tmp_path, installed):
    """A function that starts a chat, with a model that never ends its answers."""
    started = []

    def start(*arguments: str) -> fdspawn:
        program = str(ROOT / "examples/chat.py")
        # A fork of this process, which has imported what takes seconds.
        process, terminal = pty.fork()
        if process == 0:
            try:
                os.chdir(tmp_path)
                sys.path.insert(0, str(installed))
                sys.argv = [program, "--model", str(carrier), "--window-length", "64", *arguments]
                be_a_program_in_a_terminal()
                runpy.run_path(program, run_name="__main__")
            finally:
                os._exit(0)
        chat = fdspawn(terminal, timeout=60, encoding="utf-8")
        started.append((process, chat))
        chat.expect("> ")
        return chat

    yield start
    for process, chat in started:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        chat.close()


def be_a_program_in_a_terminal() -> None:
    """Read from and write to the terminal of this process, which doesn't say again what is typed."""
    torch.set_num_threads(1)  # a fork has no others
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w", buffering=1), open(2, "w", buffering=1)
    settings = termios.tcgetattr(0)
    settings[3] &= ~termios.ECHO
    termios.tcsetattr(0, termios.TCSANOW, settings)


def say(chat: fdspawn, line: str) -> str:
    """What is printed before the next prompt."""
    chat.sendline(line)
    chat.expect("\n?> ")
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", chat.before).strip()


def seen(chat: fdspawn) -> int:
    return int(re.match(r"([\d,]+) tokens seen", say(chat, "/stats")).group(1).replace(",", ""))


def test_a_conversation_past_the_window_saved_and_loaded(terminal):
    chat = terminal("--system", "You keep a lighthouse.", "--max-new-tokens", "50")
    for _ in range(3):
        assert re.fullmatch("[a-z]+", say(chat, "And then?"))
    stats = say(chat, "/stats")
    assert re.match(r"\d+ tokens seen, 64 kept \(\d+ of them for ever\), [\d.]+ MiB", stats)
    assert seen(chat) > 150
    say(chat, "/reset")
    assert seen(chat) == 0
    assert "/quit" in say(chat, "/what")

    say(chat, "It was a dark night.")
    say(chat, "/save conversation.safetensors")
    expected, before = say(chat, "And then?"), seen(chat)
    say(chat, "/reset")
    assert "No such file" in say(chat, "/load nothing.safetensors")
    say(chat, "/load conversation.safetensors")
    assert say(chat, "And then?") == expected and seen(chat) == before
    chat.sendline("/quit")
    chat.expect(pexpect.EOF)


def test_ctrl_c_stops_an_answer_and_not_the_chat(terminal):
    chat = terminal("--max-new-tokens", "1000000")
    chat.sendline("Go on for ever.")
    time.sleep(1)
    chat.send("\x03")
    chat.expect("\n?> ")
    stopped = seen(chat)
    assert stopped > 40  # it was in the answer: the turn itself is shorter
    assert seen(chat) == stopped


@pytest.mark.parametrize("ends, read", [({}, 9), ({"forced_eos_token_id": 2}, 8)], ids=["cut off", "ended"])
def test_a_template_that_puts_nothing_after_an_answer(monkeypatch, ends, read):
    monkeypatch.setitem(sys.modules, "sink_cache", custom_generate)
    Chat = runpy.run_path(str(ROOT / "examples/chat.py"))["Chat"]
    tokenizer = small_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}[assistant]{% endif %}"
    model = small_model(vocab_size=300, eos_token_id=2)
    chat = Chat(model, tokenizer, 16, None, max_new_tokens=9, min_new_tokens=8, do_sample=False, **ends)
    turn = chat.turn({"role": "user", "content": "And then?"})
    assert turn == "[user]And then?" and chat.ids("").dtype is torch.long
    length = sum(chat.ids(text).shape[1] for text in (turn, "[assistant]")) + read  # and nothing behind the answer
    for number in range(1, 3):
        chat.answer("And then?")
        assert chat.cache.get_seq_length() == number * length
