"""Sizes whose latents the UNet cannot halve evenly: diffusers draws them, and so does every control here."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionControlNetPipeline, StableDiffusionPipeline
from parity import parts

import tiny
from controlkit.controls.apply import predict_under
from controlkit.controls.ctrlora import BaseControlNet, CtrLoRA
from controlkit.errors import UserError
from controlkit.images import to_tensor
from controlkit.sampling.generate import generate
from controlkit.sampling.plan import ActiveControl
from controlkit.sampling.request import GenerateRequest
from controlkit.sampling.sampler import sample
from controlkit.sampling.uses import ControlUse

WIDTH, HEIGHT = 68, 52
"""Latents of 17 x 13 at the tiny base's factor of 4."""


def test_images_of_odd_latents_are_those_of_diffusers(sd1_scheduled_base, tiny_control):
    base = sd1_scheduled_base
    image = torch.rand(1, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))
    pipeline = StableDiffusionControlNetPipeline(
        vae=base.vae,
        text_encoder=base.text_encoder,
        tokenizer=base.tokenizer,
        unet=base.unet,
        controlnet=tiny_control.to_diffusers(),
        scheduler=DDIMScheduler.from_config(base.scheduler_config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        "red apple",
        image=image,
        width=WIDTH,
        height=HEIGHT,
        num_inference_steps=4,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(3),
        output_type="pt",
    ).images
    use = ActiveControl(tiny_control, tiny_control.encode(image, base))
    (drawn,) = sample(
        base, prompt="red apple", seeds=[3], uses=[use], steps=4, guidance=4.0, width=WIDTH, height=HEIGHT
    )
    assert drawn.shape == (1, 3, HEIGHT, WIDTH)
    assert (drawn - expected).abs().max() < 1e-3


def test_tiled_decoding_is_that_of_diffusers(sd1_scheduled_base):
    base = sd1_scheduled_base
    pipeline = StableDiffusionPipeline(**parts(base))
    pipeline.set_progress_bar_config(disable=True)

    def theirs():
        return pipeline(
            "red apple",
            width=128,
            height=96,
            num_inference_steps=2,
            guidance_scale=4.0,
            generator=torch.Generator().manual_seed(3),
        ).images[0]

    def ours(**settings):
        size = {"prompt": "red apple", "seeds": (3,), "steps": 2, "guidance": 4.0, "width": 128, "height": 96}
        (one,) = generate(GenerateRequest(**size, **settings), base=base).images
        return np.asarray(one.image).astype(int)

    with base.tiling():
        expected = np.asarray(theirs()).astype(int)
    assert not base.vae.use_tiling
    assert np.abs(ours(tiled=True) - expected).max() <= 1
    assert not base.vae.use_tiling
    assert np.abs(ours() - np.asarray(theirs()).astype(int)).max() <= 1
    assert np.abs(ours() - expected).max() > 1


def test_tiled_encoding_of_condition_images(sd1_scheduled_base, monkeypatch):
    """Those of CtrLoRA are encoded by the autoencoder."""
    base = sd1_scheduled_base
    shared = BaseControlNet.for_base(base)
    shared.add_adapter("one", 2, seed=0)
    tiled = []
    encode = type(base.vae).encode
    monkeypatch.setattr(type(base.vae), "encode", lambda vae, x: tiled.append(vae.use_tiling) or encode(vae, x))
    use = ControlUse(control="one", image="black")
    asked = GenerateRequest(prompt="red apple", steps=2, width=128, height=96, controls=(use,), tiled=True)
    images = {"black": np.zeros((96, 128, 3), np.uint8)}
    generate(asked, base=base, controls=[CtrLoRA(shared.eval(), "one", "canny")], images=images)
    assert tiled and all(tiled)


BUILT_IN = list(tiny.unet_systems().values())


@pytest.mark.parametrize("kind", BUILT_IN, ids=lambda kind: kind.kind)
def test_every_system_acts_on_odd_latents_or_says_why_not(kind, tiny_base):
    torch.manual_seed(0)
    options = {"size_ratio": 0.5} if kind.kind == "controlnet-xs" else {}  # the tiny base divides no smaller
    control = kind.for_base(tiny_base, **options)
    with torch.no_grad():
        for parameter in control.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    if len(control.conditions) > 1:
        control = control.for_condition(control.conditions[0])
    image = to_tensor([torch.randint(0, 256, (HEIGHT, WIDTH, 3), dtype=torch.uint8).numpy()])
    x_t, t = torch.randn(1, 4, HEIGHT // 4, WIDTH // 4), torch.tensor([500])
    text = tiny_base.encode_text(["red apple"])
    with torch.no_grad():
        plain = tiny_base.predict(x_t, t, text)
        try:
            hint = tiny.any_hint(control, image, tiny_base)
        except UserError as error:
            assert str(WIDTH) in str(error) or str(HEIGHT) in str(error)
            assert "try" in str(error)
            return
        made = predict_under(control, tiny_base, x_t, t, text, hint)
    assert made.shape == plain.shape and made.isfinite().all()
    assert (made - plain).abs().max() > 1e-4
