"""One draw of the diffusion loss, the same for every network that is trained by it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from diffusers import DDIMScheduler
from torch import Tensor


class Noised(NamedTuple):
    """Latents with noise, and what the base should say about them."""

    x_t: Tensor
    """`[B, C, h, w]`."""
    t: Tensor
    """`[B]`, whole numbers below the schedule's length."""
    target: Tensor
    """What the base was trained to predict, `[B, C, h, w]`."""

    def loss(self, prediction: Tensor) -> Tensor:
        """Mean squared error of a prediction."""
        return (prediction.float() - self.target).pow(2).mean()


def noised(scheduler: DDIMScheduler, z: Tensor, generator: torch.Generator, whole: int, share: slice) -> Noised:
    """Noise and times for latents `z` `[B, C, h, w]`, drawn on the CPU so that every device trains on the same.

    Args:
        whole: samples of the step over all processes, whose numbers are drawn.
        share: which of them `z` is.
    """
    noise = torch.randn((whole, *z.shape[1:]), generator=generator)[share].to(z.device)
    t = torch.randint(0, scheduler.config.num_train_timesteps, (whole,), generator=generator)[share].to(z.device)
    targets = {"v_prediction": scheduler.get_velocity, "epsilon": lambda *_: noise, "sample": lambda *_: z}
    target = targets[scheduler.config.prediction_type](z, noise, t)
    return Noised(scheduler.add_noise(z, noise, t), t, target)
