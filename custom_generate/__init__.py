"""What `import sink_cache` gives where this repository was installed with pip: the names of `generate.py`.

transformers, which loads `generate.py` by `custom_generate=`, doesn't read this file.
"""

from .generate import SinkCache, __version__, generate

__all__ = ["SinkCache", "__version__", "generate"]
