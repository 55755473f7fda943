"""What the documents say to run: their blocks of code, where they stand."""

import re

from tests.support import ROOT

# Those whose code is run, and all.
RUN = ["README.md", "docs/usage.md", "docs/migration.md"]
DOCUMENTS = [*RUN, "COMPATIBILITY.md", "CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md"]


def text_of(document: str) -> str:
    return (ROOT / document).read_text()


def snippets(document: str, language: str) -> list[str]:
    """The blocks of code of this language ("" for what is typed into a shell), in order."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text_of(document), flags=re.MULTILINE | re.DOTALL)
    return [code for its_language, code in blocks if its_language == language]


def prose(document: str) -> str:
    """All but the blocks of code."""
    return re.sub(r"^```\w*\n.*?^```$", "", text_of(document), flags=re.MULTILINE | re.DOTALL)
