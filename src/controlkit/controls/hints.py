"""Hints: what controls encode of a condition, a batch-first tensor or a mapping of named ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Hint = Tensor | Mapping[str, Tensor]
"""`[B, ...]`, or named tensors that each have B rows, or 1, which means the same for every image."""


def named(hint: Hint) -> dict[str, Tensor]:
    """Its tensors by name; a tensor alone is called `hint`."""
    return {"hint": hint} if isinstance(hint, Tensor) else dict(hint)


def map_hint(hint: Hint, change: Callable[[Tensor], Tensor]) -> Hint:
    """The same change to every tensor."""
    return change(hint) if isinstance(hint, Tensor) else {name: change(value) for name, value in hint.items()}


def rows_of(hint: Hint) -> int:
    """The batch: as many rows as the tensor with the most."""
    return max((len(tensor) for tensor in named(hint).values()), default=1)


def expand(hint: Hint, rows: int) -> Hint:
    """The same with `rows` rows: one row repeated, or as many consecutive copies of each row as it takes."""

    def grown(tensor: Tensor) -> Tensor:
        return tensor if len(tensor) == rows else tensor.repeat_interleave(rows // len(tensor), 0)

    return map_hint(hint, grown)


def concatenated(hints: list[Hint]) -> Hint:
    """Hints of the same names one after another along the batch."""
    first = hints[0]
    if isinstance(first, Tensor):
        return torch.cat([hint for hint in hints if isinstance(hint, Tensor)])
    return {name: torch.cat([named(hint)[name] for hint in hints]) for name in first}


def shapes_of(hint: Hint) -> tuple[tuple[str, torch.Size], ...]:
    """Names and shapes."""
    return tuple((name, tensor.shape) for name, tensor in named(hint).items())
