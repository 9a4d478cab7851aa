"""`hires`: the images again, enlarged."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from parity import parts
from PIL import Image

from controlkit.images import resize_cover
from controlkit.sampling.generate import generate
from controlkit.sampling.image_folder import refuse_overwriting
from controlkit.sampling.request import GenerateRequest
from controlkit.sampling.saved_settings import read_settings
from controlkit.sampling.uses import ControlUse
from refusals import refused

SETTINGS = {"prompt": "red apple", "steps": 4, "guidance": 4.0, "width": 64, "height": 48}


def pixels(generation):
    return np.stack([np.asarray(one.image) for one in generation.images]).astype(int)


@pytest.fixture
def ring(condition_image, tmp_path):
    path = tmp_path / "ring.png"
    Image.fromarray(condition_image).save(path)
    return str(path)


def test_the_second_pass_is_img2img_of_the_enlarged_images(sd1_scheduled_base, tiny_control, ring, tmp_path):
    base, seeds = sd1_scheduled_base, (5, 6, 7)
    use = ControlUse(control="c", image=ring, prepared=True, weight=0.8, end=0.5)
    asked = GenerateRequest(**SETTINGS, seeds=seeds, controls=(use,), hires=1.5, hires_strength=0.6, batch_size=2)
    steps = []
    made = generate(
        asked, base=base, controls=[tiny_control], on_step=lambda step: steps.append((step.done, step.total))
    )
    assert [one.image.size for one in made.images] == [(96, 72)] * 3
    plain = dataclasses.replace(asked, hires=None, hires_strength=None)
    first = generate(plain, base=base, controls=[tiny_control])
    for seed, small, large in zip(seeds, first.images, made.images, strict=True):
        path = tmp_path / f"{seed}.png"
        resize_cover(small.image, 96, 72).save(path)
        again = dataclasses.replace(plain, seeds=(seed,), image=str(path), strength=0.6, width=96, height=72)
        (expected,) = generate(again, base=base, controls=[tiny_control]).images
        assert np.abs(np.asarray(large.image).astype(int) - np.asarray(expected.image)).max() <= 1
    assert steps == [(done, 2 * 4 + 2 * 2) for done in range(1, 13)]
    assert set(made.conditions) == {"condition0", "hires-condition0"}
    assert made.conditions["hires-condition0"].size == (96, 72)
    assert {key: made.used[key] for key in ("width", "hires_width", "hires_height", "hires_strength")} == {
        "width": 64,
        "hires_width": 96,
        "hires_height": 72,
        "hires_strength": 0.6,
    }


def test_the_second_pass_is_that_of_diffusers_in_two_calls(sd1_scheduled_base):
    base = sd1_scheduled_base
    settings = {"num_inference_steps": 4, "guidance_scale": 4.0}
    text_to_image, img2img = StableDiffusionPipeline(**parts(base)), StableDiffusionImg2ImgPipeline(**parts(base))
    for pipeline in (text_to_image, img2img):
        pipeline.set_progress_bar_config(disable=True)
    small = text_to_image("red apple", width=64, height=48, generator=torch.Generator().manual_seed(3), **settings)
    large = small.images[0].resize((128, 96), Image.Resampling.LANCZOS)
    (expected,) = img2img(
        "red apple", image=large, strength=0.7, generator=torch.Generator().manual_seed(3), **settings
    ).images
    made = generate(GenerateRequest(**SETTINGS, seeds=(3,), hires=2), base=base)
    assert np.abs(pixels(made)[0] - np.asarray(expected)).max() <= 1


def test_the_last_pass_is_what_a_folder_shows_and_repeats(base_folder, ring, tmp_path):
    asked = GenerateRequest(**SETTINGS, seeds=(1, 2), hires=2, base=str(base_folder))
    shown = []
    made = generate(asked, on_images=lambda generation: shown.append(generation.images[-1].image.size))
    assert shown == [(128, 96)]
    made.save(tmp_path / "out")
    again = read_settings(tmp_path / "out" / "seed2.png").to_request()
    assert np.abs(pixels(generate(again)) - pixels(made)[1:]).max() <= 1


@pytest.mark.parametrize("what", ["image", "mask"])
@pytest.mark.parametrize("hires", [None, 2])
def test_a_note_says_that_the_second_pass_enlarges_a_saved_condition_image(tmp_path, monkeypatch, what, hires):
    monkeypatch.chdir(tmp_path)
    for name in ("image", "mask"):
        Image.new("RGB", (32, 32), "white").save(f"{name}0.png")
    use = ControlUse(control="canny", image="image0.png", mask="mask0.png", prepared=True)
    asked = GenerateRequest(prompt="red apple", steps=2, controls=(use,), hires=hires)
    generate(asked).save("out")
    (tmp_path / f"{what}0.png").rename("elsewhere.png")
    saved = read_settings("out")
    (note,) = saved.differences(generate(saved.to_request()))
    assert note.startswith(f"{what}0.png") and ("second pass" in note) == (hires is not None)


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ({"hires": 1.0}, "out-of-range"),
        ({"hires": float("nan")}, "out-of-range"),
        ({"hires": 9.0}, "out-of-range"),
        ({"hires": 2.0, "hires_strength": 0.0}, "out-of-range"),
        ({"hires_strength": 0.5}, "contradiction"),
        ({"hires": 2.0, "image": "photo.png"}, "contradiction"),
    ],
)
def test_second_passes_that_are_refused(settings, code):
    with refused(code, "hires"):
        GenerateRequest(prompt="x", **settings)


def test_a_second_pass_without_a_step_and_one_over_its_inputs_are_refused(sd1_scheduled_base, ring, tmp_path):
    with refused("out-of-range", "0.1"):
        generate(GenerateRequest(**SETTINGS, hires=2, hires_strength=0.1), base=sd1_scheduled_base)
    taken = tmp_path / "hires-condition0.png"
    (tmp_path / "ring.png").rename(taken)
    use = ControlUse(control="nano/canny", image=str(taken))
    refuse_overwriting(GenerateRequest(prompt="x", controls=(use,)), tmp_path)
    with refused("would-overwrite", "hires-condition0"):
        refuse_overwriting(GenerateRequest(prompt="x", controls=(use,), hires=2), tmp_path)
