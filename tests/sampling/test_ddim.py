"""The times of a schedule and the step between two of them, for numbers of steps that divide 1000 and others."""

from __future__ import annotations

import itertools

import pytest
import torch
from diffusers import DDIMScheduler

from controlkit.bases.schedules.ddim import ddim_step, times_of
from controlkit.sampling.sampler import initial_noise, sample
from refusals import refused
from tiny import SD1_SCHEDULE


def scheduler(**changes) -> DDIMScheduler:
    return DDIMScheduler.from_config({**SD1_SCHEDULE, **changes})


def follow(schedule, times, x_t, clean, prediction):
    """`x_t` after all steps, if the network knows the clean latents."""
    times = [*times.tolist(), None]
    for t, following in itertools.pairwise(times):
        bar = schedule.alphas_cumprod[t]
        noise = (x_t - bar**0.5 * clean) / (1 - bar) ** 0.5
        told = {"epsilon": noise, "sample": clean, "v_prediction": bar**0.5 * noise - (1 - bar) ** 0.5 * clean}
        x_t = ddim_step(schedule, told[prediction], x_t, t, following)
    return x_t


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["trailing", "linspace", "leading"])
@pytest.mark.parametrize("steps", [7, 30, 60, 61, 350, 600])
def test_a_network_that_knows_the_image_draws_it_with_no_noise_left(steps, spacing, prediction):
    schedule = scheduler(timestep_spacing=spacing, prediction_type=prediction, set_alpha_to_one=True)
    generator = torch.Generator().manual_seed(steps)
    clean, noise = torch.randn(2, 1, 4, 4, 4, generator=generator)
    times = times_of(schedule, steps)
    bar = schedule.alphas_cumprod[times[0]]
    drawn = follow(schedule, times, bar**0.5 * clean + (1 - bar) ** 0.5 * noise, clean, prediction)
    assert (drawn - clean).abs().max() < 1e-3


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(("spacing", "steps"), [("trailing", 20), ("trailing", 125), ("leading", 20), ("leading", 30)])
def test_where_diffusers_is_right_it_is_diffusers(spacing, steps, prediction):
    schedule = scheduler(timestep_spacing=spacing, prediction_type=prediction)
    schedule.set_timesteps(steps)
    times = times_of(schedule, steps)
    assert torch.equal(times, schedule.timesteps)
    x_t, made = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for t, following in zip(times.tolist(), [*times.tolist()[1:], None], strict=True):
        assert torch.equal(
            ddim_step(schedule, made, x_t, t, following), schedule.step(made, torch.tensor(t), x_t).prev_sample
        )


def test_a_schedule_that_thresholds_is_thresholded():
    schedule = scheduler(thresholding=True)
    schedule.set_timesteps(20)
    x_t, made = 3 * torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ddim_step(schedule, made, x_t, 501, 451), schedule.step(made, 501, x_t).prev_sample)


@pytest.mark.parametrize("spacing", ["trailing", "linspace", "leading"])
def test_every_number_of_steps_has_as_many_times_falling_from_near_the_top(spacing):
    schedule = scheduler(timestep_spacing=spacing)
    for steps in range(2, 1001):
        times = times_of(schedule, steps)
        assert len(times) == steps and times.min() >= 0 and times.max() <= 999
        assert (times.diff() <= 0).all()
        # With whole strides the last stretch before the top is a stride; no other noise is left out.
        assert times[0] >= 899 - 1000 // steps, steps


def test_one_step_that_would_begin_without_noise_is_refused(sd1_scheduled_base, tiny_base):
    with refused("out-of-range", "steps is 1", "time 1 of 1000", "2 steps"):
        next(sample(sd1_scheduled_base, prompt="red apple", seeds=[0], steps=1))
    assert len(next(sample(tiny_base, prompt="red apple", seeds=[0], steps=1))) == 1


def test_images_of_a_number_that_does_not_divide_1000_follow_the_equations(tiny_base):
    """Eq. 12 with times and alpha bar computed here; the base predicts v on nano's cosine schedule."""
    steps = 30
    u = torch.arange(1001, dtype=torch.float64) / 1000
    f = torch.cos((u + 0.008) / 1.008 * torch.pi / 2) ** 2
    bars = torch.cumprod(1 - (1 - f[1:] / f[:-1]).clamp(max=0.999), 0)
    times = [round(1000 - k * 1000 / steps) - 1 for k in range(steps)]
    x_t = initial_noise(tiny_base, [3], 64, 64)
    text = tiny_base.encode_text(["red apple"])
    for number, t in enumerate(times):
        with torch.no_grad():
            v = tiny_base.predict(x_t, torch.tensor(t), text)
        bar = bars[t].item()
        below = bars[times[number + 1]].item() if number + 1 < steps else 1.0
        clean = bar**0.5 * x_t - (1 - bar) ** 0.5 * v
        noise = bar**0.5 * v + (1 - bar) ** 0.5 * x_t
        x_t = below**0.5 * clean + (1 - below) ** 0.5 * noise
    expected = (tiny_base.decode(x_t) + 1) / 2
    (drawn,) = sample(tiny_base, prompt="red apple", seeds=[3], steps=steps, guidance=1.0)
    assert (drawn - expected).abs().max() < 1e-3
