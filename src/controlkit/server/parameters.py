"""Conditions that clients may name, and parameters that they may set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from controlkit import conditions
from controlkit.conditions.condition import Condition
from controlkit.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A number or a switch of a condition."""

    name: str
    default: float | bool
    limits: tuple[float, float] | None
    """Minimum and maximum, both included; None for a switch, or a number without limits such as a seed."""

    def value(self, number: Any) -> Any:
        """`number` with the type of the default: an integer for an integer."""
        is_whole = type(self.default) is int and isinstance(number, float) and number.is_integer()
        return int(number) if is_whole else number


def computed_conditions() -> dict[str, Condition]:
    """The conditions that can be computed from an image, by name."""
    return {name: kind for name, kind in conditions.registry().items() if not kind.provided}


def parameters_of(condition: Condition) -> list[Parameter]:
    """The numbers and switches of a condition. Its other parameters (`model`, a list) have no such default."""
    return [
        Parameter(name=name, default=default, limits=condition.limits.get(name))
        for name, default in condition.defaults.items()
        if isinstance(default, (bool, int, float))
    ]


def listed_condition(name: str) -> str:
    """The registered name of a condition that can be computed from an image.

    Raises:
        UserError: there is no such condition, or it comes with data sets only.
    """
    kind = conditions.find(name)
    if kind.provided:
        raise UserError(f"{kind.name} comes with the data and is not computed; send a condition image", "unsupported")
    return kind.name


def check_parameters(parameters: Mapping[str, Any]) -> None:
    """Check that no parameter is text, which might name a file or a repository.

    Raises:
        UserError: a parameter is not a number, a boolean or a list of these.
    """
    for name, value in parameters.items():
        if not _is_plain(value, depth=4):
            raise UserError(
                f"parameter {name}: this server takes numbers, true and false, and lists of numbers", "wrong-type"
            )


def _is_plain(value: Any, depth: int) -> bool:
    if isinstance(value, list):
        return depth > 0 and all(_is_plain(each, depth - 1) for each in value)
    return isinstance(value, (bool, int, float))
