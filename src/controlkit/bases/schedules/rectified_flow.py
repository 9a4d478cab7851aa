"""Rectified flow (Liu et al. 2023; Esser et al. 2024, arXiv 2403.03206): Stable Diffusion 3, FLUX.1 and related
models."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from controlkit.bases.schedules.schedule import Schedule
from controlkit.bases.schedules.solvers import FLOW_SOLVERS, DiffusersSolver, Solver
from controlkit.errors import UserError


class RectifiedFlow(Schedule):
    """x_t = (1 - sigma) z + sigma noise with sigma = t / length; the network predicts noise - z.

    A schedule with dynamic shifting has the shift of `for_tokens` when sampling; training times, as in diffusers'
    scripts, have none.

    Args:
        config: of diffusers' `FlowMatchEulerDiscreteScheduler`.
    """

    prediction = "flow"

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._scheduler = FlowMatchEulerDiscreteScheduler.from_config(dict(config))
        self.config = dict(self._scheduler.config)
        self.length = int(self.config["num_train_timesteps"])
        self.shift = 1.0 if self.config["use_dynamic_shifting"] else float(self.config["shift"])
        """Of the noise levels (Esser et al. 2024, eq. 23)."""

    def for_tokens(self, count: int) -> RectifiedFlow:
        """With the shift exp(mu), or mu if the configuration says `linear`; mu is linear in the number of tokens
        (diffusers, pipelines/flux/pipeline_flux.py, `calculate_shift`)."""
        config = self.config
        if not config["use_dynamic_shifting"]:
            return self
        least, most = (int(config[f"{name}_image_seq_len"]) for name in ("base", "max"))
        low, high = float(config["base_shift"]), float(config["max_shift"])
        mu = low + (high - low) * (count - least) / (most - least)
        return self._shifted(mu)

    def _shifted(self, mu: float) -> RectifiedFlow:
        """A copy with the shift of mu."""
        schedule = copy.copy(self)
        schedule.shift = mu if self.config["time_shift_type"] == "linear" else math.exp(mu)
        return schedule

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
        if kind is FlowMatchEulerDiscreteScheduler:
            changed: dict[str, Any] = {"use_dynamic_shifting": False, "shift": self.shift}
            if steps == 1:
                changed["shift_terminal"] = None  # which is that of the last of several steps
            own = kind.from_config({**self.config, **changed})
            return DiffusersSolver(own, steps, device, length=self.length, sigmas=self._sigmas(steps))
        scheduler = kind.from_config({"num_train_timesteps": self.length, **settings, "flow_shift": self.shift})
        return DiffusersSolver(scheduler, steps, device, length=self.length)

    def _sigmas(self, steps: int) -> list[float] | None:
        """Noise levels of the steps before the shift; None is the scheduler's choice, which without dynamic shifting
        depends on the shift."""
        if not self.config["use_dynamic_shifting"]:
            return None
        return np.linspace(1, 1 / self.length, steps).tolist()

    def _uniform(self, count: int, generator: torch.Generator) -> Tensor:
        return self._at(torch.rand(count, generator=generator))

    def _at(self, fraction: Tensor) -> Tensor:
        """With the schedule's shift (Esser et al. 2024, eq. 23), so that training covers the times of sampling."""
        shift = self.shift
        shifted = shift * fraction / (1 + (shift - 1) * fraction) if not math.isclose(shift, 1) else fraction
        return shifted * self.length

    def _sigma(self, t: Tensor, like: Tensor) -> Tensor:
        return (t.to(like.device, like.dtype) / self.length).view(-1, *[1] * (like.ndim - 1))


class EvenlySpacedFlow(RectifiedFlow):
    """A rectified flow whose steps begin at noise levels 1, 1 - 1 / steps, ..., 1 / steps before the shift, as in
    diffusers' pipelines of FLUX, Z-Image and Qwen-Image."""

    def _sigmas(self, steps: int) -> list[float]:
        return [(steps - step) / steps for step in range(steps)]


class SanaFlow(RectifiedFlow):
    """That of Sana, whose scheduler in diffusers is `DPMSolverMultistepScheduler`.

    Args:
        config: of that, or of `FlowMatchEulerDiscreteScheduler`.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        shift = config.get("flow_shift", config.get("shift", 1.0))
        super().__init__({"num_train_timesteps": config.get("num_train_timesteps", 1000), "shift": shift})


class Flux2Flow(EvenlySpacedFlow):
    """That of FLUX.2: with dynamic shifting, the shift exp(mu) depends on the numbers of tokens and of steps."""

    _tokens: int | None = None

    def for_tokens(self, count: int) -> Flux2Flow:
        schedule = copy.copy(self)
        schedule._tokens = count
        return schedule

    def solver(self, name: str, steps: int, device: torch.device | str, base: str) -> Solver:
        if self._tokens is None or not self.config["use_dynamic_shifting"]:
            return super().solver(name, steps, device, base)
        return EvenlySpacedFlow(self.config)._shifted(_mu(self._tokens, steps)).solver(name, steps, device, base)


def _mu(tokens: int, steps: int) -> float:
    """Fitted by Black Forest Labs at 10 and at 200 steps (diffusers, pipelines/flux2/pipeline_flux2.py,
    `compute_empirical_mu`)."""
    at_10, at_200 = 8.73809524e-05 * tokens + 1.89833333, 0.00016927 * tokens + 0.45666666
    return at_200 if tokens > 4300 else at_200 + (at_10 - at_200) * (200 - steps) / 190
