"""img2img and inpainting equal diffusers' pipelines, with and without a control."""

from __future__ import annotations

import copy
import dataclasses
import inspect

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    QwenImageImg2ImgPipeline,
    QwenImageInpaintPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    ZImageImg2ImgPipeline,
    ZImageInpaintPipeline,
)
from fake_control import FakeControl
from parity import SEEDS, assert_same, ours, parts, theirs

import tiny
from controlkit.bases.stable_diffusion import StableDiffusion
from controlkit.controls.control import Reads
from controlkit.images import to_tensor
from controlkit.sampling.plan import ActiveControl
from controlkit.sampling.residual_cache import ResidualCache
from controlkit.sampling.start_image import StartImage
from refusals import refused

STEPS = 5


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    """A smooth random image, uint8 [64, 64, 3]."""
    small = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(4))
    large = torch.nn.functional.interpolate(small, (64, 64), mode="bicubic").clamp(0, 1)
    return (large[0].permute(1, 2, 0) * 255).byte().numpy()


@pytest.fixture(scope="module")
def mask() -> torch.Tensor:
    """White right of the middle, and grey levels of both sides of one half above it, [1, 1, 64, 64]."""
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 34:] = 1
    mask[..., :16, :] = 0.3
    mask[..., :16, 20:40] = 0.7
    return mask


@pytest.fixture(scope="module")
def inpainting_base(tiny_base):
    """The tiny base with a UNet of 9 input channels."""
    torch.manual_seed(3)
    unet = UNet2DConditionModel.from_config({**tiny_base.unet.config, "in_channels": 9})
    return StableDiffusion(
        name="tiny-inpainting",
        tokenizer=tiny_base.tokenizer,
        text_encoder=tiny_base.text_encoder,
        vae=tiny_base.vae,
        unet=unet,
        scheduler_config=tiny.SD1_SCHEDULE,
    )


def start(photo, strength, mask=None):
    return StartImage(pixels=to_tensor([photo]) * 2 - 1, strength=strength, mask=mask)


def batch(photo):
    return to_tensor([photo]).expand(len(SEEDS), -1, -1, -1)


@pytest.mark.parametrize("strength", [0.3, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("schedule", ["v", "noise"])
def test_img2img_equals_diffusers(tiny_base, sd1_scheduled_base, photo, strength, schedule):
    base = tiny_base if schedule == "v" else sd1_scheduled_base
    expected = theirs(StableDiffusionImg2ImgPipeline(**parts(base)), image=batch(photo), strength=strength)
    result = ours(base, start=start(photo, strength))
    assert_same(result, expected, 1e-3)
    assert (result - ours(base)).abs().max() > 1e-2


SOLVERS = {
    "dpm++": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}),
    "dpm++-karras": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True}),
    "unipc": (UniPCMultistepScheduler, {}),
    "euler": (EulerDiscreteScheduler, {}),
    "dpm++-2m-sde": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "plms": (PNDMScheduler, {"skip_prk_steps": True}),
    "euler-a": (EulerAncestralDiscreteScheduler, {}),
    "heun": (HeunDiscreteScheduler, {}),
    "dpm2": (KDPM2DiscreteScheduler, {}),
    "dpm2-a": (KDPM2AncestralDiscreteScheduler, {}),
    "ddpm": (DDPMScheduler, {}),
    "lcm": (LCMScheduler, {}),
}


@pytest.mark.parametrize("sampler", SOLVERS)
@pytest.mark.parametrize("masked", [False, True])
def test_every_solver_starts_and_keeps_latents_as_diffusers(sd1_scheduled_base, photo, mask, sampler, masked):
    base = sd1_scheduled_base
    kind, settings = SOLVERS[sampler]
    settings |= {"final_sigmas_type": "zero"} if "dpm" in sampler else {}
    pipeline = (StableDiffusionInpaintPipeline if masked else StableDiffusionImg2ImgPipeline)(
        **{**parts(base), "scheduler": kind.from_config({**base.scheduler_config, **settings})}
    )
    more = {"mask_image": mask, "height": 64, "width": 64} if masked else {}
    expected = theirs(
        pipeline, image=batch(photo), strength=0.7, num_inference_steps=8, **without_eta(pipeline), **more
    )
    result = ours(base, sampler=sampler, steps=8, start=start(photo, 0.7, mask if masked else None))
    assert_same(result, expected, 1e-3)


