"""`generate` from an image and a mask: what is sampled, what is put back, what is stored and restored."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionControlNetInpaintPipeline, StableDiffusionInpaintPipeline
from parity import STEPS, parts
from PIL import Image, ImageDraw

from controlkit.apps.cli import main
from controlkit.images import write_png
from controlkit.sampling.generate import generate
from controlkit.sampling.request import GenerateRequest
from controlkit.sampling.saved_settings import read_settings
from controlkit.sampling.uses import ControlUse
from refusals import check, refused

SEED = 3


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A photo of 150 x 100 with its mask, the same of 64 x 64, and a condition image, in the current folder."""
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0).integers(0, 255, (5, 8, 3), dtype=np.uint8)
    for name, size in (("", (150, 100)), ("small-", (64, 64))):
        write_png(f"{name}photo.png", Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC))
        mask = Image.new("L", size)
        ImageDraw.Draw(mask).rectangle((size[0] // 2, 20, size[0] // 2 + 23, 51), fill=255)
        mask.save(f"{name}mask.png")
        edges = Image.new("RGB", size)
        ImageDraw.Draw(edges).ellipse((size[0] // 2, 16, size[0] // 2 + 30, 50), outline="white")
        edges.save(f"{name}edges.png")
    return tmp_path


def run(*words: object) -> int:
    return main([str(word) for word in words])


def request(name="", **changes):
    settings = {"prompt": "red apple", "seeds": (SEED,), "steps": STEPS, "guidance": 4.0, "image": f"{name}photo.png"}
    return GenerateRequest(**{**settings, **changes})


def opened(path):
    return np.asarray(Image.open(path)).astype(int)


def drawn(base, loaded=None, **changes):
    (one,) = generate(request(**changes), base=base, controls=loaded).images
    return np.asarray(one.image).astype(int)


def theirs(pipeline, mask, **changes):
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(
        "red apple",
        mask_image=mask,
        num_inference_steps=STEPS,
        guidance_scale=4.0,
        height=64,
        width=64,
        generator=[torch.Generator().manual_seed(SEED)],
        **changes,
    ).images
    return np.asarray(made[0]).astype(int)


@pytest.mark.parametrize("blur", [0, 3])
def test_an_inpainted_image_equals_diffusers_with_its_overlay(sd1_scheduled_base, folder, blur):
    pipeline = StableDiffusionInpaintPipeline(**parts(sd1_scheduled_base))
    photo, mask = Image.open("small-photo.png"), Image.open("small-mask.png")
    if blur:
        mask = pipeline.mask_processor.blur(mask, blur)
    plain = theirs(pipeline, mask, image=photo, strength=0.7)
    expected = pipeline.image_processor.apply_overlay(mask, photo, Image.fromarray(plain.astype(np.uint8)))
    made = drawn(sd1_scheduled_base, name="small-", mask="small-mask.png", strength=0.7, mask_blur=blur)
    assert np.abs(made - np.asarray(expected).astype(int)).max() <= 1
    kept = np.asarray(mask) == 0
    assert (made[kept] == np.asarray(photo).astype(int)[kept]).all()
    assert np.abs(made - np.asarray(photo).astype(int)).max() > 20


@pytest.mark.parametrize("padding", [0, 5, 80])
@pytest.mark.parametrize("blur", [0, 2])
def test_only_masked_equals_diffusers(sd1_scheduled_base, folder, padding, blur):
    pipeline = StableDiffusionInpaintPipeline(**parts(sd1_scheduled_base))
    photo, mask = Image.open("photo.png"), Image.open("mask.png")
    if blur:
        mask = pipeline.mask_processor.blur(mask, blur)
    expected = theirs(pipeline, mask, image=photo, strength=1.0, padding_mask_crop=padding)
    made = drawn(sd1_scheduled_base, mask="mask.png", only_masked=padding, mask_blur=blur)
    assert made.shape == (100, 150, 3)
    assert np.abs(made - expected).max() <= 1
    kept = np.asarray(mask) == 0
    assert (made[kept] == opened("photo.png")[kept]).all()


def test_a_control_sees_the_masked_part_as_in_diffusers(sd1_scheduled_base, tiny_control, folder):
    pipeline = StableDiffusionControlNetInpaintPipeline(
        **parts(sd1_scheduled_base), controlnet=tiny_control.to_diffusers()
    )
    photo, mask, edges = (Image.open(f"{name}.png") for name in ("photo", "mask", "edges"))
    expected = theirs(
        pipeline,
        mask,
        image=photo,
        control_image=edges,
        strength=1.0,
        padding_mask_crop=8,
        controlnet_conditioning_scale=1.0,
    )
    use = ControlUse(control="canny", image="edges.png", prepared=True, mode="balanced")
    settings = {"mask": "mask.png", "only_masked": 8}
    made = drawn(sd1_scheduled_base, [tiny_control], controls=(use,), **settings)
    assert np.abs(made - expected).max() <= 1
    assert np.abs(made - drawn(sd1_scheduled_base, **settings)).max() > 3


def test_settings_restore_the_image(folder, capsys):
    """Also when the image or mask is missing or has changed."""
    words = ("--image", "photo.png", "--mask", "mask.png", "--mask-blur", 2, "--strength", 0.6, "--steps", 4)
    assert run("generate", "red apple", *words, "--out", "first") == 0
    settings = json.loads((folder / "first/settings.json").read_text())
    assert settings["used"]["strength"] == 0.6
    assert set(settings["sha256"]) == {"base", "controls", "image", "mask", "image_pixels", "mask_pixels"}
    restored = read_settings("first").to_request()
    asked = (restored.image, restored.mask, restored.mask_blur, restored.strength)
    assert asked == ("photo.png", "mask.png", 2.0, 0.6)
    capsys.readouterr()
    assert run("generate", "--from", "first", "--out", "second") == 0
    assert (opened("first/seed0.png") == opened("second/seed0.png")).all()
    (folder / "photo.png").unlink()
    Image.new("L", (150, 100), 255).save("mask.png")
    assert run("generate", "--from", "first/seed0.png", "--out", "third") == 0
    assert (opened("first/seed0.png") == opened("third/seed0.png")).all()
    said = capsys.readouterr().err
    assert "photo.png, the image to start from, is missing" in said and "first/image.png" in said
    assert "mask.png, the mask to start from, has changed" in said and "first/mask.png" in said
    (folder / "first/image.png").unlink()
    assert run("generate", "--from", "first", "--out", "fourth") == 2
    check(capsys.readouterr().err, "missing-file", "photo.png", "first/image.png", "--image")


@pytest.mark.parametrize("options", [(), ("--only-masked", 8)])
@pytest.mark.parametrize("gone", ["photo.png", "mask.png"])
def test_a_missing_image_or_mask_is_replaced_so_that_both_fit(folder, capsys, gone, options):
    """Saved ones have the shape of the result, 64 x 64; the files have 150 x 100."""
    words = ("--image", "photo.png", "--mask", "mask.png", "--steps", 2, *options)
    assert run("generate", "red apple", *words, "--out", "first") == 0
    (folder / gone).unlink()
    capsys.readouterr()
    assert run("generate", "--from", "first", "--out", "second") == 0
    assert (opened("first/seed0.png") == opened("second/seed0.png")).all()
    said = capsys.readouterr().err
    assert said.count("to start from") == 1 and f"{gone}, the" in said and "is missing" in said


@pytest.mark.parametrize("name", ["image", "mask"])
def test_a_saved_image_that_another_run_replaced_is_not_restored(folder, capsys, name):
    words = ("--image", "small-photo.png", "--mask", "small-mask.png", "--steps", 2, "--out", "first")
    assert run("generate", "red apple", *words) == 0
    path = f"small-{'photo' if name == 'image' else 'mask'}.png"
    (folder / path).unlink()
    Image.new("RGB" if name == "image" else "L", (64, 64), "white").save(f"first/{name}.png")
    capsys.readouterr()
    assert run("generate", "--from", "first/seed0.png", "--out", "second") == 2
    check(capsys.readouterr().err, "missing-file", path, f"first/{name}.png", "SHA-256", f"--{name}")
    # Settings of earlier versions have no hash to compare.
    settings = json.loads((folder / "first/settings.json").read_text())
    del settings["sha256"][f"{name}_pixels"]
    (folder / "first/settings.json").write_text(json.dumps(settings))
    assert run("generate", "--from", "first", "--out", "second") == 0


def test_saved_images_of_the_masked_part_replace_nothing(folder, capsys):
    words = ("--image", "photo.png", "--mask", "mask.png", "--only-masked", 4, "--control", "canny=edges.png")
    assert run("generate", "red apple", *words, "--steps", 2, "--out", "first") == 0
    assert run("generate", "--from", "first", "--out", "second") == 0
    assert (opened("first/seed0.png") == opened("second/seed0.png")).all()
    (folder / "edges.png").unlink()
    capsys.readouterr()
    assert run("generate", "--from", "first", "--out", "third") == 2
    check(capsys.readouterr().err, "missing-file", "edges.png", "first/condition0.png", "inpainted part")


def test_the_image_is_not_overwritten(folder, capsys):
    (folder / "out").mkdir()
    for name in ("image", "mask"):
        (folder / f"small-{'photo' if name == 'image' else name}.png").rename(folder / f"out/{name}.png")
    words = ("generate", "red apple", "--image", "out/image.png", "--mask", "out/mask.png", "--steps", 2)
    assert run(*words, "--out", "out") == 2
    check(capsys.readouterr().err, "would-overwrite", "out/image.png")
    assert run(*words, "--out", "other") == 0
    before = (folder / "out/image.png").read_bytes()
    made = generate(GenerateRequest(prompt="red apple", image="out/image.png", mask="out/mask.png", steps=2))
    with refused("would-overwrite", "out/image.png"):
        made.save("out")
    assert (folder / "out/image.png").read_bytes() == before


@pytest.mark.parametrize(
    ("settings", "code", "facts"),
    [
        ({"image": None, "strength": 0.5}, "contradiction", ["strength", "image"]),
        ({"image": None, "mask": "mask.png"}, "contradiction", ["mask", "image"]),
        ({"strength": 0.0}, "out-of-range", ["strength", 0.0]),
        ({"strength": 1.2}, "out-of-range", ["strength", 1.2]),
        ({"strength": float("nan")}, "out-of-range", ["strength", "nan"]),
        ({"mask_blur": 2.0}, "contradiction", ["mask_blur", "mask"]),
        ({"only_masked": 0}, "contradiction", ["only_masked", "mask"]),
        ({"mask": "mask.png", "mask_blur": -1.0}, "out-of-range", ["mask_blur", -1.0]),
        ({"mask": "mask.png", "only_masked": -1}, "out-of-range", ["only_masked", -1]),
    ],
)
def test_contradictions_are_refused(settings, code, facts):
    with refused(code, *facts):
        request(**settings)


@pytest.mark.parametrize(
    ("settings", "code", "facts"),
    [
        ({"image": "none.png"}, "missing-file", ["none.png"]),
        ({"mask": "none.png"}, "missing-file", ["none.png"]),
        ({"mask": "small-mask.png"}, "wrong-size", ["64 x 64", "150 x 100"]),
        ({"mask": "black.png", "only_masked": 4}, "out-of-range", ["black.png", "white"]),
        ({"mask": "black.png"}, "out-of-range", ["mask", "white"]),
        ({"width": 66}, "wrong-size", ["66"]),
        (
            {"strength": 0.4, "controls": (ControlUse(control="canny", image="edges.png", end=0.4),)},
            "out-of-range",
            ["canny", "0.4", "2 steps"],
        ),
    ],
)
def test_what_cannot_be_used_is_refused(sd1_scheduled_base, tiny_control, folder, settings, code, facts):
    Image.new("L", (150, 100)).save("black.png")
    asked = request(**settings)
    with refused(code, *facts):
        generate(asked, base=sd1_scheduled_base, controls=[tiny_control] * len(asked.controls))


def test_a_mask_of_another_scale_is_scaled(sd1_scheduled_base, folder):
    Image.open("mask.png").resize((300, 200), Image.Resampling.NEAREST).save("large.png")
    made = drawn(sd1_scheduled_base, mask="large.png", only_masked=8)
    assert made.shape == (100, 150, 3)
    assert (made[:, :70] == opened("photo.png")[:, :70]).all()


def test_an_axis_of_images_to_start_from(folder, capsys):
    """`image` of an axis is of the request where it has one; that of a control has its number."""
    Image.open("small-photo.png").transpose(Image.Transpose.FLIP_LEFT_RIGHT).save("turned.png")
    words = ("--image", "small-photo.png", "--strength", 0.6, "--steps", 4, "--control", "canny=small-edges.png")
    assert run("generate", "red apple", *words, "--xy", "image=small-photo.png,turned.png", "--out", "first") == 0
    same = {"steps": 4, "strength": 0.6, "guidance": None, "seeds": (0,), "controls": USES}
    single = [generate(request(image=path, **same)) for path in ("small-photo.png", "turned.png")]
    for generation, path in zip(single, ("imagesmall-photo", "imageturned"), strict=True):
        made = opened(f"first/{path}-seed0.png")
        assert (made == np.asarray(generation.images[0].image)).all()
    assert run("generate", "--from", "first", "--out", "second") == 0
    assert run("generate", "--from", "first/imageturned-seed0.png", "--out", "third") == 0
    assert (opened("third/seed0.png") == opened("first/imageturned-seed0.png")).all()
    capsys.readouterr()
    Image.open("small-photo.png").save("turned.png")
    assert run("generate", "--from", "first", "--out", "fourth") == 0
    assert "turned.png has changed" in capsys.readouterr().err
    (folder / "turned.png").unlink()
    assert run("generate", "--from", "first/imageturned-seed0.png", "--out", "fifth") == 0
    assert (opened("fifth/seed0.png") == opened("first/imageturned-seed0.png")).all()
    edges = {"0.image": ["small-edges.png", "small-photo.png"]}
    parts = generate(request("small-", controls=USES, vary=(edges,))).parts
    assert [part.request.controls[0].image for part in parts] == edges["0.image"]
    assert {part.request.image for part in parts} == {"small-photo.png"}


USES = (ControlUse(control="canny", image="small-edges.png"),)


def test_steps_are_those_that_run(sd1_scheduled_base, folder):
    told = []
    generate(
        request(name="small-", strength=0.6, seeds=(1, 2), batch_size=1), base=sd1_scheduled_base, on_step=told.append
    )
    assert [(step.done, step.total) for step in told] == [(number, 6) for number in range(1, 7)]
    assert [(step.step, step.steps) for step in told] == [(1, 3), (2, 3), (3, 3)] * 2
