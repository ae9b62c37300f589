"""Docstrings say what a thing does: they begin with a verb, or a class with a noun."""

import ast
import re
from pathlib import Path

import pytest

from tests.harness.processes import ROOT

RIDDLES = re.compile(r"(What|Whether|How|Which|Where|Who|When)\b")
ARTICLES = re.compile(r"(The|A|An|This|Its|It)\b")
FILES = sorted((ROOT / "dsv3").rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_are_imperative(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "a sentence on what the file is"
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            continue
        text = ast.get_docstring(node) or ""
        assert not RIDDLES.match(text), f"{node.name}: {text}"
        if isinstance(node, ast.FunctionDef):
            assert not ARTICLES.match(text), f"{node.name}: {text}"
        elif not node.name.startswith("_"):
            assert text, f"{node.name} has no docstring"
