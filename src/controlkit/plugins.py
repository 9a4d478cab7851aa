"""Load third-party code: entry points of installed packages, and modules or files named in an environment variable."""

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
    """Import every entry point of a group; registration happens in their decorators.

    Raises:
        UserError: an import fails.
    """
    for point in entry_points(group=group):
        load_plugin(f"{point.value} of the entry point {point.name}", point.load)


def load_named(variable: str) -> None:
    """Import the modules in an environment variable: import paths or Python files, separated as in PATH.

    Raises:
        UserError: one is missing, or fails to import.
    """
    for name in filter(None, os.environ.get(variable, "").split(os.pathsep)):
        load_plugin(f"{name}, named by {variable},", partial(_import, name, variable))


def load_plugin(what: str, load: Callable[[], object]) -> None:
    """Call `load`; any exception becomes a `UserError` about `what`.

    Raises:
        UserError: `load` fails.
    """
    try:
        load()
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or "no message"
        raise UserError(f"{what} cannot be loaded: {type(error).__name__}: {reason}", "plugin-failed") from error


def _import(name: str, variable: str) -> None:
    """Import a module by import path, or a file as a module of its own: dataclasses look up their module."""
    if not name.endswith(".py"):
        import_module(name)
        return
    path = Path(name).resolve()
    if not path.is_file():
        raise UserError(f"{variable} names {name}, which does not exist", "missing-file")
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
