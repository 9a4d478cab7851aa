"""The systems that there are: those of this folder, those that packages add, and those of files of one's own."""

from __future__ import annotations

import importlib.util
import os
import pkgutil
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import TypeVar

from controlkit import controls
from controlkit.controls.control import Control, Training
from controlkit.errors import UserError, nearest

VARIABLE = "CONTROLKIT_CONTROLS"
"""Environment variable: import paths or Python files that register systems, separated as in PATH."""
ENTRY_POINTS = "controlkit.controls"
"""Group of entry points by which packages name modules that register systems."""

_REGISTRY: dict[str, type[Control]] = {}

Registered = TypeVar("Registered", bound=type[Control])


def control(kind: Registered) -> Registered:
    """Register a system; a decorator of its class.

    Raises:
        ValueError: another class has that kind, or it trains by a name that is taken.
    """
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
    words = f"{kind.title[0].upper()}{kind.title[1:]}"
    return (
        Training(system=kind.kind, data="conditions", options=kind.Options, doc=f"{words}, one condition."),
        Training(
            system=f"{kind.kind}-pairs", data="pairs", options=kind.Options, doc=f"{words} from a folder of pairs."
        ),
    )


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
        try:
            point.load()
        except Exception as error:
            raise UserError(f"the package that adds {point.name} to {ENTRY_POINTS} fails: {error}") from error
    for name in filter(None, os.environ.get(VARIABLE, "").split(os.pathsep)):
        _load_own(name)


def _load_own(name: str) -> None:
    try:
        if not name.endswith(".py"):
            import_module(name)
            return
        if not Path(name).is_file():
            raise UserError(f"{VARIABLE} names {name}, which is not there")
        spec = importlib.util.spec_from_file_location(f"controlkit_own_{Path(name).stem}", name)
        assert spec is not None and spec.loader is not None  # as it ends in .py
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{name}, named by {VARIABLE}, fails: {type(error).__name__}: {error}") from error
