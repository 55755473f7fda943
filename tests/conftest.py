import os
import tempfile

# Before transformers is imported: nothing is asked of the Hub, and code that it copies does not mix with the user's.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="sink-cache-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import transformers
from real_model import load_real_model

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def pytest_report_header() -> str:
    return f"transformers {transformers.__version__}"


@pytest.fixture(scope="session")
def real_model():
    """SmolLM2-135M-Instruct in float32, and its tokenizer."""
    return load_real_model()
