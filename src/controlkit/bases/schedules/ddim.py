"""DDIM (Song et al. 2021, arXiv 2010.02502) with eta 0: the timesteps of a schedule, and one step.

diffusers' `DDIMScheduler.step` assumes that the next time lies 1000 // steps below, which holds only if `steps` divides
1000 or the spacing is `leading`; otherwise noise remains in the image. Here the next time is the schedule's next entry,
which is the same wherever diffusers is right.
"""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from controlkit.errors import UserError

_SHORTFALL = 0.1
"""Fraction of the schedule that integer strides may omit at the noisy end before times are spaced evenly instead."""


def times_of(scheduler: DDIMScheduler, steps: int, device: torch.device | str = "cpu") -> Tensor:
    """The times `[steps]` of the predictions, descending, in the schedule's spacing.

    They are diffusers' own, except for two faults: trailing spacing gives one time too many for some numbers of steps
    (61, 103, ...), which is dropped; and the integer strides of leading spacing start far below the top for many
    numbers above 100 (at 600 for 600 steps), where the latents have more noise than the network expects, so those are
    spaced evenly.

    Raises:
        UserError: the spacing makes a single step start near the clean end of the schedule.
    """
    scheduler.set_timesteps(steps, device=device)
    length, spacing = scheduler.config["num_train_timesteps"], scheduler.config["timestep_spacing"]
    times = scheduler.timesteps[:steps]
    if spacing == "leading" and steps * (length // steps) < (1 - _SHORTFALL) * length:
        times = torch.arange(steps - 1, -1, -1, device=device) * length // steps + scheduler.config["steps_offset"]
    if 2 * int(times[0]) < length - 2:
        raise UserError(
            f"steps is {steps}, and the {spacing} spacing of this base's schedule then starts at time"
            f" {int(times[0])} of {length}, where almost no noise is left; use 2 steps or more",
            "out-of-range",
        )
    return times.clamp(max=length - 1)  # with as many steps as times, the offset exceeds it


def ddim_step(scheduler: DDIMScheduler, prediction: Tensor, x_t: Tensor, t: int, following: int | None) -> Tensor:
    """One step, eqs. 12 and 16 with eta 0.

    Args:
        prediction: for `x_t` `[B, C, h, w]` at time `t`, of the schedule's prediction type.
        following: time after the step; None for clean latents.

    Returns:
        `[B, C, h, w]`.
    """
    alpha_bar = scheduler.alphas_cumprod[t]
    signal, noise = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    kind = scheduler.config["prediction_type"]
    if kind == "epsilon":
        x_0, epsilon = (x_t - noise * prediction) / signal, prediction
    elif kind == "v_prediction":
        x_0, epsilon = signal * x_t - noise * prediction, signal * prediction + noise * x_t
    else:
        x_0, epsilon = prediction, (x_t - signal * prediction) / noise
    if scheduler.config["thresholding"]:
        x_0 = scheduler._threshold_sample(x_0)
    elif scheduler.config["clip_sample"]:
        x_0 = x_0.clamp(-scheduler.config["clip_sample_range"], scheduler.config["clip_sample_range"])
    alpha_bar = scheduler.final_alpha_cumprod if following is None else scheduler.alphas_cumprod[following]
    return alpha_bar**0.5 * x_0 + (1 - alpha_bar) ** 0.5 * epsilon
