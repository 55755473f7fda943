"""Every way that transformers offers into `generate` leads to the same tokens."""

import contextlib
import copy
import functools
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    dynamic_module_utils,
    pipeline,
)

from custom_generate.generate import CACHE, SinkCache, generate
from tests.support import ROOT
from tests.support.helpers import RELEASE, at_the_ends, image_url, loadable, prompt, seeded, small_model

CALL = dict(window_length=16, num_sink_tokens=4, max_new_tokens=24, do_sample=False)


@pytest.fixture
def model():
    return small_model(vocab_size=300)


@pytest.fixture(scope="module")
def expected():
    """The tokens of the call through the local folder."""
    return through_the_folder(small_model(vocab_size=300), prompt(5))


def through_the_folder(model, input_ids, **settings) -> torch.Tensor:
    return model.generate(
        input_ids=input_ids, custom_generate=loadable(ROOT), trust_remote_code=True, **{**CALL, **settings}
    )


# --- custom_generate="org/sink_cache"


def test_a_hub_id_downloads_once(hub, model, expected):
    hub.commit_folder("org/fresh", ROOT / "custom_generate", inside="custom_generate")
    call = dict(input_ids=prompt(5), custom_generate="org/fresh", trust_remote_code=True, **CALL)
    assert torch.equal(model.generate(**call), expected)
    assert "GET /org/fresh/resolve/main/custom_generate/generate.py" in hub.requests
    hub.requests.clear()
    assert torch.equal(model.generate(**call), expected)
    assert hub.requests and not [request for request in hub.requests if not request.startswith("HEAD ")]


@pytest.mark.ends_only
@pytest.mark.parametrize("release", ["4.51.3", "5.99.0.dev0", "6.1.0"])
def test_only_releases_older_than_the_tested_ones_are_refused(monkeypatch, release):
    installed = {"torch": "2.6.0+cpu", "transformers": release}
    monkeypatch.setattr(dynamic_module_utils.importlib.metadata, "version", installed.get)
    context = pytest.raises(ImportError, match="transformers>=4.52") if release < "4.52" else contextlib.nullcontext()
    with context:
        dynamic_module_utils.check_python_requirements(ROOT, requirements_file="custom_generate/requirements.txt")


def test_a_hub_id_with_a_revision(hub, model):
    source = (ROOT / "custom_generate/generate.py").read_bytes()
    pinned, newest = (
        hub.commit("org/pinned", {"custom_generate/generate.py": source.replace(b"window_length: int = 256", default)})
        for default in (b"window_length: int = 17", b"window_length: int = 23")
    )
    for revision, window_length in ((pinned, 17), (newest, 23), ("main", 23)):
        output = model.generate(
            prompt(5),
            custom_generate="org/pinned",
            trust_remote_code=True,
            revision=revision,
            max_new_tokens=24,
            do_sample=False,
            return_dict_in_generate=True,
        )
        assert output[CACHE].window_length == window_length
        assert torch.equal(output.sequences, through_the_folder(model, prompt(5), window_length=window_length))


def test_a_hub_id_that_is_not_trusted(hub, model):
    hub.commit_folder("org/stranger", ROOT / "custom_generate", inside="custom_generate")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        model.generate(prompt(5), custom_generate="org/stranger", trust_remote_code=False, **CALL)
    assert not [name for name in sys.modules if "stranger" in name]


# --- a folder


def test_what_transformers_itself_finds_the_file_to_import(model, expected, imports_found_once, monkeypatch):
    # In the other tests, a stand-in remembers it.
    found, find = [], imports_found_once
    monkeypatch.setattr(dynamic_module_utils, "get_imports", lambda file: found.append(find(file)) or found[-1])
    assert torch.equal(through_the_folder(model, prompt(5)), expected)
    third_party = set(found[0]) - sys.stdlib_module_names
    assert third_party == {"safetensors", "torch", "transformers"}


def test_a_folder_under_another_name(model, expected, tmp_path):
    shutil.copytree(ROOT / "custom_generate", tmp_path / "clone/custom_generate")
    call = dict(input_ids=prompt(5), custom_generate=loadable(tmp_path / "clone"), trust_remote_code=True, **CALL)
    assert torch.equal(model.generate(**call), expected)


