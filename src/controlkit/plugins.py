"""Load third-party code: entry points of installed packages, and modules or files named in an environment variable."""

from __future__ import annotations

import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from controlkit.errors import UserError, is_out_of_memory
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
        with redirect_stdout(sys.stderr):  # standard output is for results
            load()
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        message = f"{what} cannot be loaded: {type(error).__name__}: {_reason(error)}"
        raise UserError(message, "plugin-failed") from error


@contextmanager
def running(what: str, file: str | None) -> Iterator[None]:
    """Run third-party code in a block; any exception becomes a `UserError` about `what`, with the line in `file`.

    Raises:
        UserError: the code raised an exception.
    """
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        if is_out_of_memory(error):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        frame = next((frame for frame in reversed(frames) if frame.filename == file), frames[-1])
        raise UserError(
            f"{what} failed: {type(error).__name__}: {_reason(error)} ({Path(frame.filename).name}, line"
            f" {frame.lineno})",
            "plugin-failed",
        ) from error


def is_same_source(first: Any, second: Any) -> bool:
    """Whether two classes or functions are of the same name and file.

    A notebook runs a cell again, or a script imports a file that the environment names, too.
    """
    return _source_of(first) == _source_of(second)


def _source_of(thing: Any) -> tuple[str, str]:
    module = sys.modules.get(thing.__module__)
    file = getattr(module, "__file__", None)
    name = getattr(thing, "__qualname__", type(thing).__qualname__)
    return str(Path(file).resolve()) if file else thing.__module__, name


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()) or "no message"


def _import(name: str, variable: str) -> None:
    """Import a module by import path, or a file as a module of its own: dataclasses look up their module."""
    if not name.endswith(".py"):
        import_module(name)
        return
    path = Path(name).expanduser().resolve()
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
