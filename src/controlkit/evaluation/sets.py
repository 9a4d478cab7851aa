"""Evaluation sets: images with captions, found by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, Generic, TypeVar

import numpy as np

from controlkit.errors import UserError, nearest
from controlkit.plugins import load_entry_points

SHIPPED = ("controlkit.nano.evaluation_sets",)
"""Modules of this package that register sets, imported when a set is first asked for."""
ENTRY_POINTS = "controlkit.evaluation_sets"
"""Group of entry points by which packages name modules that register sets."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """An image with its caption."""

    image: np.ndarray
    """`uint8` `[H, W, 3]`."""
    caption: str


SomeExample = TypeVar("SomeExample", bound=Example, covariant=True)


@dataclass(frozen=True)
class EvaluationSet(Generic[SomeExample]):
    """Examples that a base or a control is judged on."""

    name: str
    examples: tuple[SomeExample, ...]

    @property
    def images(self) -> list[np.ndarray]:
        """Their images, `uint8` `[H, W, 3]` each."""
        return [example.image for example in self.examples]

    @property
    def captions(self) -> list[str]:
        """Their captions."""
        return [example.caption for example in self.examples]

    def first(self, count: int) -> EvaluationSet[SomeExample]:
        """The first `count` of them."""
        return EvaluationSet(self.name, self.examples[:count])


@dataclass(frozen=True, kw_only=True)
class _Registered:
    description: str
    read: Callable[[], EvaluationSet[Any]]


_REGISTRY: dict[str, _Registered] = {}


def register_evaluation_set(name: str, description: str, read: Callable[[], EvaluationSet[Any]]) -> None:
    """Make a set known under `name`.

    Args:
        description: what its images are, for tables and errors.
        read: reads the set; called each time that it is asked for.

    Raises:
        ValueError: another set has this name.
    """
    if name in _REGISTRY:
        raise ValueError(f"the evaluation set {name!r} is registered already")
    _REGISTRY[name] = _Registered(description=description, read=read)


def evaluation_sets() -> Mapping[str, str]:
    """Name of every set -> what its images are."""
    _load()
    return {name: registered.description for name, registered in _REGISTRY.items()}


def evaluation_set(name: str) -> EvaluationSet[Example]:
    """The set of this name.

    Raises:
        UserError: there is none, or its files cannot be read.
    """
    _load()
    if name not in _REGISTRY:
        raise UserError(f"there is no evaluation set called {name!r}{nearest(name, list(_REGISTRY))}")
    return _REGISTRY[name].read()


@cache
def _load() -> None:
    for module in SHIPPED:
        import_module(module)
    load_entry_points(ENTRY_POINTS)