def without_eta(pipeline):
    return {"eta": 0.0} if "eta" in inspect.signature(pipeline.__call__).parameters else {}


@pytest.mark.parametrize("strength", [0.5, 0.8, 1.0])
@pytest.mark.parametrize("channels", [4, 9])
def test_inpainting_equals_diffusers(sd1_scheduled_base, inpainting_base, photo, mask, strength, channels):
    base = sd1_scheduled_base if channels == 4 else inpainting_base
    expected = theirs(
        StableDiffusionInpaintPipeline(**parts(base)),
        image=batch(photo),
        mask_image=mask.expand(len(SEEDS), -1, -1, -1),
        strength=strength,
        height=64,
        width=64,
    )
    result = ours(base, start=start(photo, strength, mask))
    assert_same(result, expected, 1e-3)
    assert (result - ours(base, start=start(photo, strength, 1 - mask))).abs().max() > 1e-2


@pytest.mark.parametrize(("begin", "end"), [(0.0, 1.0), (0.0, 0.6), (0.3, 1.0)])
def test_a_control_of_img2img_acts_as_in_diffusers(
    sd1_scheduled_base, tiny_control, photo, condition_image, begin, end
):
    """Its start and end are fractions of the steps that run: of 3 here, not of 5."""
    base, hint = sd1_scheduled_base, to_tensor([condition_image])
    expected = theirs(
        StableDiffusionControlNetImg2ImgPipeline(**parts(base), controlnet=tiny_control.to_diffusers()),
        image=batch(photo),
        control_image=hint.expand(len(SEEDS), -1, -1, -1),
        strength=0.61,
        control_guidance_start=begin,
        control_guidance_end=end,
        controlnet_conditioning_scale=0.9,
    )
    use = ActiveControl(tiny_control, tiny_control.encode(hint, base), weight=0.9, start=begin, end=end)
    result = ours(base, [use], start=start(photo, 0.61))
    assert_same(result, expected, 1e-3)
    assert (result - ours(base, start=start(photo, 0.61))).abs().max() > 1e-2


@pytest.mark.parametrize("channels", [4, 9])
@pytest.mark.parametrize("strength", [0.7, 1.0])
def test_a_control_of_inpainting_acts_as_in_diffusers(
    sd1_scheduled_base, inpainting_base, tiny_control, photo, mask, condition_image, channels, strength
):
    """A control for 4 channels acts on an inpainting model, too."""
    base = sd1_scheduled_base if channels == 4 else inpainting_base
    hint = to_tensor([condition_image])
    expected = theirs(
        StableDiffusionControlNetInpaintPipeline(**parts(base), controlnet=tiny_control.to_diffusers()),
        image=batch(photo),
        mask_image=mask.expand(len(SEEDS), -1, -1, -1),
        control_image=hint.expand(len(SEEDS), -1, -1, -1),
        strength=strength,
        controlnet_conditioning_scale=1.0,
        control_guidance_end=0.7,
        height=64,
        width=64,
    )
    assert tiny_control.incompatibility(base) is None
    use = ActiveControl(tiny_control, tiny_control.encode(hint, base), end=0.7)
    result = ours(base, [use], start=start(photo, strength, mask))
    assert_same(result, expected, 1e-3)
    assert (result - ours(base, start=start(photo, strength, mask))).abs().max() > 1e-3


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_stable_diffusion_xl_equals_diffusers(photo, mask, masked, strength):
    base = tiny.build_tiny_sdxl()
    pipeline = (StableDiffusionXLInpaintPipeline if masked else StableDiffusionXLImg2ImgPipeline)(
        **{name: getattr(base, name) for name in ("vae", "text_encoder", "text_encoder_2", "unet")},
        tokenizer=base.tokenizer,
        tokenizer_2=base.tokenizer_2,
        scheduler=DDIMScheduler.from_config(base.scheduler_config),
    )
    more = {"mask_image": mask.expand(len(SEEDS), -1, -1, -1), "height": 64, "width": 64} if masked else {}
    expected = theirs(
        pipeline, image=batch(photo), strength=strength, original_size=(64, 64), target_size=(64, 64), **more
    )
    assert_same(ours(base, start=start(photo, strength, mask if masked else None)), expected, 1e-3)


