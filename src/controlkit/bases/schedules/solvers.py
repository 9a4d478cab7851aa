"""Solvers: from a network's predictions at falling times to clean latents. DDIM, and solvers of diffusers."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from controlkit.bases.schedules.ddim import ddim_step, times_of
from controlkit.errors import UserError

SOLVERS = ("ddim", "dpm++", "dpm++-karras", "unipc", "euler")
"""Names of solvers."""
_LEAST_START = 0.6
"""The share of the schedule at which a solver may begin; with two steps, leading spacing begins at two thirds."""
_DPM: dict[str, Any] = {"algorithm_type": "dpmsolver++", "solver_order": 2, "final_sigmas_type": "zero"}
"""Said outright, because the schedule of a base may come from a folder with a sampler's settings of its own."""

_VARIANCE_PRESERVING: dict[str, tuple[Any, dict[str, Any]]] = {
    "dpm++": (DPMSolverMultistepScheduler, {"use_karras_sigmas": False, **_DPM}),
    "dpm++-karras": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True, **_DPM}),
    "unipc": (UniPCMultistepScheduler, {"use_karras_sigmas": False, "solver_order": 2}),
    "euler": (EulerDiscreteScheduler, {"use_karras_sigmas": False}),
}
"""Lu et al. 2022, arXiv 2211.01095 (multistep, second order), with the times of Karras et al. 2022, arXiv 2206.00364,
eq. 5; Zhao et al. 2023, arXiv 2302.04867; Karras et al. 2022, algorithm 1 without its correction."""
_IN_SIGMA = ("dpm++-karras", "euler")
"""Those that count in ratios of noise to signal, which some schedules let grow without bound."""
FLOW_SOLVERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "euler": (FlowMatchEulerDiscreteScheduler, {}),
    "dpm++": (
        DPMSolverMultistepScheduler,
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True, **_DPM},
    ),
    "unipc": (
        UniPCMultistepScheduler,
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "solver_order": 2},
    ),
}
"""Solvers of a rectified flow: diffusers' class and its settings."""


class Solver(ABC):
    """One prediction a step, and nothing drawn at random but the noise to begin with.

    A solver belongs to one number of steps and, between `begin` and the last step, to one batch of images.
    """

    timesteps: Tensor
    """`[steps]`, the falling times at which the base predicts: of 0..999, whole numbers or between them."""
    initial: float
    """Standard deviation of the latents to begin with."""

    @abstractmethod
    def begin(self) -> None:
        """A new batch of images."""

    @abstractmethod
    def input(self, x_t: Tensor, index: int) -> Tensor:
        """Latents before step `index` as the base and its controls read them, of the same shape."""

    @abstractmethod
    def step(self, prediction: Tensor, x_t: Tensor, index: int) -> Tensor:
        """Latents after step `index`, from those before it and what the base predicts for them; all `[B, C, h, w]`."""


class DDIM(Solver):
    """Song et al. 2021 with eta 0, on the schedule itself."""

    def __init__(self, scheduler: DDIMScheduler, steps: int, device: torch.device | str) -> None:
        self._scheduler = copy.deepcopy(scheduler)  # which keeps the times of one number of steps
        self.timesteps = times_of(self._scheduler, steps, device)
        self.initial = float(self._scheduler.init_noise_sigma)
        self._times: list[Any] = [*self.timesteps.tolist(), None]

    def begin(self) -> None:
        pass

    def input(self, x_t: Tensor, index: int) -> Tensor:
        return x_t

    def step(self, prediction: Tensor, x_t: Tensor, index: int) -> Tensor:
        return ddim_step(self._scheduler, prediction, x_t, self._times[index], self._times[index + 1])


class DiffusersSolver(Solver):
    """A scheduler of diffusers.

    Args:
        scheduler: set up as a pipeline's is by `from_config(pipeline.scheduler.config)`.
        length: of the schedule.

    Raises:
        UserError: it would begin in the middle of the schedule with so few steps.
    """

    def __init__(self, scheduler: Any, steps: int, device: torch.device | str, *, length: int) -> None:
        self._scheduler = copy.deepcopy(scheduler)
        self._steps, self._device = steps, device
        self.begin()
        self.timesteps = self._scheduler.timesteps
        self.initial = float(getattr(self._scheduler, "init_noise_sigma", 1.0))
        if float(self.timesteps[0]) < _LEAST_START * length:
            raise UserError(
                f"steps is {steps}, and this sampler then begins at time {float(self.timesteps[0]):g} of {length},"
                " where an image is not all noise; give 2 steps or more"
            )

    def begin(self) -> None:
        scheduler = self._scheduler
        scheduler.set_timesteps(self._steps, device=self._device)
        # Trailing spacing gives some numbers of steps (61, 103, ...) one time too many, below zero.
        scheduler.timesteps = scheduler.timesteps[: self._steps]
        scheduler.sigmas = torch.cat([scheduler.sigmas[: self._steps], scheduler.sigmas[-1:]])
        scheduler.num_inference_steps = self._steps
        scheduler.set_begin_index(0)

    def input(self, x_t: Tensor, index: int) -> Tensor:
        if not hasattr(self._scheduler, "scale_model_input"):
            return x_t
        return self._scheduler.scale_model_input(x_t, self.timesteps[index])

    def step(self, prediction: Tensor, x_t: Tensor, index: int) -> Tensor:
        return self._scheduler.step(prediction, self.timesteps[index], x_t, return_dict=False)[0]


def build_solver(
    name: str, scheduler: DDIMScheduler, steps: int, device: torch.device | str, base: str, *, pure_noise: bool
) -> Solver:
    """The solver of this name for a variance preserving schedule.

    Args:
        base: what errors call the base.
        pure_noise: whether the schedule ends in (nearly) pure noise.

    Raises:
        UserError: it does not suit the schedule, or this number of steps.
    """
    if name == "ddim":
        return DDIM(scheduler, steps, device)
    if name not in _VARIANCE_PRESERVING:
        raise UserError(f"there is no sampler called {name!r}")
    if pure_noise and name in _IN_SIGMA:
        bar = scheduler.alphas_cumprod[-1]
        raise UserError(
            f"the noise schedule of {base} ends in (nearly) pure noise, {float(((1 - bar) / bar) ** 0.5):.3g} times the"
            " signal, which this sampler cannot count in; take ddim, dpm++ or unipc"
        )
    kind, settings = _VARIANCE_PRESERVING[name]
    built = kind.from_config({**scheduler.config, **settings})
    return DiffusersSolver(built, steps, device, length=len(scheduler.alphas_cumprod))
