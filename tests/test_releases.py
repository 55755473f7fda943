"""The releases of transformers that the tests run on stand in one file, and its ends where users read them."""

import re

import pytest

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
