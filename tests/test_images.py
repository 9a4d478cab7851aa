"""Images of every kind that people bring, and what is not an image."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from controlkit.errors import UserError
from controlkit.images import (
    contact_sheet,
    decode_rgb,
    is_flat,
    read_image,
    resize_cover,
    sequence_note,
    to_images,
    to_rgb,
    to_tensor,
    write_png,
)
from icc import ADOBE_RGB, CMYK_TABLE, GREY_LINEAR, SRGB
from refusals import refused

GRADIENT = np.stack(np.broadcast_arrays(*np.ogrid[:48, :32], 90), -1).astype(np.uint8) * np.uint8(1)


def encoded(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, format=kind, **options)
    return stream.getvalue()


def png_header(width, height, kind=2):
    """The first chunk of a PNG, and an image of nothing."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_formats(tmp_path, kind):
    path = tmp_path / "picture"
    path.write_bytes(encoded(Image.fromarray(GRADIENT), kind))
    image = read_image(path)
    assert image.mode == "RGB" and image.size == (32, 48)
    assert np.abs(np.asarray(image).astype(int) - GRADIENT).mean() < 12


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
@pytest.mark.parametrize("keep", [0.05, 0.3, 0.6, 0.95])
def test_truncated_images(tmp_path, kind, keep):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    path = tmp_path / "truncated"
    path.write_bytes(data[: int(len(data) * keep)])
    with refused("bad-image", path):
        read_image(path)


@pytest.mark.parametrize(("content", "fact"), [(b"", "0 bytes"), (b"hello", ""), (b"\x89PNG\r\n\x1a\n", "")])
def test_what_is_not_an_image(tmp_path, content, fact):
    path = tmp_path / "x.png"
    path.write_bytes(content)
    with refused("bad-image", path, fact):
        read_image(path)


def test_what_is_not_there(tmp_path):
    for path, code in ((tmp_path / "nothing.png", "missing-file"), (tmp_path, "unreadable-file")):
        with refused(code, path):
            read_image(path)


@pytest.mark.parametrize("size", [(20_000, 20_000), (8193, 8192), (2**31 - 1, 2**31 - 1), (100_000_000, 1)])
def test_too_large_images_are_refused_before_they_are_decoded(tmp_path, size, monkeypatch):
    from PIL import ImageFile

    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("it was decoded"))
    path = tmp_path / "large.png"
    path.write_bytes(png_header(*size))
    with refused("bad-image", path, "at most 67 megapixels"):
        read_image(path)


@pytest.mark.parametrize(("limit", "divisor"), [(64 * 48, 2), (64 * 48 - 1, 4), (20 * 16, 8)])
def test_large_photographs_are_read_scaled_down(tmp_path, monkeypatch, limit, divisor):
    photo = Image.fromarray(GRADIENT).resize((128, 96))
    photo.save(tmp_path / "photo.jpg", quality=95)
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.save(tmp_path / "turned.jpg", quality=95, exif=exif)
    monkeypatch.setattr("controlkit.images.MAX_PIXELS", limit)
    image = read_image(tmp_path / "photo.jpg")
    assert image.size == (128 // divisor, 96 // divisor)
    assert np.abs(np.asarray(image).astype(int) - np.asarray(photo.resize(image.size)).astype(int)).mean() < 4
    assert read_image(tmp_path / "turned.jpg").size == image.size[::-1]
    photo.save(tmp_path / "photo.png")
    with refused("bad-image", "photo.png", "megapixels"):
        read_image(tmp_path / "photo.png")


def test_a_limit_has_one_text(tmp_path, monkeypatch):
    """Whether Pillow refuses the image or we do."""
    path, said = tmp_path / "large.png", set()
    path.write_bytes(png_header(9000, 9000))
    for pillow in (10**12, 10**6):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillow)
        with refused("bad-image", path, "81 megapixels", "at most 67 megapixels") as caught:
            read_image(path)
        said.add(str(caught.value))
    assert len(said) == 1


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"]), data=st.data())
def test_damaged_images_are_read_or_refused_in_words(tmp_path, kind, data):
    image = Image.fromarray(GRADIENT)
    exif = Image.Exif()
    exif[0x0112] = 6
    content = bytearray(encoded(image, kind, **({"exif": exif} if kind in ("PNG", "JPEG", "WEBP") else {})))
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged"
    path.write_bytes(content)
    try:
        assert read_image(path).mode == "RGB"
    except UserError as error:
        assert str(path) in str(error) and error.code == "bad-image"


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the top of the scene is at the right of the file
    Image.fromarray(GRADIENT).save(tmp_path / "turned.png", exif=exif)
    image = read_image(tmp_path / "turned.png")
    assert image.size == (48, 32)
    assert np.array_equal(np.asarray(image), np.rot90(GRADIENT, -1))


