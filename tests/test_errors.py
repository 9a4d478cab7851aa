"""Errors: every one has a code, and every code is explained."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from controlkit.errors import CODES, UserError
from refusals import check, refused

ROOT = Path(__file__).parents[1]


def test_every_code_is_explained():
    rows = re.findall(r"^\| `([a-z-]+)` \|", (ROOT / "docs" / "errors.md").read_text(encoding="utf-8"), re.M)
    assert sorted(rows) == sorted(CODES) == list(CODES)


@pytest.mark.parametrize("path", sorted((ROOT / "src").rglob("*.py")), ids=lambda path: path.stem)
def test_every_error_has_a_code(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "UserError":
            code = node.args[1] if len(node.args) > 1 else None
            known = not isinstance(code, ast.Constant) or code.value in CODES
            assert code is not None and known, f"{path}:{node.lineno}"


def test_the_helper_of_tests_can_fail():
    with refused("missing-file", "a.png", 3):
        raise UserError("there is no a.png, one of 3", "missing-file")
    for code, fact in (("bad-image", "a.png"), ("missing-file", "b.png")):
        with pytest.raises(AssertionError):
            check("there is no a.png [missing-file]", code, fact)
