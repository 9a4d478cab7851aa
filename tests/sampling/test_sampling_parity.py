"""Our images are diffusers' images, and an image depends on its own seed alone."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import StableDiffusionControlNetPipeline, StableDiffusionPipeline, UNet2DConditionModel
from parity import SEEDS, assert_same, ours, parts, theirs

from controlkit.bases.stable_diffusion import StableDiffusion
from controlkit.controls.encoder_copy.network import plain_config
from controlkit.controls.registry import find
from controlkit.images import to_tensor
from controlkit.sampling.generate import generate
from controlkit.sampling.plan import ActiveControl
from controlkit.sampling.request import GenerateRequest
from tiny import fresh_control, randomise_zero_convolutions


@pytest.fixture
def hint_image(condition_image):
    return to_tensor([condition_image])


@pytest.fixture(params=["nano's schedule, v", "SD 1's schedule, noise"])
def base(request, tiny_base, sd1_scheduled_base):
    return tiny_base if request.param.startswith("nano") else sd1_scheduled_base


def active(control, image, base, **settings):
    return ActiveControl(control, control.encode(image, base), **settings)


@pytest.mark.parametrize("guidance", [4.0, 1.0])
def test_without_control_equals_diffusers(base, guidance):
    pipeline = StableDiffusionPipeline(**parts(base))
    expected = theirs(pipeline, guidance_scale=guidance, height=base.size, width=base.size)
    assert_same(ours(base, guidance=guidance), expected, 1e-3)


@pytest.mark.parametrize(
    ("weight", "start", "end", "guidance"),
    [
        (1.0, 0.0, 1.0, 4.0),
        (0.6, 0.0, 1.0, 4.0),
        (1.0, 0.2, 0.6, 4.0),
        (1.0, 0.3, 0.9, 4.0),
        (1.0, 0.0, 1.0, 1.0),
    ],
)
def test_controlnet_equals_diffusers(base, tiny_control, hint_image, weight, start, end, guidance):
    pipeline = StableDiffusionControlNetPipeline(**parts(base), controlnet=tiny_control.to_diffusers())
    expected = theirs(
        pipeline,
        image=hint_image.expand(len(SEEDS), -1, -1, -1),
        controlnet_conditioning_scale=weight,
        control_guidance_start=start,
        control_guidance_end=end,
        guidance_scale=guidance,
    )
    use = active(tiny_control, hint_image, base, weight=weight, start=start, end=end)
    result = ours(base, [use], guidance=guidance)
    assert_same(result, expected, 1e-3)
    # The comparison means something only if the control changes the image by much more than the tolerance.
    assert (result - ours(base, guidance=guidance)).abs().max() > 2e-2


def test_two_controlnets_equal_diffusers(tiny_base, tiny_control, hint_image):
    other = randomise_zero_convolutions(fresh_control(tiny_base), seed=2)
    flipped = hint_image.flip(-1)
    pipeline = StableDiffusionControlNetPipeline(
        **parts(tiny_base), controlnet=[tiny_control.to_diffusers(), other.to_diffusers()]
    )
    expected = theirs(
        pipeline,
        image=[hint_image.expand(len(SEEDS), -1, -1, -1), flipped.expand(len(SEEDS), -1, -1, -1)],
        controlnet_conditioning_scale=[0.7, 0.4],
        control_guidance_start=[0.0, 0.4],
        control_guidance_end=[0.8, 1.0],
    )
    uses = [
        active(tiny_control, hint_image, tiny_base, weight=0.7, end=0.8),
        active(other, flipped, tiny_base, weight=0.4, start=0.4),
    ]
    assert_same(ours(tiny_base, uses), expected, 1e-3)


def test_one_by_one_equals_in_a_batch(base, tiny_control, hint_image):
    seeds = (5, 6, 7, 8, 9)
    use = active(tiny_control, hint_image, base)
    together = ours(base, [use], seeds=seeds)
    assert_same(together, ours(base, [use], seeds=seeds, batch_size=2), 1e-4)
    alone = torch.cat([ours(base, [use], seeds=[seed]) for seed in seeds])
    assert_same(together, alone, 1e-4)
    assert_same(together.flip(0), ours(base, [use], seeds=seeds[::-1]), 1e-4)


def test_images_are_in_range_and_of_the_size_asked_for(tiny_base):
    result = ours(tiny_base, width=72, height=48)
    assert result.shape == (2, 3, 48, 72)
    assert result.min() >= 0 and result.max() <= 1


def test_a_new_controlnet_changes_nothing_at_all(tiny_base, hint_image):
    new = fresh_control(tiny_base)
    assert torch.equal(ours(tiny_base, [active(new, hint_image, tiny_base)]), ours(tiny_base))


def test_weight_zero_is_no_control(tiny_base, tiny_control, hint_image):
    use = active(tiny_control, hint_image, tiny_base, weight=0.0)
    assert torch.equal(ours(tiny_base, [use]), ours(tiny_base))


def test_a_span_without_a_whole_step_is_no_control(tiny_base, tiny_control, hint_image):
    use = active(tiny_control, hint_image, tiny_base, start=0.25, end=0.35)
    assert torch.equal(ours(tiny_base, [use]), ours(tiny_base))


@pytest.fixture
def distilled(sd1_scheduled_base):
    """A base whose UNet embeds the guidance scale."""
    base = sd1_scheduled_base
    torch.manual_seed(4)
    unet = UNet2DConditionModel.from_config({**plain_config(base.unet), "time_cond_proj_dim": 8})
    with torch.no_grad():  # zero in a new one
        torch.nn.init.normal_(unet.time_embedding.cond_proj.weight, std=0.3)
    return StableDiffusion(
        name="distilled",
        tokenizer=base.tokenizer,
        text_encoder=base.text_encoder,
        vae=base.vae,
        unet=unet,
        scheduler_config=base.scheduler_config,
    )


def test_a_unet_that_reads_the_guidance_scale(distilled):
    made = []
    for guidance in (1.0, 4.0, 8.0):
        expected = theirs(StableDiffusionPipeline(**parts(distilled)), guidance_scale=guidance, height=64, width=64)
        made.append(ours(distilled, guidance=guidance))
        assert_same(made[-1], expected, 1e-3)
    assert (made[0] - made[2]).abs().max() > 1e-2
    x_t, t, text = torch.randn(1, 4, 16, 16), torch.tensor([300]), distilled.encode_text(["red apple"])
    assert torch.equal(
        distilled.predict(x_t, t, text), distilled.predict(x_t, t, distilled.guided(text, distilled.default_guidance))
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_guidance_scale_is_embedded_in_float32(distilled, dtype):
    """1000 times the scale are angles: 7.3 in bfloat16 is 7.3125."""
    exact = distilled._guidance_embedding(distilled.guided(distilled.encode_text(["a"]), 7.3))
    halved = copy.deepcopy(distilled).to(dtype=dtype)
    made = halved._guidance_embedding(halved.guided(halved.encode_text(["a"]), 7.3))
    assert made.dtype == dtype and torch.allclose(made.float(), exact, atol=5e-3)


COPIES = (
    "controlnet",
    "controlnet-precomputed",
    "uni-controlnet-local",
    "unicontrol",
    "controlnet-union",
    "ctrlora-base",
)


@pytest.mark.parametrize("system", COPIES)
def test_a_copy_of_such_a_unet_does_not_read_it(distilled, system):
    before = distilled.fingerprint
    control = find(system).for_base(distilled)
    assert not any("cond_proj" in name for name in control.file_state())
    assert distilled.unet.time_embedding.cond_proj is not None and distilled.fingerprint == before


def test_what_such_a_unet_does_not_read_is_told(distilled):
    request = GenerateRequest(prompt="red apple", negative_prompt="cat face", steps=2)
    assert any("no branch for a negative prompt" in note for note in generate(request, base=distilled).notes)
