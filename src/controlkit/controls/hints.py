"""Hints: encoded conditions, a batch-first tensor or a mapping of named ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
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


@dataclass(frozen=True, kw_only=True)
class ConditionDrop:
    """Conditions left out in training at random, so that a control works with any of them missing: of each sample all
    are kept, all are dropped, or each is dropped by itself (Zhao et al. 2023, arXiv 2305.16322, section 4.1).

    Zeros take the place of what is dropped: of a condition image, or of the hint if it is frozen.
    """

    keep_all: float
    """Fraction of samples with all conditions."""
    drop_all: float
    """Fraction of samples with none."""
    each: float
    """Of the other samples: the fraction without a condition, for each by itself."""

    def kept(self, rng: np.random.Generator, samples: int, conditions: int) -> Tensor:
        """Which conditions of which samples are kept, `bool [samples, conditions]`."""
        whole, own = rng.random((samples, 1)), rng.random((samples, conditions))
        kept = np.where(whole < self.keep_all + self.drop_all, whole < self.keep_all, own >= self.each)
        return torch.from_numpy(kept)


def dropped(named_tensors: Mapping[str, Tensor], kept: Tensor) -> dict[str, Tensor]:
    """Tensors `[B, ...]` with zeros where `kept` `bool [B, len(named_tensors)]` is false."""
    columns = kept.unbind(1)
    return {
        name: without(tensor, column) for (name, tensor), column in zip(named_tensors.items(), columns, strict=True)
    }


def without(tensor: Tensor, kept: Tensor) -> Tensor:
    """`[B, ...]` with zeros in the rows where `kept` `bool [B]` is false."""
    return tensor * kept.view(-1, *[1] * (tensor.ndim - 1)).to(tensor)
