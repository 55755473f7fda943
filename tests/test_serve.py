"""`transformers serve` with a model repository that carries this one, and its clients, each a process of its own."""

import contextlib
import copy
import json
import multiprocessing
import runpy
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from custom_generate.generate import generate
from tests.support import ROOT
from tests.support.documents import snippets
from tests.support.helpers import free_port, image_url, loadable

pytestmark = [pytest.mark.slow, pytest.mark.newest_only]

TURNS = ["It was a dark night, and the lamp", "And then?", "Go on, what did the keeper do?"]


def documented_command(start: str, url: str) -> list[str]:
    """The command that starts so in docs/usage.md, for a server at `url`."""
    command = next(snippet for snippet in snippets("docs/usage.md", "") if snippet.startswith(start))
    program, *arguments = shlex.split(command.replace("http://localhost:8000", url))
    return [str(Path(sys.executable).with_name(program)), *arguments]


def run_counting(command: list[str], log: Path, counts: Path) -> None:
    """Run a program, and write a line for each forward pass: how many tokens of a row it got."""

    def count(module, args):
        if isinstance(module, torch.nn.Embedding):
            with counts.open("a") as file:
                print(args[0].shape[1], file=file)

    torch.set_num_threads(1)  # a fork has no others
    torch.nn.modules.module.register_module_forward_pre_hook(count)
    with log.open("w", buffering=1) as sys.stdout:
        sys.argv, sys.stderr = command, sys.stdout
        runpy.run_path(command[0], run_name="__main__")


@pytest.fixture(scope="module")
def counts(tmp_path_factory):
    """The file that the server writes its counts of tokens to."""
    path = tmp_path_factory.mktemp("serve") / "counts"
    path.touch()
    return path


@pytest.fixture(scope="module")
def server(tmp_path_factory, counts):
    """The address of a server that has loaded nothing yet."""
    port = free_port()
    url = f"http://localhost:{port}"
    log = tmp_path_factory.mktemp("serve") / "log"
    command = [*documented_command("transformers serve", url), "--device", "cpu", "--port", str(port)]
    # A fork of this process, which has imported what takes seconds.
    process = multiprocessing.get_context("fork").Process(target=run_counting, args=(command, log, counts))
    process.start()
    deadline = time.monotonic() + 120
    while True:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health"):
            break
        assert process.is_alive() and time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
    yield url
    process.terminate()
    process.join()


