"""How the images of a request are prepared, without a server and a worker."""

from __future__ import annotations

import base64
import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from controlkit.conditions import find
from controlkit.conditions.condition import background_of
from controlkit.images import decode_rgb
from controlkit.sampling.input_images import ImageFile
from controlkit.server.catalogue import list_models
from controlkit.server.drawing import Studio, prepared
from controlkit.server.limits import Limits
from controlkit.server.native import ControlBody, GenerateBody, build
from controlkit.server.spec import Execution, SentImage, Spec
from refusals import refused
from tiny import build_tiny_flux, saved_pipeline


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("fit", ["crop", "stretch", "fill"])
def test_condition_images_show_the_part_of_the_start_image_that_is_sampled(fit):
    lines = np.full((64, 96, 3), 255, np.uint8)
    lines[:, 8:10] = lines[:, 60:62] = 0
    mask = Image.new("L", (96, 64))
    mask.paste(255, (0, 0, 64, 64))
    spec = Spec(
        request={
            "prompt": "red apple",
            "image": "start",
            "mask": "mask",
            "only_masked": 0,
            "strength": 0.5,
            "steps": 2,
            "controls": [{"control": "canny", "image": "lines", "prepared": True}],
        },
        images={
            "start": SentImage(file="lines"),
            "mask": SentImage(file="mask"),
            "lines": SentImage(file="lines", fit=fit, condition="canny"),
        },
        maps=(0,),
    )
    studio = Studio(catalogue=list_models(), limits=Limits(), execution=Execution(device="cpu"))
    files = {"lines": png(Image.fromarray(lines)), "mask": png(mask)}
    result, _ = studio.draw(spec, files, lambda step: None)
    (data,) = result.files["maps"]
    found = np.asarray(Image.open(io.BytesIO(data)))
    assert np.array_equal(found, find("canny")(lines)[:, :64])
    assert np.flatnonzero(found.max(axis=(0, 2))).tolist() == [7, 59]


def transparent(colour: tuple[int, int, int]) -> bytes:
    """A square of `colour` in the middle of a transparent image."""
    image = Image.new("RGBA", (64, 64))
    image.paste((*colour, 255), (16, 16, 48, 48))
    return png(image)


@pytest.mark.parametrize("fit", ["crop", "stretch", "fill"])
def test_masks_are_black_where_they_are_transparent(tmp_path, fit):
    data = transparent((255, 255, 255))
    (tmp_path / "sent.png").write_bytes(data)
    expected = np.asarray(ImageFile.read_mask(str(tmp_path / "sent.png")).image)
    for invert in (False, True):
        sent = SentImage(file="mask", mask=True, fit=fit, invert=invert)
        found = np.asarray(decode_rgb(prepared(sent, data, "mask", 64, 64), "mask", (0, 0, 0)))
        assert np.array_equal(found, 255 - expected if invert else expected)


@pytest.mark.parametrize("fit", ["crop", "stretch", "fill"])
@pytest.mark.parametrize("control", ["canny", "nano/palette"])
def test_condition_images_have_their_background_where_they_are_transparent(control, fit):
    service = SimpleNamespace(catalogue=list_models(), limits=Limits())
    data = transparent((200, 100, 50))
    text = base64.b64encode(data).decode()
    use = ControlBody(control=control, image=text, prepared=True, fit=fit)
    spec, files = build(GenerateBody(prompt="x", controls=[use]), service)
    image = spec.images["control0"]
    background = background_of(service.catalogue.controls[control].condition)
    found = decode_rgb(prepared(image, files[image.file], "image", 64, 64), "image", background)
    assert np.array_equal(np.asarray(found), np.asarray(decode_rgb(data, "image", background)))


@pytest.mark.parametrize("fit", ["stretch", "fill"])
def test_condition_images_of_labels_keep_their_colours(fit):
    labels = np.zeros((40, 30, 3), np.uint8)
    labels[:20, :10], labels[20:, 15:] = (200, 100, 50), (10, 20, 30)
    sent = SentImage(file="map", fit=fit, shows="silhouette")
    found = np.asarray(decode_rgb(prepared(sent, png(Image.fromarray(labels)), "map", 64, 64), "map"))
    assert {tuple(colour) for colour in found.reshape(-1, 3)} == {tuple(colour) for colour in labels.reshape(-1, 3)}


