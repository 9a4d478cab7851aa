"""One draw of the diffusion loss, the same for every network that is trained by it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from controlkit.bases.schedules import Schedule

TIME_BINS = 10
"""Parts of the schedule by which losses are compared (`guards.LossMonitor`)."""


class Noised(NamedTuple):
    """Latents with noise, and what the base should say about them."""

    x_t: Tensor
    """`[B, C, h, w]`."""
    t: Tensor
    """`[B]`, in the schedule's units."""
    target: Tensor
    """What the base was trained to predict, `[B, C, h, w]`."""
    part: Tensor
    """`[B]`, which of the `TIME_BINS` parts of the schedule each `t` is in, from 0."""
    weight: Tensor | None = None
    """`[B]`, of each sample's error; None is 1."""

    def squared_error(self, prediction: Tensor) -> Tensor:
        """Of every element of a prediction, `[B, C, h, w]`, without weights."""
        return (prediction.float() - self.target).pow(2)

    def loss(self, prediction: Tensor) -> Tensor:
        """The weighted mean squared error of a prediction."""
        return self.mean(self.squared_error(prediction))

    def mean(self, squared_error: Tensor) -> Tensor:
        """The weighted mean of `squared_error`."""
        if self.weight is None:
            return squared_error.mean()
        return (squared_error.flatten(1).mean(1) * self.weight).mean()

    @torch.no_grad()
    def by_time(self, squared_error: Tensor) -> Tensor:
        """Sums over the samples of each part of the schedule, `[3, TIME_BINS]`: mean squared error, mean square of the
        target, and number."""
        error, power = (value.flatten(1).mean(1) for value in (squared_error, self.target.float().pow(2)))
        rows = torch.stack([error, power, torch.ones_like(error)])
        return (rows[:, :, None] * one_hot(self.part, TIME_BINS)).sum(1)


def noised(
    schedule: Schedule,
    z: Tensor,
    generator: torch.Generator,
    global_batch: int,
    local_slice: slice,
    *,
    time_sampling: str | None = None,
    snr_gamma: float | None = None,
) -> Noised:
    """Noise and times for latents `z` `[B, C, h, w]`, drawn on the CPU so that every device trains on the same.

    Args:
        global_batch: samples of the step over all processes, whose numbers are drawn.
        local_slice: which of them `z` is.
        time_sampling: how times are drawn (`Schedule.draw_times`).
        snr_gamma: weights the loss by min-SNR (`Schedule.loss_weight`); None weights all times alike.
    """
    noise = torch.randn((global_batch, *z.shape[1:]), generator=generator)[local_slice].to(z.device)
    t = schedule.draw_times(global_batch, generator, time_sampling)[local_slice].to(z.device)
    weight = None if snr_gamma is None else schedule.loss_weight(t, snr_gamma)
    target = schedule.target(z, noise, t)
    return Noised(schedule.add_noise(z, noise, t), t, target, schedule.part(t, TIME_BINS), weight)
