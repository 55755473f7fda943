import gc
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import pytest

from tests.support import RELEASES, ROOT
from tests.support.hub import Hub

# What is imported stays: the collector would look through it again and again, for a seventh of the time of importing.
gc.disable()

# Nothing here imports transformers before it is needed: the process that only hands tests to others starts at once.
# The Hub that transformers asks is this one, and what it downloads does not mix with the user's.
HUB = Hub()
os.environ["HF_ENDPOINT"] = HUB.url
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="sink-cache-tests-")
os.environ["HF_TOKEN"] = "hf_loopback"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["HF_HUB_DISABLE_XET"] = "1"  # large files go as they did before
# The models are too small to gain from threads, and those of two processes would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# torch starts processes to compile in, each of which imports torch for more than what it then compiles.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# Nor need it try what the compiler can do for each kind of processor, which takes longer than what it compiles.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")


def pytest_report_header() -> str:
    return f"transformers {metadata.version('transformers')}"


@pytest.hookimpl(trylast=True)  # after `-k` and paths have chosen
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is for other releases of transformers; who passes `-m` chooses by marks without this."""
    release = metadata.version("transformers")
    marks = {"newest_only"} if release != RELEASES[-1] else set()
    marks |= {"slow", "ends_only"} if release not in (RELEASES[0], RELEASES[-1]) else set()
    others = [item for item in items if any(item.get_closest_marker(mark) for mark in marks)]
    if config.option.markexpr or not others:
        return
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in set(others)]
    if items:  # for the table of `make matrix`, in the report of the tests
        items[0].user_properties.append(("left out", len(others)))


def pytest_collection_finish() -> None:
    gc.freeze()  # in tests too, all that was imported would take a tenth of the time
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def imports_found_once():
    """transformers parses a file at each call of `generate` that gets it, to see what it imports: 0.15 s, here once.

    What it does that with by itself.
    """
    from transformers import dynamic_module_utils

    find, found = dynamic_module_utils.get_imports, {}

    def get_imports(filename):
        text = Path(filename).read_text(encoding="utf-8")
        if text not in found:
            found[text] = find(filename)
        return list(found[text])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "get_imports", get_imports)
        yield find


@pytest.fixture(scope="session")
def real_model():
    """SmolLM2-135M-Instruct in float32, and its tokenizer."""
    from tools import real_models

    return real_models.load(real_models.SMOLLM2)


@pytest.fixture(scope="session")
def real_hybrid_model():
    """Gemma 3 270M in float32, and its tokenizer."""
    from tools import real_models

    try:
        return real_models.load(real_models.GEMMA)
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture
def hub() -> Hub:
    """The Hub on the loopback address, with this repository as org/sink_cache, and nothing asked of it yet."""
    if "org/sink_cache" not in HUB.repositories:
        HUB.commit_folder("org/sink_cache", ROOT / "custom_generate", inside="custom_generate")
    HUB.requests.clear()
    return HUB


def carrying(folder: Path, name: str, model, processor, tokenizer) -> Path:
    """A model repository that carries `custom_generate/` and names its window, in `folder` and on the Hub as `name`.

    Its model says nothing but lower-case letters.
    """
    from transformers import GenerationConfig

    words = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    GenerationConfig(
        window_length=16,
        num_sink_tokens=4,
        bos_token_id=1,
        pad_token_id=0,
        suppress_tokens=[token for token, word in enumerate(words) if not re.fullmatch("[a-z]+", word)],
    ).save_pretrained(folder)
    shutil.copytree(ROOT / "custom_generate", folder / "custom_generate", ignore=shutil.ignore_patterns("__pycache__"))
    HUB.commit_folder(name, folder)
    return folder


@pytest.fixture(scope="session")
def carrier(tmp_path_factory) -> Path:
    """The folder of such a repository, you/my_model on the Hub."""
    from tests.support.helpers import small_model, small_tokenizer

    tokenizer = small_tokenizer()
    model = small_model(vocab_size=len(tokenizer))
    return carrying(tmp_path_factory.mktemp("model") / "carrier", "you/my_model", model, tokenizer, tokenizer)


@pytest.fixture(scope="session")
def carrier_of_images(tmp_path_factory) -> Path:
    """The folder of one whose model sees images, you/my_eyes on the Hub."""
    from tests.support.helpers import small_model_of_images

    pytest.importorskip("PIL")
    model, processor = small_model_of_images()
    folder = tmp_path_factory.mktemp("model") / "carrier_of_images"
    return carrying(folder, "you/my_eyes", model, processor, processor.tokenizer)


@pytest.fixture(scope="session")
def installed(tmp_path_factory) -> Path:
    """The folder into which pip installed this repository alone, for `PYTHONPATH`."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in ("pyproject.toml", "README.md"):  # pip builds where the source lies
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "custom_generate", source / "custom_generate")
    # Off line: setuptools is there, and so is what it depends on.
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-compile"]
    subprocess.run([*pip, "--target", target, source], check=True)
    return target
