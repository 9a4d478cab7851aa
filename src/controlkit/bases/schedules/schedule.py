"""The interface of a noise schedule."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from controlkit.bases.schedules.solvers import Solver
from controlkit.errors import UserError

TIME_SAMPLINGS = ("uniform", "cubic", "logit-normal")
"""Ways to draw the times of training: evenly; more of the noisy ones by 1 - u^3 (Mou et al. 2024, section 3.3); and by
a normal distribution of the logit (Esser et al. 2024, arXiv 2403.03206, section 3.1)."""


class Schedule(ABC):
    """Times t from 0 (an image) to `length` (noise), and what is mixed and predicted at each.

    Everything outside asks it and never looks at its numbers.
    """

    length: int
    """Times lie in [0, length], in the units that the base's network is told."""
    prediction: str
    """What the network predicts: `epsilon`, `v_prediction`, `sample` or `flow`."""
    config: dict[str, Any]
    """Of diffusers' scheduler that it comes from."""

    def draw_times(self, count: int, generator: torch.Generator, sampling: str | None = None) -> Tensor:
        """Times of training `[count]`, drawn on the CPU.

        Args:
            sampling: one of `TIME_SAMPLINGS`; None is the schedule's own.

        Raises:
            UserError: there is no such way.
        """
        sampling = sampling or self.own_time_sampling
        if sampling == "uniform":
            return self._uniform(count, generator)
        if sampling == "cubic":
            return self._at(1 - torch.rand(count, generator=generator) ** 3)
        if sampling == "logit-normal":
            return self._at(torch.sigmoid(torch.randn(count, generator=generator)))
        raise UserError(f"time_sampling is {sampling!r}; expected one of {', '.join(TIME_SAMPLINGS)}")

    @property
    def own_time_sampling(self) -> str:
        """How times are drawn where nothing is asked for."""
        return "uniform"

    @abstractmethod
    def add_noise(self, z: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Latents `z` `[B, C, h, w]` with noise, at times `t` `[B]`."""

    @abstractmethod
    def target(self, z: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should predict there, `[B, C, h, w]`."""

    @abstractmethod
    def snr(self, t: Tensor) -> Tensor:
        """The ratio of signal to noise (of their variances) at times `t`, `[B]`."""

    @abstractmethod
    def loss_weight(self, t: Tensor, snr_gamma: float) -> Tensor:
        """Weights `[B]` of the squared error at times `t`, by min-SNR (Hang et al. 2023, arXiv 2303.09556, eq. 9).

        Args:
            snr_gamma: the most that a ratio of signal to noise counts.
        """

    @abstractmethod
    def solver(self, name: str, steps: int, device: torch.device | str, base: str) -> Solver:
        """The solver of this name (`SOLVERS`) for a number of steps.

        Args:
            base: what errors call the base.

        Raises:
            UserError: it does not suit the schedule, or this number of steps.
        """

    def part(self, t: Tensor, parts: int) -> Tensor:
        """Which of so many equal parts of the schedule each time lies in, from 0, `[B]`."""
        return (t * parts / self.length).long().clamp(max=parts - 1)

    @abstractmethod
    def _uniform(self, count: int, generator: torch.Generator) -> Tensor:
        """Times drawn evenly."""

    @abstractmethod
    def _at(self, share: Tensor) -> Tensor:
        """The times at shares of the schedule, of [0, 1)."""
