"""The diffusion loss: noise, times, targets and weights of a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

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
        # Not `one_hot`, which reads the largest bin from the tensor.
        in_bin = self.time_bin[:, None] == torch.arange(TIME_BINS, device=self.time_bin.device)
        return (rows[:, :, None] * in_bin).sum(1)


class Draw(NamedTuple):
    """The random numbers of a step's noise."""

    noise: Tensor
    """Standard normal, `[B, C, h, w]`."""
    t: Tensor
    """Times `[B]`, in the schedule's units."""

    def noised(self, schedule: Schedule, z: Tensor, snr_gamma: float | None = None) -> Noised:
        """Noisy latents and their target.

        Args:
            z: latents `[B, C, h, w]`, on the device of the draw.
            snr_gamma: min-SNR loss weighting (`Schedule.loss_weight`); None weights all times equally.
        """
        noise, t = self
        weight = None if snr_gamma is None else schedule.loss_weight(t, snr_gamma)
        target = schedule.target(z, noise, t)
        return Noised(schedule.add_noise(z, noise, t), t, target, schedule.part(t, TIME_BINS), weight)


def draw(
    schedule: Schedule,
    shape: Sequence[int],
    generator: torch.Generator,
    global_batch: int,
    local_slice: slice,
    time_sampling: str | None = None,
) -> Draw:
    """Sample noise and times on the CPU, so that every device trains on the same.

    Args:
        shape: of one latent, `[C, h, w]`.
        global_batch: samples of the step over all processes; random numbers are sampled for all.
        local_slice: the slice of them to return.
        time_sampling: distribution of times (`Schedule.draw_times`).
    """
    noise = torch.randn((global_batch, *shape), generator=generator)[local_slice]
    return Draw(noise, schedule.draw_times(global_batch, generator, time_sampling)[local_slice])


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
    """`draw` for latents `z` `[B, C, h, w]`, which are the slice of the global batch, and `Draw.noised` of it."""
    drawn = draw(schedule, z.shape[1:], generator, global_batch, local_slice, time_sampling)
    return Draw(*(part.to(z.device) for part in drawn)).noised(schedule, z, snr_gamma)