def test_the_folder_that_one_is_in(model, expected, monkeypatch):
    monkeypatch.chdir(ROOT)
    call = dict(input_ids=prompt(5), custom_generate=loadable(Path(".")), trust_remote_code=True, **CALL)
    assert torch.equal(model.generate(**call), expected)


def test_classes_of_two_doors_know_each_other(model, expected):
    # A cache made by this module's class goes on in the class that transformers loaded, and the other way round.
    cache = SinkCache(16, 4)
    settings = dict(return_dict_in_generate=True, cache=cache, window_length=None, num_sink_tokens=None)
    output = through_the_folder(model, prompt(5), max_new_tokens=12, **settings)
    assert output[CACHE] is cache
    loaded = through_the_folder(model, prompt(5), max_new_tokens=12, return_dict_in_generate=True)[CACHE]
    assert type(loaded).__name__ == "SinkCache" and not isinstance(loaded, SinkCache)
    for past_key_values in (cache, loaded):
        rest = generate(
            model,
            input_ids=output.sequences,
            attention_mask=torch.ones_like(output.sequences),  # a random model may well say the pad token
            past_key_values=past_key_values,
            max_new_tokens=12,
            do_sample=False,
        )
        assert torch.equal(rest, expected)


def test_conversations_kept_by_one_door_are_counted_and_freed_by_another(model, expected):
    installed = functools.partial(generate, model)
    loaded = functools.partial(through_the_folder, model)
    the_other_class = type(loaded(prompt(5), return_dict_in_generate=True)[CACHE])
    assert the_other_class is not SinkCache
    sizes = []
    for door in (lambda ids, **kwargs: installed(input_ids=ids, **CALL, **kwargs), loaded):
        assert torch.equal(door(prompt(5), kept_conversations=2), expected)
        sizes.append(SinkCache.kept_nbytes(model))
        assert the_other_class.kept_nbytes(model) == sizes[-1]
        assert torch.equal(door(prompt(5), kept_conversations=2), expected)  # each goes on in its own
    assert sizes[1] == 2 * sizes[0] > 0
    the_other_class.forget_kept(model)
    assert SinkCache.kept_nbytes(model) == the_other_class.kept_nbytes(model) == 0


# --- a model repository of one's own, which carries the folder


@pytest.mark.parametrize("door", [at_the_ends("folder"), "hub"])
def test_a_model_repository_that_carries_it(door, carrier, tmp_path):
    name = loadable(carrier) if door == "folder" else "you/my_model"
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
    expected = through_the_folder(AutoModelForCausalLM.from_pretrained(carrier), prompt(5))
    call = dict(input_ids=prompt(5), max_new_tokens=24, do_sample=False)
    assert torch.equal(model.generate(**call), expected)
    assert torch.equal(copy.deepcopy(model).generate(**call), expected)
    assert not torch.equal(model.generate(**call, window_length=64), expected)
    # Saved, it is a model like any other; with the folder beside its weights it streams again.
    model.save_pretrained(tmp_path / "saved")
    shutil.copytree(carrier / "custom_generate", tmp_path / "saved/custom_generate", dirs_exist_ok=True)
    again = AutoModelForCausalLM.from_pretrained(loadable(tmp_path / "saved"), trust_remote_code=True)
    assert torch.equal(again.generate(**call), expected)


@pytest.mark.parametrize("door", ["folder", at_the_ends("hub")])
def test_a_prompt_by_position_on_a_model_that_carries_it(door, carrier):
    name = loadable(carrier) if door == "folder" else "you/my_model"
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
    settings = dict(max_new_tokens=24, do_sample=False)
    config = GenerationConfig(**settings, pad_token_id=0)
    expected = model.generate(input_ids=prompt(5), **settings)
    assert torch.equal(model.generate(prompt(5), **settings), expected)
    assert torch.equal(copy.deepcopy(model).generate(prompt(5), **settings), expected)
    by_config = model.generate(inputs=prompt(5), generation_config=config)
    assert torch.equal(model.generate(prompt(5), config), by_config)
    assert torch.equal(model.generate(prompt(5), config, window_length=16, num_sink_tokens=4), by_config)
    # By hand too, it takes what its own `generate` takes only if it comes by name.
    assert torch.equal(generate(prompt(5), model=model, window_length=16, num_sink_tokens=4, **settings), expected)
    assert torch.equal(generate(model, 16, 4, False, input_ids=prompt(5), **settings), expected)
    for args, kwargs, message in (
        ((prompt(5),), dict(inputs=prompt(5)), "`inputs` was given twice"),
        ((prompt(5),) * 20, {}, "arguments by position.*got 20"),
    ):
        with pytest.raises(TypeError, match=message):
            model.generate(*args, **settings, **kwargs)