@pytest.fixture
def answer(carrier, hub):
    """What the model says next in a conversation, asked through the local folder."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(carrier), AutoTokenizer.from_pretrained(carrier)

    def answer(messages: list[dict], window_length: int = 16, max_new_tokens: int = 60) -> str:
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        sequences = model.generate(
            **inputs,
            custom_generate=loadable(ROOT),
            trust_remote_code=True,
            window_length=window_length,
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
        return tokenizer.decode(sequences[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)

    return answer


def test_the_openai_client(server, answer):
    from openai import OpenAI

    messages, client = [], OpenAI(base_url=f"{server}/v1", api_key="none")
    for turn, stream in zip(TURNS, (True, False, True)):
        messages.append({"role": "user", "content": turn})
        call = dict(model="you/my_model", messages=messages, max_tokens=60, temperature=0, stream=stream)
        response = client.chat.completions.create(**call)
        if stream:
            chunks = [chunk.choices[0].delta.content or "" for chunk in response]
            assert sum(map(bool, chunks)) > 10
            content = "".join(chunks)
        else:
            content = response.choices[0].message.content
        assert content == answer(messages)
        messages.append({"role": "assistant", "content": content})
    # The window of the repository's generation_config.json made these words; another one makes others.
    assert content != answer(messages[:-1], window_length=200)


def test_a_window_that_a_request_brings(server, answer, carrier):
    from openai import OpenAI

    messages = [{"role": "user", "content": " ".join(TURNS)}]
    settings = json.loads((carrier / "generation_config.json").read_text())
    client = OpenAI(base_url=f"{server}/v1", api_key="none")
    call = dict(model="you/my_model", messages=messages, max_tokens=60, temperature=0)
    said = {}
    for window_length in (16, 200):
        body = {"generation_config": json.dumps({**settings, "window_length": window_length})}
        response = client.chat.completions.create(**call, extra_body=body)
        said[window_length] = response.choices[0].message.content
        assert said[window_length] == answer(messages, window_length)
    assert said[16] != said[200]


def test_transformers_chat(server, answer, carrier, tmp_path):
    # It sends a configuration of its own, here without a window: that of the model's file holds.
    settings = json.loads((carrier / "generation_config.json").read_text())
    own = {name: settings[name] for name in ("bos_token_id", "pad_token_id", "suppress_tokens")}
    (tmp_path / "own.json").write_text(json.dumps(own))
    command = [*documented_command("transformers chat", server), "max_new_tokens=60", "do_sample=False"]
    command += ["--generation-config", tmp_path / "own.json"]
    lines = [line for turn in TURNS for line in (turn, "n")] + ["!exit"]  # no, don't go on after 60 tokens
    chat = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True, timeout=120)
    assert chat.returncode == 0, chat.stderr
    shown, messages = "".join(chat.stdout.split()), []
    for turn in TURNS:
        messages.append({"role": "user", "content": turn})
        messages.append({"role": "assistant", "content": answer(messages)})
        assert messages[-1]["content"] in shown


def test_kept_conversations(server, answer, carrier, counts, hub, tmp_path):
    from openai import OpenAI

    folder = shutil.copytree(carrier, tmp_path / "keeping")
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**settings, "kept_conversations": 2}))
    hub.commit_folder("you/keeping_model", folder)
    tokenizer = AutoTokenizer.from_pretrained(carrier)
    client, new_tokens = OpenAI(base_url=f"{server}/v1", api_key="none"), 12

    def length(messages):
        return len(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True).input_ids)

    def ask(messages, stream=False):
        """What the server says, which is what reading all anew says, and how many tokens it read before."""
        counts.write_text("")
        call = dict(model="you/keeping_model", messages=messages, temperature=0, stream=stream)
        response = client.chat.completions.create(**call, max_tokens=new_tokens)
        if stream:
            said = "".join(chunk.choices[0].delta.content or "" for chunk in response)
        else:
            said = response.choices[0].message.content
        read = sum(map(int, counts.read_text().split())) - new_tokens + 1
        assert said == answer(messages, max_new_tokens=new_tokens)
        return said, read

    ask([{"role": "user", "content": "Load the model, and read it."}])
    histories, before = [[], []], [0, 0]  # two conversations, and how long they were
    for turn in range(5):
        for number, messages in enumerate(histories):
            messages.append({"role": "user", "content": f"{TURNS[turn % 3]} ({number}, {turn})"})
            said, read = ask(messages, stream=turn % 2 == 0)
            # The last answer, as it comes back, and what is new. The space before an answer becomes part of its word.
            assert turn == 0 or read <= length(messages) - before[number] + 1
            before[number] = length(messages)
            messages.append({"role": "assistant", "content": said})
    assert length(messages) > 10 * 16  # windows

    edited = copy.deepcopy(histories[0])
    edited[6]["content"] = "Tell it otherwise."
    edited.append({"role": "user", "content": TURNS[0]})
    ask(edited)

    messages = histories[1] + [{"role": "user", "content": "Go on, and on."}]
    call = dict(model="you/keeping_model", messages=messages, temperature=0, stream=True, max_tokens=2_000)
    with client.chat.completions.create(**call) as response:
        for _ in zip(range(3), response):
            pass
    ask(messages)
    messages += [{"role": "assistant", "content": "on"}, {"role": "user", "content": TURNS[1]}]
    _, read = ask(messages)
    assert read <= length(messages) - length(messages[:-2]) + 1


def test_images(server, carrier_of_images, hub):
    from openai import OpenAI

    model, processor = (
        kind.from_pretrained(carrier_of_images) for kind in (AutoModelForImageTextToText, AutoProcessor)
    )
    settings = json.loads((carrier_of_images / "generation_config.json").read_text())
    longer = {"generation_config": json.dumps({**settings, "window_length": 200, "kept_conversations": 2})}
    client, asked, messages = OpenAI(base_url=f"{server}/v1", api_key="none"), [], []
    for turn in range(2):
        words, url = {"type": "text", "text": "What is to be seen?"}, image_url(turn)
        asked.append({"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, words]})
        messages.append({"role": "user", "content": [{"type": "image", "url": url}, words]})
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_tensors="pt", return_dict=True
        )
        plain = dict(**inputs, max_new_tokens=20, do_sample=False)
        expected = [generate(model, 16, 4, **plain), model.generate(**plain)]  # which a window of 200 holds all of
        said = []
        for body, sequences in zip(({}, longer), expected):
            request = dict(model="you/my_eyes", messages=asked, max_tokens=20, temperature=0, extra_body=body)
            with client.chat.completions.create(**request, stream=True) as response:
                said.append("".join(chunk.choices[0].delta.content or "" for chunk in response))
            answer = processor.decode(sequences[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
            assert said[-1] == answer
        assert said[0] != said[1]
        for each in (asked, messages):
            each.append({"role": "assistant", "content": said[0]})
