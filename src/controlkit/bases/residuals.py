"""What a control adds to a base."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Residuals:
    """Additions to the decoder's skip connections and to the middle of a UNet.

    Shapes are those of the base's own skips, `[B, C_i, H_i, W_i]`, from the outermost in; `B` may be 1, which
    means the same for every picture of a batch.
    """

    down: tuple[Tensor, ...]
    """One for each skip connection."""
    mid: Tensor | None
    """For the output of the middle block; None adds nothing there."""

    def scaled(self, weight: float | Sequence[float]) -> Residuals:
        """All of them times a number, or each times its own (the skips in order, then the middle)."""
        weights = [weight] * (len(self.down) + 1) if isinstance(weight, (int, float)) else list(weight)
        if len(weights) != len(self.down) + 1:
            raise ValueError(f"got {len(weights)} weights for {len(self.down)} skips and the middle")
        return Residuals(
            tuple(tensor * w for tensor, w in zip(self.down, weights, strict=False)),
            None if self.mid is None else self.mid * weights[-1],
        )

    def __add__(self, other: Residuals) -> Residuals:
        mid = other.mid if self.mid is None else self.mid if other.mid is None else self.mid + other.mid
        return Residuals(tuple(a + b for a, b in zip(self.down, other.down, strict=True)), mid)

    def tensors(self) -> tuple[Tensor, ...]:
        """All of them."""
        return self.down if self.mid is None else (*self.down, self.mid)

    def rows(self, first: int, last: int) -> Residuals:
        """Those of the batch's rows `first` to `last`, not included."""
        return self.map(lambda tensor: tensor[first:last])

    def map(self, change: Callable[[Tensor], Tensor]) -> Residuals:
        """Each tensor replaced by `change(tensor)`."""
        return Residuals(tuple(map(change, self.down)), None if self.mid is None else change(self.mid))
