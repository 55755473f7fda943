"""Files of conversations: what is wrong with a damaged one is said when it is loaded, and `save` never loses one."""

import itertools
import json
import os
import random
import re
import signal
import stat
import threading
import time

import pytest
import safetensors
import safetensors.torch
import torch

from custom_generate.generate import CACHE, FORMAT_VERSION, SinkCache, _checksum, generate
from tests.support.helpers import prompt, small_model

pytestmark = pytest.mark.newest_only

# --- damage


def a_conversation(rows=2, seen=40):
    """A model, a cache that has seen so many tokens in each row, the first of which has two columns of padding."""
    model, cache = small_model(max_position_embeddings=20), SinkCache(16, 4)
    ids, mask = prompt(10, rows), torch.ones(rows, 10, dtype=torch.long)
    mask[0, :2] = 0
    settings = dict(max_new_tokens=seen - 9, do_sample=False, pad_token_id=0)
    generate(model, input_ids=ids, attention_mask=mask, past_key_values=cache, **settings)
    return model, cache


@pytest.fixture(scope="module")
def conversation(tmp_path_factory):
    """A model, and a file of a conversation with it."""
    model, cache = a_conversation()
    path = tmp_path_factory.mktemp("conversation") / "conversation.safetensors"
    cache.save(path)
    assert cache.get_seq_length() == 40
    assert read(path)[0]["pads"] == [2, 0] and all(read(path)[0]["offsets"])
    return model, path


def read(path):
    with safetensors.safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
        return json.loads(file.metadata()["sink_cache"]), tensors


def write(path, state, tensors):
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    text = state if isinstance(state, str) else json.dumps(state)
    safetensors.torch.save_file(tensors, path, {"sink_cache": text})


def refuses(path, model, message):
    with pytest.raises(ValueError) as refusal:
        SinkCache.load(path, model)
    assert str(path) in str(refusal.value) and re.search(message, str(refusal.value)), refusal.value


def put(state, **fields):
    return state.update(fields)


def change(tensors, name, function):
    tensors[name] = function(tensors[name])


# Of each kind one: what is there, its shape or dtype, a number, the state's fields, the checksum itself.
DAMAGE = {
    "no values": lambda s, t: t.pop("values.0"),
    "nan": lambda s, t: t["keys.1"][1, 1, 3].fill_(float("nan")),
    "a huge window": lambda s, t: put(s, window_length=10**12),
    "seen nan": lambda s, t: put(s, seen=float("nan")),
    "no checksum": lambda s, t: s.pop("checksum"),
    "a token": lambda s, t: t["latest_ids"][1, 3].add_(1),
    "a dtype": lambda s, t: change(t, "values.0", lambda v: v.double()),
    "layers exchanged": lambda s, t: t.update({"keys.0": t["keys.1"], "keys.1": t["keys.0"]}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_shows_in_the_checksum(damage, conversation, tmp_path):
    model, whole = conversation
    path, (state, tensors) = tmp_path / "damaged", read(whole)
    DAMAGE[damage](state, tensors)
    write(path, state, tensors)
    refuses(path, model, "something in it was changed after it was written")


def test_a_file_of_another_model(conversation, tmp_path):
    model, whole = conversation
    for other in (small_model("qwen3"), small_model(num_hidden_layers=1)):
        refuses(whole, other, "another model")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "16", '"text"', "{}", "[" * 10**5, '{"seen": ' + "9" * 5000 + "}"]
)
def test_metadata_of_junk(text, conversation, tmp_path):
    model, whole = conversation
    path = tmp_path / "junk"
    write(path, text, read(whole)[1])
    refuses(path, model, "its metadata is no state of a `SinkCache`: |its format has version None")