def test_arguments_by_position_by_hand(model):
    for args, kwargs, message in (
        ((model, 16), dict(window_length=16), "`window_length` was given twice"),
        ((model, 16, 4, False, prompt(5)), {}, "takes 4 arguments by position.*got 5"),
        ((), {}, "`model` must be a transformers `PreTrainedModel`"),
    ):
        with pytest.raises(TypeError, match=message):
            generate(*args, input_ids=prompt(5), **kwargs)


# --- the function itself


@pytest.mark.skipif(
    RELEASE < Version("4.57"),
    reason="transformers<4.56 takes no function in `custom_generate`, and 4.56 passes one no arguments of its own",
)
@pytest.mark.parametrize("arguments", [{}, CALL], ids=["no window", "a window"])
def test_the_function_itself_is_no_name_of_a_repository(model, arguments):
    passes = []
    model.register_forward_pre_hook(lambda *args: passes.append(args))
    with pytest.raises(TypeError, match="`custom_generate` must be the name or the folder of this repository"):
        model.generate(prompt(5), custom_generate=generate, **arguments)
    assert passes == []


# --- pipeline


@pytest.mark.parametrize(
    "chat, door",
    [
        (False, "custom_generate"),
        (True, "carrier"),
        at_the_ends(True, "custom_generate"),
        at_the_ends(False, "carrier"),
    ],
)
def test_a_pipeline(chat, door, carrier, hub):
    if door == "carrier":
        generator = pipeline("text-generation", loadable(carrier), trust_remote_code=True)
        call = {}
    else:
        tokenizer = AutoTokenizer.from_pretrained(carrier)
        generator = pipeline("text-generation", AutoModelForCausalLM.from_pretrained(carrier), tokenizer=tokenizer)
        call = dict(custom_generate="org/sink_cache", trust_remote_code=True, window_length=16, num_sink_tokens=4)
    tokenizer, prompt = generator.tokenizer, "It was a dark night, and the lamp"
    messages = [{"role": "system", "content": "Tell a story."}, {"role": "user", "content": prompt}]
    inputs = tokenizer(prompt, return_tensors="pt").input_ids
    if chat:
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).input_ids
    text = generator(messages if chat else prompt, max_new_tokens=24, do_sample=False, return_full_text=False, **call)
    plain = AutoModelForCausalLM.from_pretrained(carrier)
    expected = through_the_folder(plain, inputs)[0, inputs.shape[1] :]
    assert text[0]["generated_text"] == tokenizer.decode(expected, skip_special_tokens=True)


