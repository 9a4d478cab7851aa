"""Samplers besides DDIM: diffusers' images with the same one, each of its own seed alone, and what does not suit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionControlNetPipeline,
    UniPCMultistepScheduler,
)

from controlkit.bases.stable_diffusion import StableDiffusion
from controlkit.images import to_tensor
from controlkit.sampling.plan import ActiveControl
from controlkit.sampling.request import SAMPLERS, GenerateRequest
from controlkit.sampling.sampler import sample
from refusals import refused
from tiny import SD1_SCHEDULE

PROMPT = "red apple, noto style, on a blue background"
SEEDS = (3, 11)
KARRAS = {"use_karras_sigmas": True}
SDE = {"algorithm_type": "sde-dpmsolver++"}
THEIRS = {
    "dpm++": (DPMSolverMultistepScheduler, {}),
    "dpm++-karras": (DPMSolverMultistepScheduler, KARRAS),
    "dpm++-2m-sde": (DPMSolverMultistepScheduler, SDE),
    "dpm++-2m-sde-karras": (DPMSolverMultistepScheduler, {**SDE, **KARRAS}),
    "unipc": (UniPCMultistepScheduler, {}),
    "plms": (PNDMScheduler, {"skip_prk_steps": True}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler-karras": (EulerDiscreteScheduler, KARRAS),
    "euler-a": (EulerAncestralDiscreteScheduler, {}),
    "heun": (HeunDiscreteScheduler, {}),
    "heun-karras": (HeunDiscreteScheduler, KARRAS),
    "dpm2": (KDPM2DiscreteScheduler, {}),
    "dpm2-karras": (KDPM2DiscreteScheduler, KARRAS),
    "dpm2-a": (KDPM2AncestralDiscreteScheduler, {}),
    "dpm2-a-karras": (KDPM2AncestralDiscreteScheduler, KARRAS),
    "ddpm": (DDPMScheduler, {}),
    "lcm": (LCMScheduler, {}),
}
"""Every sampler but `ddim`: diffusers' class, and its settings."""
FOR_NANO = ("dpm++", "dpm++-2m-sde", "unipc", "ddpm", "lcm")
TWICE = ("heun", "heun-karras", "dpm2", "dpm2-karras", "dpm2-a", "dpm2-a-karras")
"""Samplers of two predictions per step."""
NOT_OF_CLEAN_LATENTS = ("euler-a", "plms", *TWICE)


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


@pytest.mark.parametrize(("sampler", "on"), [(name, "sd1") for name in THEIRS] + [(name, "nano") for name in FOR_NANO])
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


@pytest.mark.parametrize("sampler", [name for name in THEIRS if name not in NOT_OF_CLEAN_LATENTS])
@pytest.mark.parametrize("steps", [2, 7, 61, 103, 400])
def test_a_network_that_knows_the_image_draws_it(sampler, steps, sd1_scheduled_base):
    base = with_schedule(sd1_scheduled_base, prediction_type="sample", timestep_spacing="trailing")
    clean, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(steps))
    if sampler == "lcm" and steps > 50:
        with refused("out-of-range", steps):
            base.schedule.solver(sampler, steps, "cpu", base.name)
        return
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


@pytest.mark.parametrize("sampler", [name for name in THEIRS if name not in FOR_NANO])
def test_a_schedule_that_ends_in_pure_noise_is_not_counted_in_its_ratio_to_the_signal(sampler, tiny_base):
    with refused("contradiction", "pure noise", "ddim", "dpm++", "unipc"):
        ours(tiny_base, sampler)


@pytest.mark.parametrize("sampler", ["euler", "unipc", "dpm++"])
def test_one_step_that_would_begin_without_noise_is_refused(sampler, sd1_scheduled_base):
    base = with_schedule(sd1_scheduled_base, timestep_spacing="linspace" if sampler == "euler" else "leading")
    with refused("out-of-range", "steps is 1", "time", "1000", "2 steps"):
        ours(base, sampler, steps=1)


