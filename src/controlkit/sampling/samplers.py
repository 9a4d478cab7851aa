"""From a base's predictions at falling times to clean latents: DDIM, and samplers of diffusers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor

from controlkit.bases.base import Base
from controlkit.errors import UserError
from controlkit.sampling.ddim import ddim_step, times_of

_MOST_NOISE = 200.0
"""The largest ratio of noise to signal (sigma) that samplers which count in it take; Stable Diffusion's is 14.6."""
_LEAST_START = 0.6
"""The share of the schedule at which a sampler may begin; with two steps, leading spacing begins at two thirds."""
_DPM: dict[str, Any] = {"algorithm_type": "dpmsolver++", "solver_order": 2, "final_sigmas_type": "zero"}
"""Said outright, because the schedule of a base may come from a folder with a sampler's settings of its own."""


class Sampler(ABC):
    """One prediction a step, and nothing drawn at random but the noise to begin with.

    A sampler belongs to one number of steps and, between `begin` and the last step, to one batch of pictures.
    """

    timesteps: Tensor
    """`[steps]`, the falling times at which the base predicts: of 0..999, whole numbers or between them."""
    initial: float
    """Standard deviation of the latents to begin with."""

    @abstractmethod
    def begin(self) -> None:
        """A new batch of pictures."""

    @abstractmethod
    def input(self, x_t: Tensor, index: int) -> Tensor:
        """Latents before step `index` as the base and its controls read them, of the same shape."""

    @abstractmethod
    def step(self, prediction: Tensor, x_t: Tensor, index: int) -> Tensor:
        """Latents after step `index`, from those before it and what the base predicts for them; all `[B, C, h, w]`."""


class DDIM(Sampler):
    """Song et al. 2021 with eta 0, on the base's own schedule."""

    def __init__(self, base: Base, steps: int) -> None:
        self._schedule = base.schedule()
        self.timesteps = times_of(self._schedule, steps, base.device)
        self.initial = float(self._schedule.init_noise_sigma)
        self._times: list[Any] = [*self.timesteps.tolist(), None]

    def begin(self) -> None:
        pass

    def input(self, x_t: Tensor, index: int) -> Tensor:
        return x_t

    def step(self, prediction: Tensor, x_t: Tensor, index: int) -> Tensor:
        return ddim_step(self._schedule, prediction, x_t, self._times[index], self._times[index + 1])


class OfDiffusers(Sampler):
    """A sampler of diffusers, set up as a pipeline's is by `from_config(pipeline.scheduler.config)`.

    Args:
        kind: its class.
        settings: of the class, besides the base's own schedule.
        in_sigma: whether it counts in ratios of noise to signal, which some schedules let grow without bound.

    Raises:
        UserError: it does not suit the base's schedule, or would begin in the middle of it with so few steps.
    """

    def __init__(self, kind: Any, base: Base, steps: int, *, in_sigma: bool = False, **settings: Any) -> None:
        self._scheduler = kind.from_config({**base.schedule().config, **settings})
        self._steps, self._device = steps, base.device
        most = float(((1 - self._scheduler.alphas_cumprod[-1]) / self._scheduler.alphas_cumprod[-1]) ** 0.5)
        if in_sigma and most > _MOST_NOISE:
            raise UserError(
                f"the noise schedule of {base.name} ends in (nearly) pure noise, {most:.3g} times the signal, which"
                " this sampler cannot count in; take ddim, dpm++ or unipc"
            )
        self.begin()
        self.timesteps = self._scheduler.timesteps
        self.initial = float(self._scheduler.init_noise_sigma)
        length = len(self._scheduler.alphas_cumprod)
        if float(self.timesteps[0]) < _LEAST_START * length:
            raise UserError(
                f"steps is {steps}, and this sampler then begins at time {float(self.timesteps[0]):g} of {length},"
                " where a picture is not all noise; give 2 steps or more"
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
        return self._scheduler.scale_model_input(x_t, self.timesteps[index])

    def step(self, prediction: Tensor, x_t: Tensor, index: int) -> Tensor:
        return self._scheduler.step(prediction, self.timesteps[index], x_t, return_dict=False)[0]


def build_sampler(name: str, base: Base, steps: int) -> Sampler:
    """The sampler of this name (one of `request.SAMPLERS`) for a number of steps.

    Raises:
        UserError: it does not suit the base's schedule, or this number of steps.
    """
    match name:
        case "ddim":
            return DDIM(base, steps)
        case "dpm++":  # Lu et al. 2022, arXiv 2211.01095: multistep, second order
            return OfDiffusers(DPMSolverMultistepScheduler, base, steps, use_karras_sigmas=False, **_DPM)
        case "dpm++-karras":  # with the times of Karras et al. 2022, arXiv 2206.00364, eq. 5
            return OfDiffusers(DPMSolverMultistepScheduler, base, steps, in_sigma=True, use_karras_sigmas=True, **_DPM)
        case "unipc":  # Zhao et al. 2023, arXiv 2302.04867: second order
            return OfDiffusers(UniPCMultistepScheduler, base, steps, use_karras_sigmas=False, solver_order=2)
        case "euler":  # Karras et al. 2022, algorithm 1 without its correction
            return OfDiffusers(EulerDiscreteScheduler, base, steps, in_sigma=True, use_karras_sigmas=False)
    raise UserError(f"there is no sampler called {name!r}")
