"""Interface of a noise schedule."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from controlkit.bases.schedules.solvers import Solver
from controlkit.errors import UserError

TIME_SAMPLINGS = ("uniform", "cubic", "logit-normal")
"""Distributions of training times: uniform; 1 - u^3, which favours noisy times (Mou et al. 2024, section 3.3);
logit-normal (Esser et al. 2024, arXiv 2403.03206, section 3.1)."""


class Schedule(ABC):
    """Times t from 0 (clean) to `length` (noise), with the noising and the prediction target at each.

    Other code uses these methods, never the numbers of the schedule.
    """

    length: int
    """Times lie in [0, length], in the units of the base's network."""
    prediction: str
    """Prediction type: `epsilon`, `v_prediction`, `sample` or `flow`."""
    config: dict[str, Any]
    """Of the diffusers scheduler that it comes from."""

    def draw_times(self, count: int, generator: torch.Generator, sampling: str | None = None) -> Tensor:
        """Training times `[count]`, sampled on the CPU.

        Args:
            sampling: one of `TIME_SAMPLINGS`; None is the schedule's default.

        Raises:
            UserError: `sampling` is unknown.
        """
        sampling = sampling or self.default_time_sampling
        if sampling == "uniform":
            return self._uniform(count, generator)
        if sampling == "cubic":
            return self._at(1 - torch.rand(count, generator=generator) ** 3)
        if sampling == "logit-normal":
            return self._at(torch.sigmoid(torch.randn(count, generator=generator)))
        raise UserError(f"time_sampling is {sampling!r}; expected one of {', '.join(TIME_SAMPLINGS)}", "unknown-name")

    @property
    def default_time_sampling(self) -> str:
        """Default distribution of training times."""
        return "uniform"

    @abstractmethod
    def add_noise(self, z: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Noisy latents at times `t` `[B]` from clean ones `z` `[B, C, h, w]`."""

    @abstractmethod
    def target(self, z: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Prediction target at times `t` `[B]`, `[B, C, h, w]`."""

    @abstractmethod
    def clean(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The estimate of the clean latents from the network's prediction, `[B, C, h, w]`.

        Args:
            prediction: for `x_t` `[B, C, h, w]`, as the network takes it (`Solver.input`).
            t: one time for all, also fractional.
        """

    @abstractmethod
    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio (of variances) at times `t`, `[B]`."""

    @abstractmethod
    def loss_weight(self, t: Tensor, snr_gamma: float) -> Tensor:
        """Min-SNR weights `[B]` of the squared error at times `t` (Hang et al. 2023, arXiv 2303.09556, eq. 9).

        Args:
            snr_gamma: upper bound of the signal-to-noise ratio.
        """

    @abstractmethod
    def solver(self, name: str, steps: int, device: torch.device | str, base: str) -> Solver:
        """The solver of this name (`SOLVERS`) for a number of steps.

        Args:
            base: name of the base, for errors.

        Raises:
            UserError: it does not support the schedule or this number of steps.
        """

    def for_tokens(self, count: int) -> Schedule:
        """The schedule of images of `count` tokens, for schedules that depend on it."""
        return self

    def first_step(self, steps: int, strength: float) -> int:
        """Index of the first of `steps` steps when sampling starts from an image, as in diffusers.

        Args:
            strength: fraction of the steps that run, in (0, 1]; the number is rounded down.
        """
        return steps - int(steps * strength)

    def part(self, t: Tensor, parts: int) -> Tensor:
        """Index of the part of the schedule that each time lies in, of `parts` equal ones, `[B]`."""
        return (t * parts / self.length).long().clamp(max=parts - 1)

    @abstractmethod
    def _uniform(self, count: int, generator: torch.Generator) -> Tensor:
        """Uniformly sampled times."""

    @abstractmethod
    def _at(self, fraction: Tensor) -> Tensor:
        """Times at fractions in [0, 1) of the schedule."""
