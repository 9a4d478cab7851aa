"""The diffusion loss: noise, times, targets and weights of a step."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from controlkit.bases.schedules import Schedule

TIME_BINS = 10
"""Bins of the schedule in which losses are compared (`guards.LossMonitor`)."""


class Noised(NamedTuple):
    """Noisy latents and the prediction target."""

    x_t: Tensor
    """`[B, C, h, w]`."""
    t: Tensor
    """`[B]`, in the schedule's units."""
    target: Tensor
    """The prediction target of the base (noise, v or velocity), `[B, C, h, w]`."""
    time_bin: Tensor
    """`[B]`, the bin of the schedule, of `TIME_BINS`, of each `t`."""
    weight: Tensor | None = None
    """Loss weights `[B]`; None for 1."""

    def squared_error(self, prediction: Tensor) -> Tensor:
        """Elementwise squared error of a prediction, `[B, C, h, w]`, unweighted."""
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
        """Sums over the samples of each time bin, `[3, TIME_BINS]`: mean squared error, mean square of the target, and
        count."""
        error, power = (value.flatten(1).mean(1) for value in (squared_error, self.target.float().pow(2)))
        rows = torch.stack([error, power, torch.ones_like(error)])
        return (rows[:, :, None] * one_hot(self.time_bin, TIME_BINS)).sum(1)


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
    """Sample noise and times for latents `z` `[B, C, h, w]`, on the CPU so that every device trains on the same.

    Args:
        global_batch: samples of the step over all processes; random numbers are sampled for all.
        local_slice: the slice of them that is `z`.
        time_sampling: distribution of times (`Schedule.draw_times`).
        snr_gamma: min-SNR loss weighting (`Schedule.loss_weight`); None weights all times equally.
    """
    noise = torch.randn((global_batch, *z.shape[1:]), generator=generator)[local_slice].to(z.device)
    t = schedule.draw_times(global_batch, generator, time_sampling)[local_slice].to(z.device)
    weight = None if snr_gamma is None else schedule.loss_weight(t, snr_gamma)
    target = schedule.target(z, noise, t)
    return Noised(schedule.add_noise(z, noise, t), t, target, schedule.part(t, TIME_BINS), weight)
