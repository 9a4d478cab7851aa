"""Registry of sources of data: built-in ones and those of other packages."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import TypeVar

from controlkit.plugins import load_entry_points
from controlkit.training.sources.source import Source

ENTRY_POINTS = "controlkit.sources"
"""Group of entry points by which packages name modules that register sources."""

_MODULES = (
    "controlkit.nano.icon_source",
    "controlkit.nano.scene_source",
    "controlkit.training.sources.multigen",
    "controlkit.training.sources.pairs",
)
"""Imported by name, so that a source can be in a package that depends on this one."""

_REGISTRY: dict[str, type[Source]] = {}

Registered = TypeVar("Registered", bound=type[Source])


def source(kind: Registered) -> Registered:
    """Register a source; a decorator of its class.

    Raises:
        ValueError: another class has its name.
    """
    other = _REGISTRY.get(kind.name)
    if other is not None and (other.__module__, other.__qualname__) != (kind.__module__, kind.__qualname__):
        raise ValueError(f"{kind.__qualname__}: the name {kind.name!r} is taken by {other.__qualname__}")
    _REGISTRY[kind.name] = kind
    return kind


def sources() -> Mapping[str, type[Source]]:
    """Name -> class of every source."""
    _load()
    return dict(sorted(_REGISTRY.items()))


@cache
def _load() -> None:
    for module in _MODULES:
        import_module(module)
    load_entry_points(ENTRY_POINTS)