def test_a_file_that_was_cut_or_has_other_bytes(conversation, tmp_path):
    model, whole = conversation
    path, content = tmp_path / "bytes", whole.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for length in (0, 1, 8, 100, header - 1, header, header + 1, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        refuses(path, model, "`path` must be a file that `SinkCache.save` wrote")
    safetensors.torch.save_file(read(whole)[1], path, {"format": "pt"})
    refuses(path, model, "`path` must be a file that `SinkCache.save` wrote.* its metadata has no entry `sink_cache`")
    positions = random.Random(0).sample(range(header), 60) + random.Random(0).sample(range(header, len(content)), 20)
    for position in positions:
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        refuses(path, model, "must be a file that|can't be loaded")
    assert SinkCache.load(whole, model).get_seq_length() == 40


def test_a_file_of_a_newer_format(conversation, tmp_path):
    model, whole = conversation
    path, (state, tensors) = tmp_path / "newer", read(whole)
    assert state["version"] == FORMAT_VERSION
    # It may have other fields and tensors, too.
    write(path, {"version": FORMAT_VERSION + 1, "columns": 40}, {"states": tensors["keys.0"]})
    refuses(path, model, f"version {FORMAT_VERSION + 1}, and those from 1 to {FORMAT_VERSION} are known here")


def next_tokens(model, cache):
    """What is said next, in a copy."""
    mask = torch.ones(2, cache.get_seq_length() + 3, dtype=torch.long)
    mask[0, :2] = 0  # any other one is refused
    ids = prompt(3, rows=2, seed=5)
    settings = dict(max_new_tokens=20, do_sample=False, pad_token_id=0)
    return generate(model, input_ids=ids, attention_mask=mask, past_key_values=cache, **settings)


def test_a_file_from_before_there_were_versions(conversation, tmp_path):
    model, whole = conversation
    path, (state, tensors) = tmp_path / "older", read(whole)
    write(path, {name: value for name, value in state.items() if name not in ("version", "checksum")}, tensors)
    refuses(path, model, "its format has version None, and those from 1 to . are known here. Load it with")


def test_a_file_of_version_1(conversation, tmp_path):
    model, whole = conversation
    path, (state, tensors) = tmp_path / "older", read(whole)
    del state["digested"], tensors["digest"]
    state["version"] = 1
    write(path, state | {"checksum": _checksum(state, tensors)}, tensors)
    older, newer = SinkCache.load(path, model), SinkCache.load(whole, model)
    assert torch.equal(older.held.transcript.ids, newer.held.transcript.ids)
    assert torch.equal(next_tokens(model, older), next_tokens(model, newer))


def test_whether_padding_is_known_is_kept(tmp_path):
    model, cache = small_model(), SinkCache(16, 4)
    cache.bind(model)
    with torch.no_grad():
        mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
        model(prompt(5, rows=2), attention_mask=mask, **{CACHE: cache})
    cache.save(tmp_path / "conversation")
    loaded = SinkCache.load(tmp_path / "conversation", model)
    assert loaded.get_seq_length() == 5
    with torch.no_grad(), pytest.raises(ValueError, match="some of these 2 rows may be padded"):
        for token in range(12):
            model(prompt(1, rows=2, seed=token), **{CACHE: loaded})


def test_a_prompt_that_an_error_broke_off(tmp_path):
    model, cache = small_model(), SinkCache(16, 4)
    passes = []

    def fail(*args):
        passes.append(True)
        if len(passes) == 3:
            raise RuntimeError("stop")

    hook = model.model.embed_tokens.register_forward_pre_hook(fail) if cache.bind(model) else None
    settings = dict(input_ids=prompt(60), prefill_chunk_size=8, max_new_tokens=10, do_sample=False)
    with pytest.raises(RuntimeError, match="stop"):
        generate(model, past_key_values=cache, **settings)
    hook.remove()
    assert cache.get_seq_length() == 16
    cache.save(tmp_path / "conversation")
    loaded = SinkCache.load(tmp_path / "conversation", model)
    assert torch.equal(
        generate(model, past_key_values=loaded, **settings), generate(model, past_key_values=cache, **settings)
    )


def test_numbers_that_are_not_finite_are_not_saved(tmp_path):
    model, cache = a_conversation()
    path = tmp_path / "conversation"
    cache.save(path)
    before = path.read_bytes()
    cache.layers[1].values[0, 0, 7] = float("inf")
    with pytest.raises(ValueError, match="can't be saved: its 'values.1' holds numbers that are not finite"):
        cache.save(path)
    assert path.read_bytes() == before


# --- saving over a file


def test_a_new_file_has_the_mode_of_new_files(tmp_path):
    _, cache = a_conversation()
    (tmp_path / "other").touch()
    cache.save(tmp_path / "conversation")
    assert (tmp_path / "conversation").stat().st_mode == (tmp_path / "other").stat().st_mode
    assert sorted(os.listdir(tmp_path)) == ["conversation", "other"]


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o666, 0o664])
def test_mode_and_symbolic_links_are_kept(mode, tmp_path):
    model, cache = a_conversation()
    (tmp_path / "elsewhere").mkdir()
    there, link = tmp_path / "elsewhere/conversation", tmp_path / "link"
    link.symlink_to("elsewhere/conversation")
    cache.save(link)  # to where there is nothing yet
    assert link.is_symlink() and there.is_file()
    there.chmod(mode)
    cache.save(link)
    assert link.is_symlink() and stat.S_IMODE(there.stat().st_mode) == mode
    assert os.listdir(tmp_path / "elsewhere") == ["conversation"]
    assert SinkCache.load(link, model).get_seq_length() == 40