@pytest.mark.parametrize("sampler", NOT_OF_CLEAN_LATENTS)
def test_a_prediction_that_a_sampler_cannot_take_is_refused(sampler, sd1_scheduled_base):
    with refused("contradiction", sampler, "clean latents", "ddim"):
        ours(with_schedule(sd1_scheduled_base, prediction_type="sample"), sampler)


@pytest.mark.parametrize("sampler", NOT_OF_CLEAN_LATENTS)
@pytest.mark.parametrize("steps", [2, 7, 61, 103])
def test_a_network_that_knows_the_noise_removes_it(sampler, steps, sd1_scheduled_base):
    """Of noise times sigma plus one image, for the samplers that take no prediction of that image."""
    base = with_schedule(sd1_scheduled_base, timestep_spacing="linspace")
    clean, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(steps))
    if sampler == "plms" and steps == 2:
        with refused("out-of-range", "steps is 2", 501):
            base.schedule.solver(sampler, steps, "cpu", base.name)
        return
    solver = base.schedule.solver(sampler, steps, "cpu", base.name)
    assert len(solver.timesteps) == (steps + 1 if sampler == "plms" else 2 * steps - 1 if sampler in TWICE else steps)
    alphas = base.schedule._scheduler.alphas_cumprod
    for _ in range(2):
        solver.begin(0, [torch.Generator().manual_seed(1)])
        start = alphas[int(solver.timesteps[0])]
        # Where the initial latents are larger than 1, they are in units of signal 1.
        x_t = noise * solver.initial + clean * (1 if solver.initial > 2 else start**0.5)
        for index, t in enumerate(solver.timesteps):
            alpha_bar = torch.tensor(np.interp(float(t), np.arange(1000), np.log(alphas.numpy()))).exp().float()
            seen = solver.input(x_t, index)
            x_t = solver.step((seen - alpha_bar**0.5 * clean) / (1 - alpha_bar) ** 0.5, x_t, index)
        assert (x_t - clean).abs().max() < 0.05 * clean.abs().max()


@pytest.mark.parametrize(
    ("known_as", "sampler"),
    [
        ("euler_a", "euler-a"),
        ("Euler a", "euler-a"),
        ("k_euler_ancestral", "euler-a"),
        ("DPM++ 2M", "dpm++"),
        ("DPM++ 2M Karras", "dpm++-karras"),
        ("dpmpp_2m", "dpm++"),
        ("dpmpp_2m_sde", "dpm++-2m-sde"),
        ("dpm++ 2m sde karras", "dpm++-2m-sde-karras"),
        ("dpm_2_ancestral", "dpm2-a"),
        ("DPM2 a Karras", "dpm2-a-karras"),
        ("uni_pc", "unipc"),
        ("LCM", "lcm"),
        ("PNDMScheduler", "plms"),
        ("KDPM2AncestralDiscreteScheduler", "dpm2-a"),
        ("EulerDiscreteScheduler", "euler"),
        *((name, name) for name in SAMPLERS),
    ],
)
def test_samplers_are_known_by_the_names_of_other_tools(known_as, sampler):
    assert GenerateRequest(prompt="", sampler=known_as).sampler == sampler


@pytest.mark.parametrize(
    ("name", "instead"), [("DPM++ SDE", "dpm++-2m-sde"), ("dpmpp_3m_sde", "dpm++-2m-sde"), ("LMS Karras", "dpm++")]
)
def test_samplers_that_do_not_exist_here_are_refused_with_the_closest(name, instead):
    with refused("unknown-name", name, instead):
        GenerateRequest(prompt="", sampler=name)


def test_a_sampler_without_karras_spacing_is_not_given_it():
    with refused("unknown-name", "ddim karras", "use ddim"):
        GenerateRequest(prompt="", sampler="ddim karras")


def test_settings_that_a_folder_has_for_a_sampler_of_its_own_are_not_taken_over(sd1_scheduled_base):
    base = with_schedule(
        sd1_scheduled_base, use_karras_sigmas=True, algorithm_type="sde-dpmsolver++", solver_order=3, thresholding=False
    )
    assert SD1_SCHEDULE.items() <= base.scheduler_config.items()
    for sampler in ("dpm++", "unipc", "euler"):
        assert torch.equal(ours(base, sampler), ours(sd1_scheduled_base, sampler))