def test_a_damaged_exif_block_is_passed_over(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.fromarray(GRADIENT), "WEBP", exif=exif, lossless=True)
    at = data.rindex(b"II*\0") if b"II*\0" in data else data.rindex(b"MM\0*")
    (tmp_path / "a.webp").write_bytes(data[:at] + b"\0" + data[at + 1 :])
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.webp")), GRADIENT)


def test_transparency_is_laid_over_white_or_what_is_asked_for(tmp_path):
    rgba = np.zeros((2, 3, 4), np.uint8)
    rgba[:, 0] = (200, 0, 0, 255)
    rgba[:, 1] = (200, 0, 0, 128)
    path = tmp_path / "a.png"
    Image.fromarray(rgba).save(path)
    white = np.asarray(read_image(path))[0].tolist()
    assert white[0] == [200, 0, 0] and white[2] == [255, 255, 255]
    assert white[1] == pytest.approx([227, 127, 127], abs=2)
    assert np.asarray(read_image(path, (0, 0, 255)))[0, 2].tolist() == [0, 0, 255]


def test_palettes_with_and_without_transparency(tmp_path):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((0, 0), 0)
    image.save(tmp_path / "p.png")
    assert read_image(tmp_path / "p.png").getpixel((0, 0)) == (255, 0, 0)
    assert read_image(tmp_path / "p.png").getpixel((3, 3)) == (0, 255, 0)
    image.save(tmp_path / "t.png", transparency=1)
    assert read_image(tmp_path / "t.png").getpixel((3, 3)) == (255, 255, 255)


@pytest.mark.parametrize(("value", "expected"), [(0, 0), (257 * 7, 7), (32768, 128), (65535, 255)])
def test_sixteen_bit_grey(tmp_path, value, expected):
    Image.fromarray(np.full((3, 3), value, np.uint16)).save(tmp_path / "deep.png")
    assert read_image(tmp_path / "deep.png").getpixel((1, 1)) == (expected,) * 3


def test_a_dark_sixteen_bit_image_stays_dark():
    deep = Image.fromarray(np.full((3, 3), 200, np.uint16))
    assert to_rgb(deep).getpixel((0, 0)) == (1, 1, 1)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "CMYK", "YCbCr", "HSV", "RGBX", "I", "F"])
def test_every_mode_becomes_rgb(mode):
    image = Image.fromarray(GRADIENT).convert("RGB")
    image = image.convert("L").convert(mode) if mode in ("LA", "I", "F") else image.convert(mode)
    assert to_rgb(image).mode == "RGB"
    if mode in ("L", "I", "F"):
        assert np.array_equal(np.asarray(to_rgb(image))[..., 0], np.asarray(image).astype(np.uint8))


def test_pixels_survive_the_way_through_tensors():
    images = [GRADIENT, 255 - GRADIENT]
    tensor = to_tensor(images)
    assert tensor.shape == (2, 3, 48, 32) and tensor.dtype == torch.float32
    assert tensor[0, 1, 5, 7] == GRADIENT[5, 7, 1] / np.float32(255)
    for image, returned in zip(images, to_images(tensor), strict=True):
        assert np.array_equal(np.asarray(returned), image)
    assert np.array_equal(np.asarray(to_images(to_tensor([Image.fromarray(GRADIENT)]))[0]), GRADIENT)


def test_values_out_of_range_are_clamped():
    assert np.asarray(to_images(torch.tensor([-1.0, 2.0, 0.5]).view(1, 3, 1, 1))[0]).ravel().tolist() == [0, 255, 128]


def test_cover_crops_around_the_centre():
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 255
    assert np.asarray(resize_cover(Image.fromarray(wide), 20, 20)).mean() > 230
    same = Image.fromarray(GRADIENT)
    assert resize_cover(same, 32, 48) is same


def test_a_png_carries_its_text(tmp_path):
    path = tmp_path / "out" / "a.png"
    write_png(path, Image.fromarray(GRADIENT), {"prompt": "ein Apfel – ä 🍎", "controlkit": "{}"})
    with Image.open(path) as image:
        assert image.text == {"prompt": "ein Apfel – ä 🍎", "controlkit": "{}"}
    assert np.array_equal(np.asarray(read_image(path)), GRADIENT)