def test_masks_of_a1111_are_where_alpha_is_above_its_half():
    image = Image.new("RGBA", (64, 64), (255, 255, 255, 128))
    image.putpixel((1, 1), (0, 0, 0, 129))
    sent = SentImage(file="mask", mask=True, by_alpha=True)
    found = np.asarray(decode_rgb(prepared(sent, png(image), "mask", 64, 64), "mask"))
    assert np.argwhere(found[..., 0]).tolist() == [[1, 1]] and found[1, 1, 0] == 255
    opaque = Image.new("L", (64, 64), 100)
    for form in (opaque, opaque.convert("RGBA")):
        found = np.asarray(decode_rgb(prepared(sent, png(form), "mask", 64, 64), "mask"))
        assert (found == 100).all()


@pytest.mark.parametrize("fit", ["crop", "stretch", "fill"])
def test_holes_follow_their_image(fit):
    image, mask = Image.new("RGB", (64, 32), "white"), Image.new("L", (64, 32))
    mask.paste(255, (0, 0, 32, 32))
    sent = SentImage(file="image", fit=fit, condition="inpaint", hole="mask")
    hole = (SentImage(file="mask", mask=True), png(mask))
    found = np.asarray(decode_rgb(prepared(sent, png(image), "image", 64, 64, hole=hole), "image"))[..., 0]
    assert (found[:, :32] == 0).all() and (found[16:48, 32:] == 255).all()
    assert (found[:16] == (0 if fit == "fill" else found[32])).all()  # what is filled up is a part of the hole
    with refused("wrong-size", "mask", "64 x 32", "image", "32 x 32"):
        prepared(sent, png(image.resize((32, 32))), "image", 64, 64, hole=hole)


def test_masks_of_openai_are_turned_as_their_exif_says():
    image = Image.new("RGBA", (64, 32), (0, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 16, 32))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", exif=exif)
    sent = SentImage(file="mask", mask=True, transparent=True)
    found = decode_rgb(prepared(sent, buffer.getvalue(), "mask", 32, 64), "mask")
    assert found.size == (32, 64)
    assert found.getpixel((16, 4)) == (255, 255, 255) and found.getpixel((16, 40)) == (0, 0, 0)


def test_what_flux_does_not_read_is_left_out_with_notes(tmp_path):
    """And its guidance scale is Forge's distilled one, which other bases do not read."""
    folder = saved_pipeline(build_tiny_flux(), tmp_path / "flux")
    words = tmp_path / "words" / "ugly.safetensors"
    words.parent.mkdir()
    save_file({"emb_params": torch.zeros(1, 16)}, words)
    catalogue = list_models(bases=["nano", str(folder)], embeddings=[str(words.parent)])
    studio = Studio(catalogue=catalogue, limits=Limits(), execution=Execution(device="cpu"))
    request = {"prompt": "a (house:1.2)", "negative_prompt": "ugly", "prompt_syntax": "weighted", "steps": 2}
    request |= {"embeddings": ["ugly"], "clip_skip": 2, "sampler": "ddim", "guidance": 1.0}
    for base, guidance in (("flux", 3.0), ("nano", 1.0)):
        spec = Spec(request={**request, "base": base}, lenient=True, read_guidance=3.0)
        if base == "nano":
            spec.request |= {"clip_skip": None, "embeddings": []}
        result, _ = studio.draw(spec, {}, lambda step: None)
        assert result.values["used"]["guidance"] == guidance
        settings = result.values["infotexts"][0]
        assert ("CFG scale: 1.0, Distilled CFG Scale: 3.0" in settings) == (base == "flux")
        assert "CFG scale: 1.0" in settings
        said = "\n".join(result.values["notes"])
        refused_by = ("weights in prompts", "textual inversions", "clip_skip", "the sampler ddim")
        assert [f"flux does not support {what}" in said for what in refused_by] == [base == "flux"] * 4, said