@pytest.mark.parametrize("strength", [0.5, 0.75, 1.0])
@pytest.mark.parametrize("masked", [False, True])
def test_stable_diffusion_3_equals_diffusers(photo, mask, strength, masked):
    # diffusers' inpainting pipeline is for 16 latent channels.
    base = build_sd3_of_16_channels()
    names = ("vae", "transformer", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    pipeline = (StableDiffusion3InpaintPipeline if masked else StableDiffusion3Img2ImgPipeline)(
        **{name: getattr(base, name) for name in names},
        text_encoder_3=None,
        tokenizer_3=None,
        scheduler=FlowMatchEulerDiscreteScheduler.from_config(base.scheduler_config),
    )
    pipeline.set_progress_bar_config(disable=True)
    more = {"mask_image": mask.expand(len(SEEDS), -1, -1, -1)} if masked else {}
    # diffusers' inpainting pipeline decodes without the shift of the latents; its latents are compared.
    latents = pipeline(
        ["red apple"] * len(SEEDS),
        negative_prompt=["cat face"] * len(SEEDS),
        image=batch(photo),
        strength=strength,
        height=64,
        width=64,
        num_inference_steps=STEPS,
        guidance_scale=4.0,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        output_type="latent",
        **more,
    ).images
    result = ours(base, prompt="red apple", start=start(photo, strength, mask if masked else None))
    assert_same(result, (base.decode(latents) + 1) / 2, 1e-3)


FLUX = (tiny.build_tiny_flux, FluxImg2ImgPipeline, FluxInpaintPipeline, {"guidance_scale": 4.0})
Z_IMAGE = (
    tiny.build_tiny_z_image,
    ZImageImg2ImgPipeline,
    ZImageInpaintPipeline,
    {"guidance_scale": 3.0, "negative_prompt": ["cat face"] * len(SEEDS)},  # which counts 1 less
)


QWEN_IMAGE = (
    tiny.build_tiny_qwen_image,
    QwenImageImg2ImgPipeline,
    QwenImageInpaintPipeline,
    {"true_cfg_scale": 4.0, "negative_prompt": ["cat face"] * len(SEEDS)},
)


@pytest.mark.parametrize("strength", [0.5, 0.75, 1.0])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("build", "plain", "inpainting", "settings"),
    [FLUX, Z_IMAGE, QWEN_IMAGE],
    ids=["flux", "z-image", "qwen-image"],
)
def test_other_transformers_equal_diffusers(photo, mask, strength, masked, build, plain, inpainting, settings):
    base = build()
    pipeline = (inpainting if masked else plain)(**tiny.parts_of(base))
    pipeline.set_progress_bar_config(disable=True)
    more = {"mask_image": mask.expand(len(SEEDS), -1, -1, -1)} if masked else {}
    expected = pipeline(
        ["red apple"] * len(SEEDS),
        image=batch(photo),
        strength=strength,
        height=64,
        width=64,
        num_inference_steps=STEPS,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        output_type="pt",
        **copy.deepcopy(settings),  # the pipeline changes the list of prompts
        **more,
    ).images
    result = ours(base, prompt="red apple", guidance=4.0, start=start(photo, strength, mask if masked else None))
    assert_same(result, expected, 1e-3)


def build_sd3_of_16_channels():
    sizes = tiny.SD3_PARTS["transformer"] | {"in_channels": 16, "out_channels": 16}
    changed = {**tiny.SD3_PARTS, "transformer": sizes, "vae": {**tiny.SD3_PARTS["vae"], "latent_channels": 16}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "SD3_PARTS", changed)
        return tiny.build_tiny_sd3(t5=False)


@pytest.mark.parametrize("reads", [Reads.TIME | Reads.TEXT, Reads.TIME, Reads.TEXT, Reads.NOTHING])
@pytest.mark.parametrize("masked", [False, True])
def test_a_plan_ahead_equals_every_step(tiny_base, photo, mask, condition_image, reads, masked):
    hint = to_tensor([condition_image])
    begun = start(photo, 0.55, mask if masked else None)

    def drawn(control, cache=None, **changes):
        use = ActiveControl(control, control.encode(hint, tiny_base), weight=0.7, start=0.2, end=0.8)
        return ours(tiny_base, [use], steps=10, start=begun, cache=cache, **changes)

    eager = FakeControl(reads).pretending_to_read(reads | Reads.NOISE)
    ahead, cache = FakeControl(reads), ResidualCache()
    expected = drawn(eager)
    assert (drawn(ahead, cache) - expected).abs().max() <= 1e-5
    assert sum(ahead.batches) < sum(eager.batches)
    assert (drawn(ahead, cache, batch_size=1) - expected).abs().max() <= 1e-4
    # Of 10 steps 5 run, of which steps 1, 2 and 3 lie within its span.
    assert len(eager.batches) == 3
    # The same times of the whole schedule, which another call has put into the cache.
    count = sum(ahead.batches)
    begun = dataclasses.replace(begun, strength=1.0)
    use = ActiveControl(ahead, ahead.encode(hint, tiny_base), weight=0.7)
    whole = ours(tiny_base, [use], steps=10, start=begun, cache=cache)
    assert torch.equal(whole, ours(tiny_base, [use], steps=10, start=begun, cache=None))
    assert sum(ahead.batches) > count or not reads


