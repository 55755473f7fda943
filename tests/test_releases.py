"""The releases of transformers that the tests run on stand in one file, and its ends where users read them."""

import importlib.util
import logging
import re
import sys

import pytest

from custom_generate.generate import NEWEST_TESTED
from tests.support import RELEASES, ROOT

pytestmark = pytest.mark.newest_only

ENDS = RELEASES[0], RELEASES[-1]


@pytest.mark.parametrize("file", ["noxfile.py", "Makefile", "pyproject.toml", "README.md", "CONTRIBUTING.md"])
def test_no_other_file_lists_them(file):
    text = (ROOT / file).read_text()
    found = {release for release in RELEASES if re.search(rf"(?<![\d.]){re.escape(release)}(?![\d.])", text)}
    assert found <= (set(ENDS) if file.endswith(".md") else set())


def test_users_are_told_the_ends():
    oldest, newest = (release.rpartition(".")[0] for release in ENDS)
    assert f"It needs transformers {oldest} to {newest} " in (ROOT / "README.md").read_text()
    assert f"from {ENDS[0]} to {ENDS[1]}." in (ROOT / "CONTRIBUTING.md").read_text()
    assert f"from {oldest} to {newest}.\n" in (ROOT / "custom_generate/requirements.txt").read_text()
    assert f'"transformers>={oldest},<6"' in (ROOT / "pyproject.toml").read_text()


def test_the_file_that_travels_alone_knows_the_newest():
    assert NEWEST_TESTED == RELEASES[-1]


@pytest.mark.parametrize("release, told", [("99.1.0.dev0", True), (RELEASES[-1].rpartition(".")[0] + ".99", False)])
def test_an_import_on_a_newer_release_says_so_once(release, told, monkeypatch):
    said, doors = [], ("sink_cache_of_one_door", "sink_cache_of_another")
    monkeypatch.setattr(logging.getLogger("transformers"), "warning", said.append)
    monkeypatch.setattr("transformers.__version__", release)  # by name: another import may have put it there anew
    for door in doors:
        spec = importlib.util.spec_from_file_location(door, ROOT / "custom_generate/generate.py")
        monkeypatch.setitem(sys.modules, door, importlib.util.module_from_spec(spec))
        spec.loader.exec_module(sys.modules[door])
    assert len(said) == told
    assert all(f"up to {RELEASES[-1]} and not with {release}" in line and line.count(". ") == 0 for line in said)


def test_the_sweep_ahead_tells_what_streams_no_longer():
    from tools.architectures import REPORT, Row, no_longer  # not to be imported on older releases

    def found(**verdicts: str) -> list[str]:
        """What is told of a release that has llama, llava and llava's images, and streams them unless said."""
        text = Row("llama", verdicts.get("llama", "streams"))
        images = Row(
            "llava", verdicts.get("llava", "streams"), images=verdicts.get("images", "streams"), of_images=True
        )
        return no_longer([text, images, Row("gpt2", "refused: as ever")], REPORT.read_text())

    assert found() == []
    assert found(llama="refused: broken") == found(llama="not built: broken") == ["llama"]
    assert found(llava="refused: broken") == found(images="refused: broken") == ["llava"]
    assert found(llama="wrong: 1.0") == found(images="fails: broken") == []  # these are told in any case