def test_a_contact_sheet_has_a_cell_for_each_image():
    red, blue = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (200, 100), "blue")
    sheet = contact_sheet([[red, blue, red], [blue]], cell=50, gap=4)
    assert sheet.size == (4 + 3 * 54, 4 + 2 * 54)
    assert sheet.getpixel((4, 4)) == (255, 0, 0) and sheet.getpixel((4 + 54 + 25, 29)) == (0, 0, 255)
    assert sheet.getpixel((4 + 54 + 25, 4 + 54 + 25)) == (255, 255, 255)
    titled = contact_sheet([[red]], column_titles=["condition image"], row_titles=["a row"], cell=50)
    assert titled.width > 58 and titled.height > 58


def test_fractions_are_scaled(tmp_path):
    depth = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    Image.fromarray(depth).save(tmp_path / "depth.tiff")
    read = np.asarray(read_image(tmp_path / "depth.tiff"))
    assert read.min() == 0 and read.max() == 255
    assert np.abs(read[..., 0] - depth * 255).max() <= 0.5


def test_a_format_that_is_known_and_not_read_is_refused_in_words(tmp_path):
    header = bytearray(128)
    header[:8] = b"DDS " + (124).to_bytes(4, "little")
    header[12:20] = (4).to_bytes(4, "little") * 2
    header[76:80] = (32).to_bytes(4, "little")
    (tmp_path / "x.dds").write_bytes(bytes(header))
    with refused("bad-image", tmp_path / "x.dds"):
        read_image(tmp_path / "x.dds")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_colours_of_another_space_become_srgb(tmp_path, kind):
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    Image.new("RGB", (8, 8), (60, 180, 60)).save(tmp_path / "a", format=kind, icc_profile=ADOBE_RGB, **options)
    assert read_image(tmp_path / "a").getpixel((4, 4)) == pytest.approx((0, 181, 42), abs=2)


@pytest.mark.parametrize("mode", ["RGBA", "P", "L", "RGB"])
def test_profiles_count_in_every_mode(tmp_path, mode):
    green = Image.new("RGBA", (4, 4), (60, 180, 60, 255))
    green.putpixel((0, 0), (60, 180, 60, 0))
    image = {"RGBA": green, "P": green.convert("RGB").quantize(4), "RGB": green.convert("RGB")}.get(mode)
    image = Image.new("L", (4, 4), 60) if image is None else image
    image.save(tmp_path / "a.png", icc_profile=ADOBE_RGB, **({"transparency": (1, 2, 3)} if mode == "RGB" else {}))
    read = read_image(tmp_path / "a.png")
    wanted = (58, 58, 58) if mode == "L" else (0, 181, 42)
    assert read.getpixel((3, 3)) == pytest.approx(wanted, abs=3)
    assert read.getpixel((0, 0)) == ((255, 255, 255) if mode == "RGBA" else read.getpixel((3, 3)))


def test_profiles_of_grey(tmp_path):
    for mode, value in (("L", 55), ("LA", (55, 255)), ("I;16", 55 * 257)):
        image = Image.fromarray(np.full((4, 4), value, np.uint16)) if mode == "I;16" else Image.new(mode, (4, 4), value)
        image.save(tmp_path / "grey.png", icc_profile=GREY_LINEAR)
        assert read_image(tmp_path / "grey.png").getpixel((2, 2)) == pytest.approx((128, 128, 128), abs=1)
    # A profile of another kind of image says nothing about this one.
    Image.new("RGB", (4, 4), (55, 60, 65)).save(tmp_path / "rgb.png", icc_profile=GREY_LINEAR)
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(tmp_path / "cmyk.tiff", icc_profile=ADOBE_RGB)
    assert read_image(tmp_path / "rgb.png").getpixel((2, 2)) == (55, 60, 65)
    assert read_image(tmp_path / "cmyk.tiff").getpixel((2, 2)) == (255, 0, 0)