def test_a_path_from_the_working_folder(tmp_path, monkeypatch):
    model, cache = a_conversation()
    monkeypatch.chdir(tmp_path)
    cache.save("conversation")
    assert os.listdir(tmp_path) == ["conversation"] and SinkCache.load("conversation", model).get_seq_length() == 40


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), MemoryError()])
def test_an_error_on_the_way_leaves_the_old_file(error, tmp_path, monkeypatch):
    _, cache = a_conversation()
    path = tmp_path / "conversation"
    cache.save(path)
    before = path.read_bytes()

    def save_file(tensors, filename, metadata):
        with open(filename, "wb") as file:
            file.write(before[:1000])
        raise error

    monkeypatch.setattr(safetensors.torch, "save_file", save_file)
    with pytest.raises(type(error)) as raised:
        cache.save(path)
    assert not isinstance(error, OSError) or "`path` can't be written" in str(raised.value)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["conversation"]


def test_what_is_no_file_is_not_replaced(tmp_path):
    _, cache = a_conversation()
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", "/dev/null"):
        with pytest.raises(OSError, match=f"`path` can't be written, got '{path}'.*it is no file"):
            cache.save(path)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode) and os.listdir(tmp_path) == ["pipe"]
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_write_protected_file_is_not_replaced(tmp_path, monkeypatch):
    _, cache = a_conversation()
    path = tmp_path / "conversation"
    path.write_text("kept")
    path.chmod(0o444)
    if os.geteuid() == 0:  # who may write to any
        monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    with pytest.raises(OSError, match="`path` can't be written.*write-protected"):
        cache.save(path)
    assert path.read_text() == "kept"


def test_nothing_else_in_the_folder_is_touched(tmp_path):
    _, cache = a_conversation()
    (tmp_path / ".sink_cache-mine").mkdir()
    for name in (".sink_cache-mine/notes", ".sink_cache-half", "other"):
        (tmp_path / name).write_text("kept")
    cache.save(tmp_path / "conversation")
    assert sorted(os.listdir(tmp_path)) == [".sink_cache-half", ".sink_cache-mine", "conversation", "other"]
    assert (tmp_path / ".sink_cache-mine/notes").read_text() == "kept"


def test_threads_that_save_to_one_path(tmp_path):
    model = small_model()
    caches = [SinkCache(16, 4) for _ in range(4)]
    for number, cache in enumerate(caches):
        generate(model, input_ids=prompt(30 + number), past_key_values=cache, max_new_tokens=1)
    path, errors = tmp_path / "conversation", []

    def save(cache):
        try:
            for _ in range(10):
                cache.save(path)
                assert SinkCache.load(path, model).get_seq_length() in range(30, 34)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=save, args=[cache]) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert errors == [] and os.listdir(tmp_path) == ["conversation"]


def test_a_file_that_is_replaced_while_it_is_read(tmp_path):
    model, path, done = small_model(), tmp_path / "conversation", threading.Event()
    files = []
    for length in (30, 33):
        cache = SinkCache(16, 4)
        generate(model, input_ids=prompt(length), past_key_values=cache, max_new_tokens=1)
        cache.save(path)
        files.append(path.read_bytes())

    def replace():
        for file in itertools.cycle(files):
            (tmp_path / "other").write_bytes(file)
            os.replace(tmp_path / "other", path)
            if done.is_set():
                return

    thread = threading.Thread(target=replace)
    thread.start()
    try:
        found = {SinkCache.load(path, model).get_seq_length() for _ in range(100)}
    finally:
        done.set()
        thread.join()
    assert found == {30, 33}


@pytest.mark.slow
def test_a_kill_leaves_the_old_or_the_new(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, path = small_model(), "conversation"
    caches = SinkCache(512, 4), SinkCache(512, 4)
    for length, cache in zip((100, 200), caches):
        generate(model, input_ids=prompt(length, rows=16), past_key_values=cache, max_new_tokens=1)
    caches[0].save(path)
    start = time.perf_counter()
    caches[1].save(path)
    takes, found = time.perf_counter() - start, []
    while len(found) < 40 or (len(found) < 400 and len(set(found)) < 2):  # a busy machine ends no first save in time
        child = os.fork()
        if not child:
            try:
                torch.set_num_threads(1)  # a fork has no others
                while True:
                    for cache in caches:
                        cache.save(path)
            finally:
                os._exit(1)
        time.sleep(random.uniform(0.5, 3) * takes)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL  # it was at work till then
        found.append(SinkCache.load(path, model).get_seq_length())
    assert set(found) == {100, 200}
    assert [name for name in os.listdir(".") if not name.startswith((".sink_cache-", ".tmp"))] == ["conversation"]
