"""Hints: encoded conditions, a batch-first tensor or a mapping of named ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Hint = Tensor | Mapping[str, Tensor]
"""`[B, ...]`, or named tensors with B rows each, or 1, which broadcasts over the batch."""


def named(hint: Hint) -> dict[str, Tensor]:
    """Its tensors by name; a single tensor is called `hint`."""
    return {"hint": hint} if isinstance(hint, Tensor) else dict(hint)


def map_hint(hint: Hint, change: Callable[[Tensor], Tensor]) -> Hint:
    """`change` applied to every tensor."""
    return change(hint) if isinstance(hint, Tensor) else {name: change(value) for name, value in hint.items()}


def float_hint(hint: Hint) -> Hint:
    """Its floating-point tensors in float32, as a control takes them; the others as they are."""
    return map_hint(hint, lambda tensor: tensor.float() if tensor.is_floating_point() else tensor)


def rows_of(hint: Hint) -> int:
    """The batch size: that of its largest tensor."""
    return max((len(tensor) for tensor in named(hint).values()), default=1)


def expand(hint: Hint, rows: int) -> Hint:
    """Expanded to `rows` rows: each row is repeated in consecutive copies."""

    def expanded(tensor: Tensor) -> Tensor:
        return tensor if len(tensor) == rows else tensor.repeat_interleave(rows // len(tensor), 0)

    return map_hint(hint, expanded)


def concatenated(hints: list[Hint]) -> Hint:
    """Hints with the same names, concatenated along the batch."""
    first = hints[0]
    if isinstance(first, Tensor):
        return torch.cat([hint for hint in hints if isinstance(hint, Tensor)])
    return {name: torch.cat([named(hint)[name] for hint in hints]) for name in first}


def shapes_of(hint: Hint) -> tuple[tuple[str, torch.Size], ...]:
    """Names and shapes of its tensors."""
    return tuple((name, tensor.shape) for name, tensor in named(hint).items())
