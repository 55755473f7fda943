"""`pip install .` gives `import sink_cache`: the code of `custom_generate/generate.py`, in a package."""

import os
import pickle
import re
import subprocess
import sys
from importlib import metadata

import pytest

from tests.support import ROOT

pytestmark = pytest.mark.newest_only

GENERATE = ROOT / "custom_generate/generate.py"


def run(code: str, installed) -> bytes:
    """What a process prints to whom the installed package is all that there is of this repository."""
    return subprocess.check_output(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(installed)}, cwd=installed
    )


def test_the_package_is_the_file(installed):
    assert (installed / "sink_cache/generate.py").read_bytes() == GENERATE.read_bytes()
    (distribution,) = metadata.distributions(path=[str(installed)])
    (version,) = re.findall(r'^__version__ = "(\d+\.\d+\.\d+)"$', GENERATE.read_text(), flags=re.MULTILINE)
    assert distribution.version == version


def test_what_the_package_exports(installed):
    code = """if True:
        import pickle, sys
        from sink_cache import SinkCache, __version__, generate
        from sink_cache.generate import SinkCache as same, generate as same_function
        assert SinkCache is same and generate is same_function
        assert type(pickle.loads(pickle.dumps(SinkCache(16, 4)))) is SinkCache
        sys.stdout.buffer.write(pickle.dumps([sys.modules[SinkCache.__module__].__file__, __version__]))"""
    (distribution,) = metadata.distributions(path=[str(installed)])
    assert pickle.loads(run(code, installed)) == [str(installed / "sink_cache/generate.py"), distribution.version]
