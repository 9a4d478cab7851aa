"""Rectified flow (Liu et al. 2023; Esser et al. 2024, arXiv 2403.03206): Stable Diffusion 3 and related models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from controlkit.bases.schedules.schedule import Schedule
from controlkit.bases.schedules.solvers import FLOW_SOLVERS, DiffusersSolver, Solver
from controlkit.errors import UserError


class RectifiedFlow(Schedule):
    """x_t = (1 - sigma) z + sigma noise with sigma = t / length; the network predicts noise - z.

    Args:
        config: of diffusers' `FlowMatchEulerDiscreteScheduler`.
    """

    prediction = "flow"

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._scheduler = FlowMatchEulerDiscreteScheduler.from_config(dict(config))
        self.config = dict(self._scheduler.config)
        self.length = int(self.config["num_train_timesteps"])

    @property
    def default_time_sampling(self) -> str:
        return "logit-normal"

    def add_noise(self, z: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        sigma = self._sigma(t, z)
        return (1 - sigma) * z + sigma * noise

    def target(self, z: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise - z

    def clean(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return x_t - self._sigma(t.reshape(1), x_t) * prediction

    def snr(self, t: Tensor) -> Tensor:
        sigma = (t / self.length).clamp(1e-4, 1 - 1e-4)
        return ((1 - sigma) / sigma) ** 2

    def loss_weight(self, t: Tensor, snr_gamma: float) -> Tensor:
        # The error of z is sigma^2 times that of the flow; the error of z is weighted by the clamped SNR.
        return self.snr(t).clamp(max=snr_gamma) * (t / self.length) ** 2

    def first_step(self, steps: int, strength: float) -> int:
        """As `Schedule.first_step`, but rounded up, as in diffusers' pipelines of Stable Diffusion 3."""
        return int(steps - steps * strength)

    def solver(self, name: str, steps: int, device: torch.device | str, base: str) -> Solver:
        if name not in FLOW_SOLVERS:
            raise UserError(
                f"{base} is a rectified flow, which the sampler {name} does not support; use"
                f" {' or '.join(FLOW_SOLVERS)}",
                "contradiction",
            )
        # `euler` is the base's own scheduler; the others are diffusers' flow solvers with this schedule's shift.
        kind, settings = FLOW_SOLVERS[name]
        shift = {"flow_shift": self.config["shift"]} if kind is not FlowMatchEulerDiscreteScheduler else {}
        scheduler = (
            self._scheduler
            if kind is FlowMatchEulerDiscreteScheduler
            else kind.from_config({"num_train_timesteps": self.length, **settings, **shift})
        )
        return DiffusersSolver(scheduler, steps, device, length=self.length)

    def _uniform(self, count: int, generator: torch.Generator) -> Tensor:
        return self._at(torch.rand(count, generator=generator))

    def _at(self, fraction: Tensor) -> Tensor:
        """With the schedule's shift (Esser et al. 2024, eq. 23), so that training covers the times of sampling."""
        shift = float(self.config["shift"])
        shifted = shift * fraction / (1 + (shift - 1) * fraction) if not math.isclose(shift, 1) else fraction
        return shifted * self.length

    def _sigma(self, t: Tensor, like: Tensor) -> Tensor:
        return (t.to(like.device, like.dtype) / self.length).view(-1, *[1] * (like.ndim - 1))
