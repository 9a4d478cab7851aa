"""Pictures of every kind that people bring, and what is not a picture."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from controlkit.errors import UserError
from controlkit.images import contact_sheet, read_image, resize_cover, to_images, to_rgb, to_tensor, write_png

GRADIENT = np.stack(np.broadcast_arrays(*np.ogrid[:48, :32], 90), -1).astype(np.uint8) * np.uint8(1)


def encoded(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, format=kind, **options)
    return stream.getvalue()


def png_header(width, height, kind=2):
    """The first chunk of a PNG, and a picture of nothing."""

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
def test_torn_pictures(tmp_path, kind, keep):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    path = tmp_path / "torn"
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(UserError, match=r"torn or damaged|not a picture"):
        read_image(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"", r"empty \(0 bytes\)"), (b"hello", "not a picture"), (b"\x89PNG\r\n\x1a\n", "torn|not a picture")],
)
def test_what_is_not_a_picture(tmp_path, content, says):
    path = tmp_path / "x.png"
    path.write_bytes(content)
    with pytest.raises(UserError, match=says):
        read_image(path)


def test_what_is_not_there(tmp_path):
    for path in (tmp_path / "nothing.png", tmp_path):
        with pytest.raises(UserError, match="no picture at"):
            read_image(path)


@pytest.mark.parametrize("size", [(20_000, 20_000), (8193, 8192), (2**31 - 1, 2**31 - 1), (100_000_000, 1)])
def test_too_large_pictures_are_refused_before_they_are_decoded(tmp_path, size, monkeypatch):
    from PIL import ImageFile

    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("it was decoded"))
    path = tmp_path / "large.png"
    path.write_bytes(png_header(*size))
    with pytest.raises(UserError, match=r"large\.png is .*(too large|megapixels)"):
        read_image(path)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"]), data=st.data())
def test_damaged_pictures_are_read_or_refused_in_words(tmp_path, kind, data):
    image = Image.fromarray(GRADIENT)
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = bytearray(encoded(image, kind, **({"exif": exif} if kind in ("PNG", "JPEG", "WEBP") else {})))
    for _ in range(data.draw(st.integers(1, 6))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged"
    path.write_bytes(whole)
    try:
        assert read_image(path).mode == "RGB"
    except UserError as error:
        assert str(path) in str(error)


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


def test_a_dark_sixteen_bit_picture_stays_dark():
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
    pictures = [GRADIENT, 255 - GRADIENT]
    tensor = to_tensor(pictures)
    assert tensor.shape == (2, 3, 48, 32) and tensor.dtype == torch.float32
    assert tensor[0, 1, 5, 7] == GRADIENT[5, 7, 1] / np.float32(255)
    for picture, image in zip(pictures, to_images(tensor), strict=True):
        assert np.array_equal(np.asarray(image), picture)
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


def test_a_contact_sheet_has_a_cell_for_each_picture():
    red, blue = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (200, 100), "blue")
    sheet = contact_sheet([[red, blue, red], [blue]], cell=50, gap=4)
    assert sheet.size == (4 + 3 * 54, 4 + 2 * 54)
    assert sheet.getpixel((4, 4)) == (255, 0, 0) and sheet.getpixel((4 + 54 + 25, 29)) == (0, 0, 255)
    assert sheet.getpixel((4 + 54 + 25, 4 + 54 + 25)) == (255, 255, 255)
    titled = contact_sheet([[red]], column_titles=["given"], row_titles=["a row"], cell=50)
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
    with pytest.raises(UserError, match=r"torn or damaged|not a picture"):
        read_image(tmp_path / "x.dds")
