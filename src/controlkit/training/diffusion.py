"""One draw of the diffusion loss, the same for every network that is trained by it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from diffusers import DDIMScheduler
from torch import Tensor
from torch.nn.functional import one_hot

TIMES = 10
"""Parts of the schedule by which losses are compared (`guards.LossWatch`)."""


class Noised(NamedTuple):
    """Latents with noise, and what the base should say about them."""

    x_t: Tensor
    """`[B, C, h, w]`."""
    t: Tensor
    """`[B]`, whole numbers below the schedule's length."""
    target: Tensor
    """What the base was trained to predict, `[B, C, h, w]`."""
    part: Tensor
    """`[B]`, which of the `TIMES` parts of the schedule each `t` is in, from 0."""

    def squared_error(self, prediction: Tensor) -> Tensor:
        """Of every element of a prediction, `[B, C, h, w]`."""
        return (prediction.float() - self.target).pow(2)

    def loss(self, prediction: Tensor) -> Tensor:
        """Mean squared error of a prediction."""
        return self.squared_error(prediction).mean()

    @torch.no_grad()
    def by_time(self, squared_error: Tensor) -> Tensor:
        """Sums over the samples of each part of the schedule, `[3, TIMES]`: mean squared error, mean square of the
        target, and number."""
        error, power = (value.flatten(1).mean(1) for value in (squared_error, self.target.float().pow(2)))
        rows = torch.stack([error, power, torch.ones_like(error)])
        return (rows[:, :, None] * one_hot(self.part, TIMES)).sum(1)


def noised(scheduler: DDIMScheduler, z: Tensor, generator: torch.Generator, whole: int, share: slice) -> Noised:
    """Noise and times for latents `z` `[B, C, h, w]`, drawn on the CPU so that every device trains on the same.

    Args:
        whole: samples of the step over all processes, whose numbers are drawn.
        share: which of them `z` is.
    """
    noise = torch.randn((whole, *z.shape[1:]), generator=generator)[share].to(z.device)
    length = scheduler.config.num_train_timesteps
    t = torch.randint(0, length, (whole,), generator=generator)[share].to(z.device)
    targets = {"v_prediction": scheduler.get_velocity, "epsilon": lambda *_: noise, "sample": lambda *_: z}
    target = targets[scheduler.config.prediction_type](z, noise, t)
    return Noised(scheduler.add_noise(z, noise, t), t, target, t * TIMES // length)
