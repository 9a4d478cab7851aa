"""Samplers besides DDIM: diffusers' images with the same one, each of its own seed alone, and what does not suit."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionControlNetPipeline,
    UniPCMultistepScheduler,
)

from controlkit.bases.stable_diffusion import StableDiffusion
from controlkit.images import to_tensor
from controlkit.sampling.plan import ActiveControl
from controlkit.sampling.request import SAMPLERS
from controlkit.sampling.sampler import sample
from refusals import refused
from tiny import SD1_SCHEDULE

PROMPT = "red apple, noto style, on a blue background"
SEEDS = (3, 11)
THEIRS = {
    "dpm++": (DPMSolverMultistepScheduler, {}),
    "dpm++-karras": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "unipc": (UniPCMultistepScheduler, {}),
    "euler": (EulerDiscreteScheduler, {}),
}


def ours(base, sampler, uses=(), **changes):
    settings = {"prompt": PROMPT, "seeds": SEEDS, "steps": 6, "guidance": 4.0}
    return torch.cat(list(sample(base, uses=uses, sampler=sampler, **{**settings, **changes})))


def with_schedule(base, **schedule):
    parts = {name: getattr(base, name) for name in ("tokenizer", "text_encoder", "vae", "unet")}
    return StableDiffusion(name="another", scheduler_config={**base.scheduler_config, **schedule}, **parts)


@pytest.fixture
def use(tiny_base, tiny_control, condition_image):
    hint = tiny_control.encode(to_tensor([condition_image]), tiny_base)
    return ActiveControl(tiny_control, hint, weight=0.8, end=0.7)


@pytest.mark.parametrize(("sampler", "on"), [(name, "sd1") for name in THEIRS] + [("dpm++", "nano"), ("unipc", "nano")])
def test_images_are_those_of_diffusers_with_the_same_sampler(
    sampler, on, tiny_base, sd1_scheduled_base, tiny_control, use, condition_image
):
    base = tiny_base if on == "nano" else sd1_scheduled_base
    kind, settings = THEIRS[sampler]
    pipeline = StableDiffusionControlNetPipeline(
        vae=base.vae,
        text_encoder=base.text_encoder,
        tokenizer=base.tokenizer,
        unet=base.unet,
        controlnet=tiny_control.to_diffusers(),
        scheduler=kind.from_config(base.scheduler_config, **settings),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        [PROMPT] * len(SEEDS),
        image=to_tensor([condition_image]).expand(len(SEEDS), -1, -1, -1),
        num_inference_steps=6,
        guidance_scale=4.0,
        controlnet_conditioning_scale=0.8,
        control_guidance_end=0.7,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        output_type="pt",
    ).images
    drawn = ours(base, sampler, [use])
    assert (drawn - expected).abs().max() < 1e-3
    # Which says something only where samplers and controls differ by more.
    assert (drawn - ours(base, "ddim", [use])).abs().max() > 5e-3
    assert (drawn - ours(base, sampler)).abs().max() > 5e-3


@pytest.mark.parametrize("sampler", THEIRS)
@pytest.mark.parametrize("steps", [2, 7, 61, 103, 400])
def test_a_network_that_knows_the_image_draws_it(sampler, steps, sd1_scheduled_base):
    base = with_schedule(sd1_scheduled_base, prediction_type="sample", timestep_spacing="trailing")
    clean, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(steps))
    solver = base.schedule.solver(sampler, steps, "cpu", base.name)
    assert solver.timesteps.shape == (steps,) and solver.timesteps.min() >= 0
    assert (solver.timesteps.diff() <= 0).all()
    for _ in range(2):  # the second batch begins anew
        solver.begin()
        x_t = noise * solver.initial
        for index in range(steps):
            assert solver.input(x_t, index).shape == x_t.shape
            x_t = solver.step(clean, x_t, index)
        assert (x_t - clean).abs().max() < 1e-3


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_image_depends_on_its_own_seed_alone(sampler, sd1_scheduled_base, use):
    seeds = (5, 6, 7, 8, 9)
    together = ours(sd1_scheduled_base, sampler, [use], seeds=seeds)
    by_two = ours(sd1_scheduled_base, sampler, [use], seeds=seeds, batch_size=2)
    assert (together - by_two).abs().max() < 1e-4
    assert (together[3:4] - ours(sd1_scheduled_base, sampler, [use], seeds=[8])).abs().max() < 1e-4


@pytest.mark.parametrize("sampler", ["dpm++-karras", "euler"])
def test_a_schedule_that_ends_in_pure_noise_is_not_counted_in_its_ratio_to_the_signal(sampler, tiny_base):
    with refused("contradiction", "pure noise", "ddim", "dpm++", "unipc"):
        ours(tiny_base, sampler)


@pytest.mark.parametrize("sampler", ["euler", "unipc", "dpm++"])
def test_one_step_that_would_begin_without_noise_is_refused(sampler, sd1_scheduled_base):
    base = with_schedule(sd1_scheduled_base, timestep_spacing="linspace" if sampler == "euler" else "leading")
    with refused("out-of-range", "steps is 1", "time", "1000", "2 steps"):
        ours(base, sampler, steps=1)


def test_settings_that_a_folder_has_for_a_sampler_of_its_own_are_not_taken_over(sd1_scheduled_base):
    base = with_schedule(
        sd1_scheduled_base, use_karras_sigmas=True, algorithm_type="sde-dpmsolver++", solver_order=3, thresholding=False
    )
    assert SD1_SCHEDULE.items() <= base.scheduler_config.items()
    for sampler in ("dpm++", "unipc", "euler"):
        assert torch.equal(ours(base, sampler), ours(sd1_scheduled_base, sampler))
