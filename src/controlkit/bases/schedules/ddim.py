"""DDIM (Song et al. 2021, arXiv 2010.02502) with eta 0: the times of a schedule, and the step between two of them.

diffusers' `DDIMScheduler.step` takes the next time to lie 1000 // steps below, which is where it lies only if `steps`
divides 1000 or the spacing is `leading`; elsewhere noise is left in the image. Here the next time is the schedule's
own next entry, which is the same wherever diffusers is right.
"""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from controlkit.errors import UserError

_SHORTFALL = 0.1
"""The share of the schedule that whole strides may leave out at the noisy end before times are spread evenly."""


def times_of(scheduler: DDIMScheduler, steps: int, device: torch.device | str = "cpu") -> Tensor:
    """The times `[steps]` at which the noise is predicted, falling, as the schedule's spacing has them.

    They are diffusers' own, except for two faults: trailing spacing gives some numbers of steps (61, 103, ...) one time
    too many, which is dropped; and the whole strides of leading spacing begin far below the top for many numbers above
    100 (at 600 for 600 steps), where the noise is fuller than the network is told, so those are spread evenly.

    Raises:
        UserError: the spacing makes the one step that is asked for begin near the image's end of the schedule.
    """
    scheduler.set_timesteps(steps, device=device)
    length, spacing = scheduler.config["num_train_timesteps"], scheduler.config["timestep_spacing"]
    times = scheduler.timesteps[:steps]
    if spacing == "leading" and steps * (length // steps) < (1 - _SHORTFALL) * length:
        times = torch.arange(steps - 1, -1, -1, device=device) * length // steps + scheduler.config["steps_offset"]
    if 2 * int(times[0]) < length - 2:
        raise UserError(
            f"steps is {steps}, and the {spacing} spacing of this base's schedule then begins at time {int(times[0])}"
            f" of {length}, where an image has hardly any noise; give 2 steps or more"
        )
    return times.clamp(max=length - 1)  # as many steps as times and an offset go past it


def ddim_step(scheduler: DDIMScheduler, prediction: Tensor, x_t: Tensor, t: int, following: int | None) -> Tensor:
    """One step, eqs. 12 and 16 with eta 0.

    Args:
        prediction: for `x_t` `[B, C, h, w]` at time `t`, of the schedule's prediction type.
        following: the time that the step leads to; None for the clean latents.

    Returns:
        `[B, C, h, w]`.
    """
    bar = scheduler.alphas_cumprod[t]
    signal, noise = bar**0.5, (1 - bar) ** 0.5
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
    bar = scheduler.final_alpha_cumprod if following is None else scheduler.alphas_cumprod[following]
    return bar**0.5 * x_0 + (1 - bar) ** 0.5 * epsilon
