"""Registry of control systems: those of this folder, of installed packages, and of user files."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import TypeVar

from controlkit import controls
from controlkit.controls.control import Control, Training
from controlkit.errors import UserError, nearest
from controlkit.plugins import is_same_source, load_entry_points, load_named

VARIABLE = "CONTROLKIT_CONTROLS"
"""Environment variable: import paths or Python files that register systems, separated as in PATH."""
ENTRY_POINTS = "controlkit.controls"
"""Entry point group of modules that register systems."""

_REGISTRY: dict[str, type[Control]] = {}
_REQUIRED = ("kind", "title", "reads", "enters")
"""Class attributes without a default."""

Registered = TypeVar("Registered", bound=type[Control])


def control(kind: Registered) -> Registered:
    """Register a system; a class decorator.

    Raises:
        ValueError: a required attribute or method is missing, or the kind is taken.
    """
    missing = [name for name in _REQUIRED if not hasattr(kind, name)] + sorted(kind.__abstractmethods__)
    if missing:
        raise ValueError(f"{kind.__qualname__} lacks {', '.join(missing)}")
    other = _REGISTRY.get(kind.kind)
    if other is not None and not is_same_source(other, kind):
        raise ValueError(f"{kind.__qualname__}: the kind {kind.kind!r} is taken by {other.__qualname__}")
    _REGISTRY[kind.kind] = kind
    return kind


def registry() -> Mapping[str, type[Control]]:
    """Kind -> class, of all systems."""
    _load()
    return dict(_REGISTRY)


def find(kind: str) -> type[Control]:
    """The system of this kind.

    Raises:
        UserError: there is none.
    """
    known = registry()
    if kind not in known:
        raise UserError(f"there is no control system {kind!r}{nearest(kind, list(known))}", "unknown-name")
    return known[kind]


def trainings_of(kind: type[Control]) -> tuple[Training, ...]:
    """Ways to train a system."""
    if kind.trainings is not None:
        return kind.trainings
    doc = f"{kind.title[0].upper()}{kind.title[1:]}, one condition."
    return (Training(system=kind.kind, also=(f"{kind.kind}-pairs",), options=kind.Options, doc=doc),)


def role_of(kind: type[Control]) -> str:
    """Short name of a system within its family: `an adapter of CtrLoRA` => `adapter`."""
    return kind.title.partition(" ")[2].partition(" of ")[0]


def companion_role(kind: type[Control]) -> str:
    """`role_of` its companion."""
    return role_of(find(kind.companion or ""))


@cache
def _load() -> None:
    for module in pkgutil.iter_modules(controls.__path__):
        import_module(f"{controls.__name__}.{module.name}")
    load_entry_points(ENTRY_POINTS)
    load_named(VARIABLE)
