"""The systems that there are: those of this folder, those that packages add, and those of files of one's own."""

from __future__ import annotations

import importlib.util
import os
import pkgutil
import sys
from collections.abc import Callable, Mapping
from functools import cache, partial
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import TypeVar

from controlkit import controls
from controlkit.controls.control import Control, Training
from controlkit.controls.file_format import on_one_line
from controlkit.errors import UserError, nearest
from controlkit.files import sha256_of

VARIABLE = "CONTROLKIT_CONTROLS"
"""Environment variable: import paths or Python files that register systems, separated as in PATH."""
ENTRY_POINTS = "controlkit.controls"
"""Group of entry points by which packages name modules that register systems."""

_REGISTRY: dict[str, type[Control]] = {}
_FACTS = ("kind", "title", "reads", "enters")
"""What a class has to say of itself; the rest has defaults."""

Registered = TypeVar("Registered", bound=type[Control])


def control(kind: Registered) -> Registered:
    """Register a system; a decorator of its class.

    Raises:
        ValueError: it lacks a fact or a method that every system has, or another class has its kind.
    """
    lacks = [name for name in _FACTS if not hasattr(kind, name)] + sorted(kind.__abstractmethods__)
    if lacks:
        raise ValueError(f"{kind.__qualname__} lacks {', '.join(lacks)}")
    other = _REGISTRY.get(kind.kind)
    if other is not None and (other.__module__, other.__qualname__) != (kind.__module__, kind.__qualname__):
        raise ValueError(f"{kind.__qualname__}: the kind {kind.kind!r} is that of {other.__qualname__} already")
    _REGISTRY[kind.kind] = kind
    return kind


def registry() -> Mapping[str, type[Control]]:
    """Kind -> class, of every system."""
    _load()
    return dict(_REGISTRY)


def find(kind: str) -> type[Control]:
    """The system of this kind.

    Raises:
        UserError: there is none.
    """
    known = registry()
    if kind not in known:
        raise UserError(f"there is no system called {kind!r}{nearest(kind, list(known))}")
    return known[kind]


def trainings_of(kind: type[Control]) -> tuple[Training, ...]:
    """The ways to train a system."""
    if kind.trainings is not None:
        return kind.trainings
    doc = f"{kind.title[0].upper()}{kind.title[1:]}, one condition."
    return (Training(system=kind.kind, also=(f"{kind.kind}-pairs",), options=kind.Options, doc=doc),)


def role_of(kind: type[Control]) -> str:
    """What to call one of a system beside others of its family: `an adapter of CtrLoRA` => `adapter`."""
    return kind.title.partition(" ")[2].partition(" of ")[0]


def companion_role(kind: type[Control]) -> str:
    """The same of a system's companion."""
    return role_of(find(kind.companion or ""))


@cache
def _load() -> None:
    for module in pkgutil.iter_modules(controls.__path__):
        import_module(f"{controls.__name__}.{module.name}")
    for point in entry_points(group=ENTRY_POINTS):
        load_own(f"the module {point.value} of the entry point {point.name}", point.load)
    for name in filter(None, os.environ.get(VARIABLE, "").split(os.pathsep)):
        load_own(f"{name}, named by {VARIABLE},", partial(_import, name))


def load_own(what: str, load: Callable[[], object]) -> None:
    """Load a module that is not ours; whatever it raises becomes one sentence about `what`."""
    try:
        load()
    except UserError:
        raise
    except Exception as error:
        words = on_one_line(error) or "no words"
        raise UserError(f"{what} cannot be loaded: {type(error).__name__}: {words}") from error


def _import(name: str) -> None:
    """A module by its import path, or a file, which becomes a module as well: dataclasses look for theirs."""
    if not name.endswith(".py"):
        import_module(name)
        return
    path = Path(name).resolve()
    if not path.is_file():
        raise UserError(f"{VARIABLE} names {name}, which is not there")
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
