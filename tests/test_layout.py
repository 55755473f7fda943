"""The one file reads from top to bottom: its sections use only those above them, and no function is too long."""

import ast
import re
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.newest_only

SOURCE = (Path(__file__).parents[1] / "custom_generate/generate.py").read_text()
LONGEST = 80  # lines of a function


def sections(source: str) -> list[int]:
    """The lines at which the sections of the file begin: each has its title between two rules."""
    lines = source.splitlines()
    rule = "# " + "-" * 117
    return [1] + [line for line in range(1, len(lines) - 1) if lines[line - 1] == rule == lines[line + 1]]


def uses_of_later_sections(source: str) -> list[str]:
    """The names of the file, outside of quotes, that are used in a section above the one that defines them."""
    starts = sections(source)

    def section(line: int) -> int:
        return sum(start <= line for start in starts)

    tree = ast.parse(source)
    defined = {}
    for node in tree.body:
        for inner in ast.walk(node) if isinstance(node, (ast.If, ast.Try)) else [node]:
            if isinstance(inner, (ast.FunctionDef, ast.ClassDef)):
                defined.setdefault(inner.name, section(inner.lineno))
            for target in inner.targets if isinstance(inner, ast.Assign) else []:
                for name in ast.walk(target):
                    if isinstance(name, ast.Name):
                        defined.setdefault(name.id, section(name.lineno))
    used = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)]
    return [f"{name.id}, line {name.lineno}" for name in used if defined.get(name.id, 0) > section(name.lineno)]


def test_each_section_uses_only_those_above_it():
    assert len(sections(SOURCE)) > 8
    assert uses_of_later_sections(SOURCE) == []


def test_a_use_of_a_later_section_is_seen():
    rule = "# " + "-" * 117
    source = f"def early():\n    return late()\n\n\n{rule}\n# Later\n{rule}\n\n\ndef late():\n    return 1\n"
    assert uses_of_later_sections(source) == ["late, line 2"]


def test_functions_are_short_and_change_no_variable_of_another():
    nodes = list(ast.walk(ast.parse(SOURCE)))
    lines = {node.name: node.end_lineno - node.lineno + 1 for node in nodes if isinstance(node, ast.FunctionDef)}
    assert {name: number for name, number in lines.items() if number > LONGEST} == {}
    assert not any(isinstance(node, ast.Nonlocal) for node in nodes)


def test_the_header_names_the_licence_and_the_version():
    assert SOURCE.startswith("# SPDX-License-Identifier: Apache-2.0\n")
    assert re.search(r'^__version__ = "\d+\.\d+\.\d+"$', SOURCE, re.MULTILINE)


def test_the_file_imports_nothing_of_this_repository():
    """transformers looks for what it imports relatively in another folder until 4.56 than later."""
    imports = [node for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = [node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in imports]
    assert not any(getattr(node, "level", 0) for node in imports)
    others = {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names)
    assert others == {"safetensors", "torch", "transformers"}