@pytest.mark.newest_only
@pytest.mark.parametrize("door", ["custom_generate", "carrier"])
def test_a_pipeline_of_images(door, carrier_of_images, hub):
    plain, processor = (
        kind.from_pretrained(carrier_of_images) for kind in (AutoModelForImageTextToText, AutoProcessor)
    )
    call = {}
    if door == "custom_generate":
        call = dict(custom_generate="org/sink_cache", trust_remote_code=True)
    asker = pipeline("image-text-to-text", loadable(carrier_of_images), trust_remote_code=door == "carrier")
    messages, said = [], {}
    for turn in range(2):
        content = [{"type": "image", "url": image_url(turn)}, {"type": "text", "text": "What is to be seen?"}]
        messages.append({"role": "user", "content": content})
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_tensors="pt", return_dict=True
        )
        assert len(inputs.pixel_values) == turn + 1
        for window_length in (16, 200):
            settings = dict(window_length=window_length, max_new_tokens=20, do_sample=False)
            output = asker(text=messages, return_full_text=False, generate_kwargs=settings | call)
            expected = generate(plain, **inputs, **settings)
            said[window_length] = processor.decode(expected[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
            assert output[0]["generated_text"] == said[window_length]
        assert torch.equal(plain.generate(**inputs, max_new_tokens=20, do_sample=False), expected)
        messages.append({"role": "assistant", "content": said[16]})
    assert said[16] != said[200]


# --- defaults from a file


def test_a_window_from_a_generation_config(model, expected):
    settings = dict(max_new_tokens=24, do_sample=False, pad_token_id=0)
    config = GenerationConfig(window_length=16, num_sink_tokens=4, **settings)
    assert torch.equal(generate(model, input_ids=prompt(5), generation_config=config), expected)
    # An argument wins over a configuration that is handed over, and that over the model's own.
    model.generation_config.window_length, model.generation_config.num_sink_tokens = 32, 2
    assert torch.equal(generate(model, input_ids=prompt(5), generation_config=config), expected)
    config.window_length = 64
    call = dict(input_ids=prompt(5), generation_config=config)
    assert torch.equal(generate(model, window_length=16, **call), expected)
    assert not torch.equal(generate(model, **call), expected)
    # A cache has its window already.
    assert torch.equal(generate(model, past_key_values=SinkCache(16, 4), **call), expected)


def test_a_window_from_a_file_that_is_no_number(model):
    model.generation_config.window_length = "16"
    with pytest.raises(TypeError, match="`window_length` must be an int.*'16'"):
        generate(model, input_ids=prompt(5))


@pytest.mark.parametrize("door", [at_the_ends("folder"), "hub"])
def test_a_window_in_a_file_from_which_transformers_drops_it_is_named(door, hub, expected, tmp_path):
    folder = tmp_path / f"dropped-by-{door}"
    small_model(vocab_size=300).save_pretrained(folder)
    settings = {"_from_model_config": True, "window_length": 16, "num_sink_tokens": 4, "kept_conversations": 2}
    (folder / "generation_config.json").write_text(json.dumps(settings | {"pad_token_id": 0}))
    shutil.copytree(ROOT / "custom_generate", folder / "custom_generate")
    name = loadable(folder) if door == "folder" else "you/dropped"
    if door == "hub":
        hub.commit_folder(name, folder)
    carrying = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
    call = dict(input_ids=prompt(5), max_new_tokens=CALL["max_new_tokens"], do_sample=False)
    for model in (carrying.generate, functools.partial(generate, carrying)):
        for given, named in ({}, "window_length` is 16"), ({"window_length": 16}, "num_sink_tokens` is 4"):
            with pytest.raises(ValueError, match=f"`{named} in the model's.*Delete that entry.*dropped"):
                model(**call, **given)
        with pytest.raises(ValueError, match="`kept_conversations` is 2"):
            model(**call, window_length=16, num_sink_tokens=4)
        assert torch.equal(model(**call, window_length=16, num_sink_tokens=4, kept_conversations=0), expected)
    carrying.generation_config.window_length, carrying.generation_config.num_sink_tokens = 16, 4
    assert torch.equal(carrying.generate(**call, kept_conversations=1), expected)
    assert torch.equal(generate(carrying, **call, past_key_values=SinkCache(16, 4)), expected)


def test_a_model_without_a_generation_config_and_one_that_is_not_found_again(tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(sys.modules[generate.__module__]._logger, "warning_once", warnings.append)
    folder = tmp_path / "model"
    small_model(vocab_size=300).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    model, call = AutoModelForCausalLM.from_pretrained(folder), dict(input_ids=prompt(5), max_new_tokens=2)
    generate(model, **call)
    assert not warnings
    folder.rename(tmp_path / "moved")
    generate(model, **call, window_length=16, num_sink_tokens=4, kept_conversations=0, offload_kept_conversations=False)
    assert not warnings
    generate(model, **call)
    assert "`window_length` was not given" in warnings[0] and "is not found any more" in warnings[0]


# --- a bound cache, without `custom_generate`


def test_plain_generate_with_a_bound_cache(model, expected):
    call = dict(input_ids=prompt(5), max_new_tokens=24, do_sample=False)
    assert torch.equal(model.generate(**{CACHE: SinkCache(16, 4).bind(model)}, **call), expected)
    call |= dict(do_sample=True)
    with seeded():
        sampled = model.generate(**{CACHE: SinkCache(16, 4).bind(model)}, **call)
    with seeded():
        assert torch.equal(sampled, through_the_folder(model, prompt(5), do_sample=True))


def test_plain_generate_goes_on_in_a_bound_cache(model, expected):
    cache = SinkCache(16, 4).bind(model)
    call = {CACHE: cache, "max_new_tokens": 12, "do_sample": False}
    first = model.generate(prompt(5), **call)
    # With a mask: a random model may well say the pad token, which transformers would take for padding.
    assert torch.equal(model.generate(first, attention_mask=torch.ones_like(first), **call), expected)
