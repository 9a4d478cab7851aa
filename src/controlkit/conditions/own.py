"""Conditions of people's own, from files that they name."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from controlkit.errors import UserError

VARIABLE = "CONTROLKIT_CONDITIONS"
"""Environment variable: Python files that register conditions, separated as in PATH."""


def load_own() -> None:
    """Run the files that `CONTROLKIT_CONDITIONS` names; their decorated functions enter the registry.

    Raises:
        UserError: a file is missing, or fails.
    """
    for name in filter(None, os.environ.get(VARIABLE, "").split(os.pathsep)):
        path = Path(name)
        if not path.is_file():
            raise UserError(f"{VARIABLE} names {name}, which is not there")
        spec = importlib.util.spec_from_file_location(f"controlkit_own_{path.stem}", path)
        if spec is None or spec.loader is None:
            raise UserError(f"{VARIABLE} names {name}, which is not a Python file")
        try:
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
        except Exception as error:
            raise UserError(f"{name}, named by {VARIABLE}, fails: {type(error).__name__}: {error}") from error
