"""What a control adds to a base."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from torch import Tensor


@dataclass(frozen=True)
class Residuals:
    """Additions to a UNet, at two sites: the decoder's skip connections with the middle, and the encoder's stages.

    Shapes are those of what they are added to, `[B, C_i, H_i, W_i]`, from the outermost in; `B` may be 1, which
    means the same for every picture of a batch. A control fills the site where it steers and leaves the other empty,
    which adds nothing there; the sum of two controls of different sites has both.
    """

    down: tuple[Tensor, ...] = ()
    """One for each skip connection."""
    mid: Tensor | None = None
    """For the output of the middle block; None adds nothing there."""
    encoder: tuple[Tensor, ...] = ()
    """One for each stage of the encoder, of the shapes of `bases.base.encoder_stages`; what follows in the encoder, its
    skip connections too, sees the sum."""

    def scaled(self, weight: float | Sequence[float]) -> Residuals:
        """All of them times a number, or each times its own: the skips in order, the middle, then the stages."""
        if isinstance(weight, (int, float)):
            return self.map(lambda tensor: tensor * weight)
        skips = len(self.down) + 1 if self.down or self.mid is not None else 0
        weights = list(weight)
        if len(weights) != skips + len(self.encoder):
            places = [f"{len(self.down)} skips and the middle"] if skips else []
            places += [f"{len(self.encoder)} stages"] if self.encoder else []
            raise ValueError(f"got {len(weights)} weights for {' and '.join(places)}")
        return Residuals(
            tuple(tensor * w for tensor, w in zip(self.down, weights, strict=False)),
            None if self.mid is None else self.mid * weights[skips - 1],
            tuple(tensor * w for tensor, w in zip(self.encoder, weights[skips:], strict=True)),
        )

    def __add__(self, other: Residuals) -> Residuals:
        mid = other.mid if self.mid is None else self.mid if other.mid is None else self.mid + other.mid
        # One adapter may reach a stage further in than another; there, nothing is added to it.
        stages = zip_longest(self.encoder, other.encoder)
        encoder = tuple(b if a is None else a if b is None else a + b for a, b in stages)
        if not (self.down and other.down):
            return Residuals(self.down or other.down, mid, encoder)
        return Residuals(tuple(a + b for a, b in zip(self.down, other.down, strict=True)), mid, encoder)

    def tensors(self) -> tuple[Tensor, ...]:
        """All of them."""
        return (*self.down, *(() if self.mid is None else (self.mid,)), *self.encoder)

    def __len__(self) -> int:
        """The batch: as many rows as the tensor with the most."""
        return max((len(tensor) for tensor in self.tensors()), default=0)

    def rows(self, first: int, last: int) -> Residuals:
        """Those of the batch's rows `first` to `last`, not included."""
        return self.map(lambda tensor: tensor[first:last])

    def map(self, change: Callable[[Tensor], Tensor]) -> Residuals:
        """Each tensor replaced by `change(tensor)`."""
        mid = None if self.mid is None else change(self.mid)
        return Residuals(tuple(map(change, self.down)), mid, tuple(map(change, self.encoder)))
