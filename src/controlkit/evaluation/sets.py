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
"""Modules of this package that register sets; imported on first use."""
ENTRY_POINTS = "controlkit.evaluation_sets"
"""Entry point group of modules that register sets."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """An image with its caption."""

    image: np.ndarray
    """`uint8` `[H, W, 3]`."""
    caption: str


SomeExample = TypeVar("SomeExample", bound=Example, covariant=True)


@dataclass(frozen=True)
class EvaluationSet(Generic[SomeExample]):
    """Examples on which a base or a control is evaluated."""

    name: str
    examples: tuple[SomeExample, ...]

    @property
    def images(self) -> list[np.ndarray]:
        """Images `uint8 [H, W, 3]`."""
        return [example.image for example in self.examples]

    @property
    def captions(self) -> list[str]:
        """One caption per image."""
        return [example.caption for example in self.examples]

    def first(self, count: int) -> EvaluationSet[SomeExample]:
        """A set of the first `count` examples, or of all if there are fewer.

        Raises:
            UserError: the count is negative.
        """
        if count < 0:
            raise UserError(f"the number of images is {count}; expected 0 or more", "out-of-range")
        return EvaluationSet(self.name, self.examples[:count])

    def take(self, count: int) -> EvaluationSet[SomeExample]:
        """A set of the first `count` examples, for the setting `images`.

        Raises:
            UserError: there are fewer.
        """
        if count > (most := len(self.examples)):
            raise UserError(f"images is {count}; expected up to {most}, all of the set {self.name}", "out-of-range")
        return self.first(count)


@dataclass(frozen=True, kw_only=True)
class _Registered:
    description: str
    read: Callable[[], EvaluationSet[Any]]


_REGISTRY: dict[str, _Registered] = {}


def register_evaluation_set(name: str, description: str, read: Callable[[], EvaluationSet[Any]]) -> None:
    """Register a set.

    Args:
        name: unique name.
        description: one phrase on its images, for tables and errors.
        read: reads the set; called by every `evaluation_set(name)`.

    Raises:
        ValueError: another set has this name.
    """
    if name in _REGISTRY:
        raise ValueError(f"the evaluation set {name!r} is registered already")
    _REGISTRY[name] = _Registered(description=description, read=read)


def evaluation_sets() -> Mapping[str, str]:
    """Name of every set -> its description."""
    _load()
    return {name: registered.description for name, registered in _REGISTRY.items()}


def evaluation_set(name: str) -> EvaluationSet[Example]:
    """Read the set of this name.

    Raises:
        UserError: no set has this name, or its files cannot be read.
    """
    _load()
    if name not in _REGISTRY:
        raise UserError(f"there is no evaluation set {name!r}{nearest(name, list(_REGISTRY))}", "unknown-name")
    return _REGISTRY[name].read()


@cache
def _load() -> None:
    for module in SHIPPED:
        import_module(module)
    load_entry_points(ENTRY_POINTS)
