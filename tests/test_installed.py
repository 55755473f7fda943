"""`pip install .` gives `import sink_cache`: the code of `custom_generate/generate.py`, in a package."""

import importlib
import pickle
import re
import sys
from importlib import metadata
from pathlib import Path

import pytest

from tests.support import ROOT

pytestmark = pytest.mark.newest_only

GENERATE = ROOT / "custom_generate/generate.py"


def test_the_package_is_the_file(installed):
    assert (installed / "sink_cache/generate.py").read_bytes() == GENERATE.read_bytes()
    (distribution,) = metadata.distributions(path=[str(installed)])
    (version,) = re.findall(r'^__version__ = "(\d+\.\d+\.\d+)"$', GENERATE.read_text(), flags=re.MULTILINE)
    assert distribution.version == version


def test_what_the_package_exports(installed, monkeypatch):
    for name in ("sink_cache", "sink_cache.generate"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "path", [str(installed), *(path for path in sys.path if Path(path).resolve() != ROOT)])
    package, module = map(importlib.import_module, ("sink_cache", "sink_cache.generate"))
    assert module.__file__ == str(installed / "sink_cache/generate.py")
    assert package.SinkCache is module.SinkCache and package.generate is module.generate
    assert type(pickle.loads(pickle.dumps(package.SinkCache(16, 4)))) is package.SinkCache
    (distribution,) = metadata.distributions(path=[str(installed)])
    assert package.__version__ == distribution.version
