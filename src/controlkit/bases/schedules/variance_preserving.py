"""Variance preserving schedules (Ho et al. 2020; v: Salimans and Ho 2022): Stable Diffusion 1, 2, XL, and nano."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from controlkit.bases.schedules.schedule import Schedule
from controlkit.bases.schedules.solvers import Solver, build_solver
from controlkit.errors import UserError

_PREDICTIONS = ("epsilon", "v_prediction", "sample")
_PURE_NOISE = 200.0
"""Ratio of noise to signal above which a schedule ends in pure noise; Stable Diffusion's is 14.6."""


class VariancePreserving(Schedule):
    """x_t = sqrt(alpha_bar) z + sqrt(1 - alpha_bar) noise, at integer times t in 0..length - 1.

    Latents are never clipped, whatever the configuration says, and a missing offset is 1: both as in diffusers'
    StableDiffusionPipeline.

    Args:
        config: of a diffusers scheduler.

    Raises:
        UserError: its prediction type is not supported.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._scheduler = DDIMScheduler.from_config({"steps_offset": 1, **config, "clip_sample": False})
        # These calls move the tables of their scheduler to the device; those of the solvers stay on the CPU.
        self._of_training = copy.deepcopy(self._scheduler)
        self.config = dict(self._scheduler.config)
        self.length = int(self.config["num_train_timesteps"])
        self.prediction = str(self.config["prediction_type"])
        if self.prediction not in _PREDICTIONS:
            raise UserError(
                f"prediction_type is {self.prediction!r}; expected one of {', '.join(_PREDICTIONS)}", "unsupported"
            )

    def add_noise(self, z: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return self._of_training.add_noise(z, noise, t)

    def target(self, z: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        if self.prediction == "epsilon":
            return noise
        return z if self.prediction == "sample" else self._of_training.get_velocity(z, noise, t)

    def clean(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        alpha_bar = self._scheduler.alphas_cumprod[round(float(t))]
        signal, noise = float(alpha_bar) ** 0.5, float(1 - alpha_bar) ** 0.5
        if self.prediction == "epsilon":
            return (x_t - noise * prediction) / signal
        return prediction if self.prediction == "sample" else signal * x_t - noise * prediction

    def snr(self, t: Tensor) -> Tensor:
        alpha_bar = self._scheduler.alphas_cumprod.to(t.device)[t]
        return alpha_bar / (1 - alpha_bar)

    def loss_weight(self, t: Tensor, snr_gamma: float) -> Tensor:
        snr = self.snr(t)
        clamped = snr.clamp(max=snr_gamma)
        # Weights are of the error of z; the error of the noise is SNR times it, that of v SNR + 1 times.
        return {"sample": clamped, "epsilon": clamped / snr, "v_prediction": clamped / (snr + 1)}[self.prediction]

    @property
    def noise_at_the_end(self) -> float:
        """Ratio of noise to signal (sigma) at the last time."""
        alpha_bar = self._scheduler.alphas_cumprod[-1]
        return float(((1 - alpha_bar) / alpha_bar) ** 0.5)

    @property
    def ends_in_pure_noise(self) -> bool:
        """Whether (nearly) no signal is left at the last time."""
        return self.noise_at_the_end > _PURE_NOISE

    def solver(self, name: str, steps: int, device: torch.device | str, base: str) -> Solver:
        if self.prediction == "epsilon" and self.ends_in_pure_noise:
            raise UserError(
                f"{base} predicts the noise (epsilon), but its schedule ends in (nearly) pure noise,"
                f" {self.noise_at_the_end:.3g} times the signal, from which no sampler can start; check"
                " prediction_type and the betas in scheduler/scheduler_config.json",
                "contradiction",
            )
        return build_solver(name, self._scheduler, steps, device, base, pure_noise=self.ends_in_pure_noise)

    def _uniform(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.randint(0, self.length, (count,), generator=generator)

    def _at(self, fraction: Tensor) -> Tensor:
        return (fraction * self.length).long().clamp(max=self.length - 1)
