"""`transformers serve` with a model repository that carries this one, and its clients, each a process of its own."""

import contextlib
import json
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from packaging.version import Version
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.documents import snippets
from tests.support.helpers import RELEASE, ROOT, loadable

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(RELEASE < Version("5.23"), reason="`transformers serve` and `chat` are tried on 5.23.0 only"),
]

TURNS = ["It was a dark night, and the lamp", "And then?", "Go on, what did the keeper do?"]


def documented_command(start: str, url: str) -> list[str]:
    """The command that starts so in docs/usage.md, for a server at `url`."""
    command = next(snippet for snippet in snippets("docs/usage.md", "") if snippet.startswith(start))
    program, *arguments = shlex.split(command.replace("http://localhost:8000", url))
    return [str(Path(sys.executable).with_name(program)), *arguments]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of a server that has loaded nothing yet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://localhost:{port}"
    log = tmp_path_factory.mktemp("serve") / "log"
    command = [*documented_command("transformers serve", url), "--device", "cpu", "--port", str(port)]
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT) as process:
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health"):
                break
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield url
        process.terminate()


@pytest.fixture
def answer(carrier, hub):
    """What the model says next in a conversation, asked through the local folder."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(carrier), AutoTokenizer.from_pretrained(carrier)

    def answer(messages: list[dict], window_length: int = 16) -> str:
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        sequences = model.generate(
            **inputs,
            custom_generate=loadable(ROOT),
            trust_remote_code=True,
            window_length=window_length,
            max_new_tokens=60,
            do_sample=False,
        )
        return tokenizer.decode(sequences[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)

    return answer


@pytest.mark.parametrize("stream", [False, True], ids=["at once", "streaming"])
def test_the_openai_client(stream, server, answer):
    from openai import OpenAI

    messages, client = [], OpenAI(base_url=f"{server}/v1", api_key="none")
    for turn in TURNS:
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