def test_an_image_depends_on_its_own_seed_only(inpainting_base, sd1_scheduled_base, photo, mask):
    for base in (inpainting_base, sd1_scheduled_base):
        together = ours(base, seeds=(3, 11, 5), start=start(photo, 0.7, mask))
        assert_same(together[1:2], ours(base, seeds=(11,), start=start(photo, 0.7, mask)), 1e-4)
        assert_same(together, ours(base, seeds=(3, 11, 5), start=start(photo, 0.7, mask), batch_size=2), 1e-4)


def test_latents_outside_the_mask_are_those_of_the_image(tiny_base, photo):
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., :32] = 1
    made, kept = [], tiny_base.decode

    class Watched(StartImage):
        def begin(self, *args):
            made.append(super().begin(*args))
            return made[-1]

    last = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_base, "decode", lambda z: last.append(z) or kept(z), raising=False)
        ours(tiny_base, start=Watched(pixels=to_tensor([photo]) * 2 - 1, strength=1.0, mask=mask))
    assert torch.equal(last[0][..., 8:], made[0].z[..., 8:])
    assert (last[0][..., :8] - made[0].z[..., :8]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("strength", "steps", "facts"), [(0.19, 5, ["0.19", "5 steps"]), (0.001, 20, ["0.001", "20 steps"])]
)
def test_a_strength_that_leaves_no_step_is_refused(sd1_scheduled_base, photo, strength, steps, facts):
    with refused("out-of-range", *facts):
        ours(sd1_scheduled_base, steps=steps, start=start(photo, strength))


def test_a_mask_that_covers_nothing_is_refused(tiny_base, photo):
    thin = torch.zeros(1, 1, 64, 64)
    thin[..., 1] = 1  # between the positions of the latents, which are 4 pixels apart
    for mask in (torch.zeros(1, 1, 64, 64), thin):
        with refused("out-of-range", "mask", "4 pixels"):
            ours(tiny_base, start=start(photo, 1.0, mask))


def test_an_inpainting_model_needs_an_image_and_a_mask(inpainting_base, photo):
    for begun in (None, start(photo, 0.5)):
        with refused("missing-setting", "tiny-inpainting", "--image", "--mask"):
            ours(inpainting_base, start=begun)
    text = inpainting_base.encode_text(["red apple"])
    with refused("unsupported", "tiny-inpainting", "inpainting"):
        inpainting_base.predict(torch.zeros(1, 4, 16, 16), torch.tensor([5]), text)
    with refused("unsupported", "tiny-inpainting", "training"):
        inpainting_base.check_text_to_image("training")


BUILT_IN = list(tiny.unet_systems().values())


@pytest.mark.parametrize("kind", BUILT_IN, ids=lambda kind: kind.kind)
def test_every_system_acts_on_an_inpainting_model_or_says_why_not(
    kind, tiny_base, inpainting_base, photo, mask, condition_image
):
    """Controls are made for the text-to-image model that it comes from."""
    torch.manual_seed(0)
    options = {"size_ratio": 0.5} if kind.kind == "controlnet-xs" else {}  # the tiny base divides no smaller
    control = kind.for_base(tiny_base, **options)
    with torch.no_grad():
        for parameter in control.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    if len(control.conditions) > 1:
        control = control.for_condition(control.conditions[0])
    assert (control.incompatibility(inpainting_base) is None) == (control.incompatibility(tiny_base) is None)
    use = ActiveControl(control, tiny.any_hint(control, to_tensor([condition_image]), inpainting_base))
    begun = start(photo, 0.7, mask)
    made = ours(inpainting_base, [use], start=begun)
    assert made.isfinite().all()
    assert (made - ours(inpainting_base, start=begun)).abs().max() > 1e-4