def test_colours_of_cmyk_and_lab_are_converted(tmp_path):
    for kind in ("JPEG", "TIFF"):
        for inks, wanted in (((0, 0, 0, 0), (255,) * 3), ((0, 255, 255, 0), (255, 0, 0)), ((0, 0, 0, 255), (0,) * 3)):
            image = Image.new("CMYK", (8, 8), inks)
            image.save(tmp_path / "a", format=kind, icc_profile=CMYK_TABLE)
            assert read_image(tmp_path / "a").getpixel((4, 4)) == pytest.approx(wanted, abs=6)
    # Half of each is darker than Pillow's own arithmetic has it: Lab is not linear in RGB.
    half = Image.new("CMYK", (8, 8), (0, 0, 0, 128))
    assert to_rgb(half).getpixel((0, 0)) == (127, 127, 127)
    half.info["icc_profile"] = CMYK_TABLE
    assert to_rgb(half).getpixel((0, 0)) == pytest.approx((119, 119, 119), abs=3)
    red = ImageCms.profileToProfile(
        Image.new("RGB", (4, 4), (200, 30, 30)),
        ImageCms.createProfile("sRGB"),
        ImageCms.createProfile("LAB"),
        outputMode="LAB",
    )
    assert red is not None
    red.info.clear()
    red.save(tmp_path / "lab.tiff")
    assert read_image(tmp_path / "lab.tiff").getpixel((1, 1)) == pytest.approx((200, 30, 30), abs=4)


def test_an_srgb_profile_changes_no_pixel(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png", icc_profile=SRGB)
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.png")), noise)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(places=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=8), keep=st.floats(0, 1))
def test_a_damaged_profile_says_nothing_and_breaks_nothing(places, keep):
    data = bytearray(ADOBE_RGB)
    for place, value in places:
        data[int(place * (len(data) - 1))] = value
    image = Image.new("RGB", (4, 4), (60, 180, 60))
    for damaged in (bytes(data), bytes(data[: int(keep * len(data))])):
        image.info["icc_profile"] = damaged
        assert to_rgb(image).mode == "RGB"
    image.info["icc_profile"] = ADOBE_RGB[:200]
    assert to_rgb(image).getpixel((0, 0)) == (60, 180, 60)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_several_frames_the_first_is_taken_and_that_is_noted(kind):
    red, blue = Image.new("RGB", (16, 16), (255, 0, 0)), Image.new("RGB", (16, 16), (0, 0, 255))
    several = encoded(red, kind, save_all=True, append_images=[blue], **({"lossless": True} if kind == "WEBP" else {}))
    assert decode_rgb(several, "x").getpixel((3, 3)) == (255, 0, 0)
    assert sequence_note(several, "x") == ["x has several frames; only the first is used"]
    assert sequence_note(encoded(red, kind), "x") == [] == sequence_note(b"hello", "x")


def test_a_photo_with_a_second_image_in_it_is_one_image():
    photo, extra = Image.new("RGB", (16, 16)), Image.new("RGB", (8, 8))
    assert sequence_note(encoded(photo, "MPO", save_all=True, append_images=[extra]), "x") == []


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 200]], np.int32), (0, 200)),
        (np.array([[0, 257 * 9]], np.int32), (0, 9)),
        (np.array([[0, 0.5]], np.float32), (0, 128)),
        (np.array([[0, 200]], np.float32), (0, 200)),
        (np.array([[0, 65536]], np.int32), "integers from 0 to 65536"),
        (np.array([[-3, 200]], np.int32), "integers from -3 to 200"),
        (np.array([[0, 3.75]], np.float32), "floats from 0 to 3.75"),
        (np.array([[-0.5, 0.5]], np.float32), "floats from -0.5 to 0.5"),
        (np.array([[0, 1000]], np.float32), "floats from 0 to 1000"),
        (np.array([[0, np.nan]], np.float32), "NaN or Inf"),
        (np.array([[0, np.inf]], np.float32), "NaN or Inf"),
    ],
)
def test_numbers_are_scaled_as_documented_or_refused_in_words(tmp_path, values, expected):
    Image.fromarray(values).save(tmp_path / "deep.tiff")
    if isinstance(expected, str):
        with refused("bad-image", tmp_path / "deep.tiff", expected):
            read_image(tmp_path / "deep.tiff")
    else:
        assert np.asarray(read_image(tmp_path / "deep.tiff"))[0, :, 0].tolist() == list(expected)


def test_a_transparent_level_of_sixteen_bit_grey(tmp_path):
    Image.fromarray(np.array([[0, 65535]], np.uint16)).save(tmp_path / "a.png", transparency=0)
    assert np.asarray(read_image(tmp_path / "a.png", (0, 0, 255)))[0].tolist() == [[0, 0, 255], [255, 255, 255]]


def test_one_flat_colour_is_told_from_the_faintest_line():
    flat = np.full((20, 20, 3), (10, 20, 30), np.uint8)
    assert is_flat(flat) and is_flat(flat + np.indices((20, 20)).sum(0)[..., None].astype(np.uint8) % 2)
    flat[3, 4, 1] = 30
    assert not is_flat(flat)
