"""Losses and gradient norms of steps, kept on the device and read together.

Reading a number from a GPU waits for all earlier work, and the GPU then idles until the next step is launched.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The numbers of one step."""

    step: int
    loss: float
    norm: float
    """Norm of the gradient before clipping."""
    by_time: list[list[float]] | None
    """`Noised.by_time` as `[3][bins]`; None if the loss has no timesteps."""


class Readings:
    """The numbers of the steps since they were last read."""

    def __init__(self) -> None:
        self._steps: list[tuple[int, torch.Size | None]] = []
        self._rows: list[Tensor] = []

    def add(self, step: int, loss: Tensor, norm: Tensor, by_time: Tensor | None) -> None:
        """Keep the numbers of a step, without reading them.

        Args:
            step: number of the step.
            loss: a scalar tensor.
            norm: norm of the gradient, a scalar tensor.
            by_time: `[3, bins]`; None if the loss has no timesteps.
        """
        numbers = [loss, norm] if by_time is None else [loss, norm, by_time]
        self._steps.append((step, None if by_time is None else by_time.shape))
        self._rows.append(torch.cat([number.detach().float().reshape(-1) for number in numbers]))

    def read(self) -> list[Reading]:
        """Read all numbers that are kept, in the order of the steps, and forget them."""
        rows = torch.cat(self._rows).tolist() if self._rows else []
        readings, first = [], 0
        for (step, shape), row in zip(self._steps, self._rows, strict=True):
            loss, norm, *times = rows[first : first + len(row)]
            first += len(row)
            width = 0 if shape is None else shape[1]
            by_time = [times[at : at + width] for at in range(0, len(times), width)] if width else None
            readings.append(Reading(step=step, loss=loss, norm=norm, by_time=by_time))
        self._steps, self._rows = [], []
        return readings
