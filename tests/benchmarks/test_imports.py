"""What scripts import from the package is there."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path for folder in ("benchmarks", "recipes", "examples") for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("script", [str(path.relative_to(ROOT)) for path in SCRIPTS])
def test_the_names_that_a_script_imports_are_in_the_package(script):
    missing = []
    for node in ast.walk(ast.parse((ROOT / script).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "controlkit":
            module = importlib.import_module(node.module)
            missing += [
                f"{node.module}.{alias.name}"
                for alias in node.names
                if not hasattr(module, alias.name) and importlib.util.find_spec(f"{node.module}.{alias.name}") is None
            ]
    assert missing == []
