"""Code that is not ours: modules that packages name as entry points, and files that an environment variable names."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path

from controlkit.errors import UserError
from controlkit.files import sha256_of


def load_entry_points(group: str) -> None:
    """Import the modules of a group of entry points; their decorators register what they add.

    Raises:
        UserError: one fails.
    """
    for point in entry_points(group=group):
        load_plugin(f"the module {point.value} of the entry point {point.name}", point.load)


def load_named(variable: str) -> None:
    """Import what an environment variable names: import paths or Python files, separated as in PATH.

    Raises:
        UserError: one is missing, or fails.
    """
    for name in filter(None, os.environ.get(variable, "").split(os.pathsep)):
        load_plugin(f"{name}, named by {variable},", partial(_import, name, variable))


def load_plugin(what: str, load: Callable[[], object]) -> None:
    """Call `load`; whatever it raises becomes one sentence about `what`.

    Raises:
        UserError: it fails.
    """
    try:
        load()
    except UserError:
        raise
    except Exception as error:
        words = " ".join(str(error).split()) or "no message"
        raise UserError(f"{what} cannot be loaded: {type(error).__name__}: {words}") from error


def _import(name: str, variable: str) -> None:
    """A module by its import path, or a file, which becomes a module as well: dataclasses look for theirs."""
    if not name.endswith(".py"):
        import_module(name)
        return
    path = Path(name).resolve()
    if not path.is_file():
        raise UserError(f"{variable} names {name}, which is not there")
    module_name = f"controlkit_own_{sha256_of(str(path))[:8]}_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None  # as it ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
