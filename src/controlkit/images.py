"""Read, convert and write images: RGB PIL images, `uint8` arrays `[H, W, 3]`, and tensors `[B, 3, H, W]`.

Outside the networks an image is a PIL image or a `uint8` array. Inside, images are in [-1, 1] and condition images in
[0, 1].
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from controlkit.errors import UserError
from controlkit.files import write_atomically

if TYPE_CHECKING:
    from torch import Tensor

MAX_PIXELS = 8192 * 8192
"""Larger images are refused before they are decoded: 20,000 x 20,000 would take 1.2 GB. JPEG files up to
`MAX_JPEG_PIXELS` are decoded at 1/2 to 1/8 of their size."""
MAX_JPEG_PIXELS = 178 * 10**6
"""Photographs of telephones have 108 megapixels. Pillow opens no image of more than 178."""


def read_image(path: str | Path, background: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """Read `path` as upright sRGB.

    EXIF rotation is applied, an embedded ICC profile is converted to sRGB, transparent pixels are composited over
    `background`, palettes and greyscale are expanded. Of several frames the first is used. 16-bit greyscale and
    floats in [0, 1] are scaled to 8 bits; integer values up to 255 are kept. JPEG files of more than `MAX_PIXELS` are
    scaled down.

    Raises:
        UserError: the file is missing, empty, truncated, not an image, too large, or its value range is ambiguous
            (`to_rgb`).
    """
    return decode_rgb(read_bytes(path), str(path), background)


def check_exists(path: str | Path) -> None:
    """Check that there is a file at the `path` of an image.

    Raises:
        UserError: there is none.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"there is no image at {path}: it is a folder; give the name of one image", "unreadable-file")
    if not path.is_file():
        raise UserError(f"there is no image at {path}", "missing-file")


def read_bytes(path: str | Path) -> bytes:
    """The bytes of the image file `path`.

    Raises:
        UserError: there is no such file, or it cannot be read.
    """
    path = Path(path)
    try:
        check_exists(path)
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}", "unreadable-file") from error


def decode_rgb(data: bytes, name: str, background: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """Decode the bytes of an image file as `read_image` does.

    Args:
        name: its name in errors.

    Raises:
        UserError: as `read_image`.
    """
    return to_rgb(decode_image(data, name), background, name)


def decode_image(data: bytes, name: str) -> Image.Image:
    """Decode the bytes of an image file in its own mode; `to_rgb` makes it upright and RGB.

    Args:
        name: its name in errors.

    Raises:
        UserError: the bytes are empty, truncated, not an image, or an image larger than `MAX_PIXELS` that is no JPEG of
            at most `MAX_JPEG_PIXELS`.
    """
    if not data:
        raise UserError(f"{name} is empty (0 bytes), not an image", "bad-image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image: Image.Image = Image.open(io.BytesIO(data))
        width, height = image.size
        if width * height > MAX_PIXELS:
            if image.format not in ("JPEG", "MPO") or width * height > MAX_JPEG_PIXELS:
                raise _too_large(name, width * height)
            scale_down(image)
        image.load()
    except UnidentifiedImageError as error:
        raise UserError(f"{name} is not an image in a supported format (PNG, JPEG, WebP, ...)", "bad-image") from error
    except Image.DecompressionBombError as error:
        raise _too_large(name, int(re.findall(r"\((\d+) pixels", str(error))[0])) from error
    except (OSError, SyntaxError, ValueError, EOFError, NotImplementedError) as error:
        raise UserError(f"{name} is truncated or damaged ({error})", "bad-image") from error
    return image


def scale_down(image: Image.Image) -> None:
    """Have a JPEG file of more than `MAX_PIXELS` decoded at the largest of 1/2, 1/4 and 1/8 of its size that has at
    most as many; `image.size` becomes that size."""
    width, height = image.size
    if width * height <= MAX_PIXELS or image.format not in ("JPEG", "MPO"):
        return
    for divisor in (2, 4, 8):
        size = (-(-width // divisor), -(-height // divisor))
        if size[0] * size[1] <= MAX_PIXELS:
            image.draft(None, size)
            return


def _too_large(name: str, pixels: int) -> UserError:
    return UserError(
        f"{name} is too large: {pixels / 10**6:.0f} megapixels, at most {MAX_PIXELS // 10**6} megapixels, or"
        f" {MAX_JPEG_PIXELS // 10**6} as JPEG; make it smaller",
        "bad-image",
    )


def to_rgb(
    image: Image.Image, background: tuple[int, int, int] = (255, 255, 255), name: str = "the image"
) -> Image.Image:
    """Convert to upright sRGB; see `read_image` for how other modes are handled.

    Args:
        name: its name in errors.

    Raises:
        UserError: the value range is ambiguous: non-integer values outside [0, 1], integers below 0 or above 65535,
            NaN or Inf.
    """
    image = upright(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bits(image, name)
    alpha = None
    if image.has_transparency_data:
        # The ICC transform applies to the colour channels alone.
        image = image.convert("LA" if image.mode in ("1", "L", "LA", "La") else "RGBA")
        alpha = image.getchannel("A")
        image = image.getchannel("L") if image.mode == "LA" else image.convert("RGB")
    rgb = _to_srgb(image)
    if alpha is None:
        return rgb
    rgb.putalpha(alpha)
    return Image.alpha_composite(Image.new("RGBA", rgb.size, (*background, 255)), rgb).convert("RGB")


def _eight_bits(image: Image.Image, name: str) -> Image.Image:
    """Scale 16 or 32 bits per pixel (`I;16`, `I`, `F`) to `L`, or `LA` if one grey level is transparent."""
    values = np.asarray(image, dtype=np.float64)
    low, high = values.min(initial=0), values.max(initial=0)
    if not (np.isfinite(low) and np.isfinite(high)):
        raise UserError(f"{name} contains NaN or Inf; replace these values", "bad-image")
    integers = image.mode != "F"
    if (
        low < 0
        or high > (65535 if integers else 255)
        or not (integers or high <= 1 or (values == values.round()).all())
    ):
        kind = "32-bit integers" if integers else "floats"
        expected = "0 to 255, or 0 to 65535 for 16 bits" if integers else "0 to 1, or integer values up to 255"
        raise UserError(
            f"{name} has {kind} from {low:g} to {high:g}; expected {expected}: scale it to 8 bits first", "bad-image"
        )
    # Floats up to 1 are what depth maps hold.
    white = 65535 if image.mode.startswith("I;16") or high > 255 else 255 if integers or high > 1 else 1
    grey = Image.fromarray((values / (white / 255) + 0.5).astype(np.uint8), mode="L")
    key = image.info.get("transparency")
    if isinstance(key, int):
        grey.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8), mode="L"))
    grey.info = {key: value for key, value in image.info.items() if key != "transparency"}
    return grey


def keeps_colours(image: Image.Image) -> bool:
    """Whether the pixel values are sRGB already: no ICC profile, or one of sRGB itself."""
    return _conversion(image) is None


def _to_srgb(image: Image.Image) -> Image.Image:
    """Convert an image without alpha to sRGB by its embedded ICC profile."""
    conversion = _conversion(image)
    if conversion is None:
        return image.convert("RGB")
    mode, transform = conversion
    converted = ImageCms.applyTransform(image if image.mode == mode else image.convert(mode), transform)
    assert converted is not None
    return converted


_PROFILE_MODES = {b"RGB ": "RGB", b"GRAY": "L", b"CMYK": "CMYK", b"Lab ": "LAB"}
"""Colour space in the header of an ICC profile -> mode of its images."""
_NEAR = 2
"""Of 255. A profile that changes no colour by more is a variant of sRGB, and the pixels are kept."""


def _conversion(image: Image.Image) -> tuple[str, ImageCms.ImageCmsTransform] | None:
    """Mode and transform that take `image` to sRGB; None where it is sRGB already, or its profile is damaged or for
    another kind of image."""
    profile = image.info.get("icc_profile") if isinstance(image.info, dict) else None
    mode = _PROFILE_MODES.get(profile[16:20]) if isinstance(profile, bytes) else None
    if image.mode == "LAB" and mode != "LAB":  # not RGB, whatever the profile says
        mode, profile = "LAB", _lab_profile()
    # An RGB profile also applies to grey (its tone curve) and to palettes, which are RGB.
    fits = {"RGB": image.mode not in ("CMYK", "LAB"), "L": image.mode in ("1", "L", "LA", "La")}
    if mode is None or not isinstance(profile, bytes) or not fits.get(mode, image.mode == mode):
        return None
    transform = _transform(profile, mode)
    return None if transform is None else (mode, transform)


@lru_cache(maxsize=64)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Transform from an ICC profile to sRGB; None if it changes nothing, or the profile is damaged."""
    try:
        transform = ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB"), mode, "RGB"
        )
        if mode not in ("RGB", "L"):
            return transform
        levels = np.arange(0, 256, 51 if mode == "RGB" else 1, dtype=np.uint8)
        grid = np.stack(np.meshgrid(*[levels] * len(mode)), axis=-1).reshape(1, -1, len(mode))
        colours = Image.fromarray(grid if mode == "RGB" else grid[..., 0])
        converted = ImageCms.applyTransform(colours, transform)
        assert converted is not None
        change = np.abs(np.asarray(converted, np.int16) - np.asarray(colours.convert("RGB"), np.int16)).max()
        return None if change <= _NEAR else transform
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None


@lru_cache(maxsize=1)
def _lab_profile() -> bytes:
    """The ICC profile of CIE L*a*b*; TIFF files in Lab need not embed one."""
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()


_SEQUENCES = ("GIF", "PNG", "WEBP", "AVIF", "TIFF")
"""Formats whose frames are separate images. (The frames of MPO are gain maps, those of PSD are layers.)"""


def sequence_note(data: bytes, name: str) -> list[str]:
    """A note if an image file has several frames or pages, of which only the first is used."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data))
            several = image.format in _SEQUENCES and getattr(image, "is_animated", False)
    except Exception:  # decode_image reports it
        return []
    return [f"{name} has several frames; only the first is used"] if several else []


def is_flat(image: np.ndarray) -> bool:
    """Whether an image `uint8 [H, W, 3]` is a single colour, within 2 of 255 (JPEG noise)."""
    return bool(np.ptp(image, axis=(0, 1)).max(initial=0) <= _NEAR)


def shapes_differ(first: Sequence[float], second: Sequence[float]) -> bool:
    """Whether two sizes (width, height) have different aspect ratios, within one pixel."""
    return abs(first[0] * second[1] - first[1] * second[0]) > max(*first, *second)


def upright(image: Image.Image) -> Image.Image:
    """Apply EXIF rotation; a damaged EXIF block is ignored."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # Pillow's parsers raise all kinds of errors on a damaged block
        return image


def resize_cover(
    image: Image.Image, width: int, height: int, *, nearest: bool = False, place: float = 0.5
) -> Image.Image:
    """Scale `image` to cover `width` x `height` and crop it.

    Args:
        nearest: nearest-neighbour resampling, for maps whose colours are labels.
        place: position of the crop, from 0 (left, top) to 1.
    """
    if image.size == (width, height):
        return image
    method = Image.Resampling.NEAREST if nearest else Image.Resampling.LANCZOS
    return ImageOps.fit(image, (width, height), method=method, centering=(place, place))


def write_png(path: str | Path, image: Image.Image, text: dict[str, str] | None = None) -> None:
    """Write a PNG atomically, with `text` in its text chunks."""
    info = PngInfo()
    for key, value in (text or {}).items():
        info.add_text(key, value)
    write_atomically(path, lambda temporary: image.save(temporary, format="PNG", pnginfo=info))


def to_tensor(images: Sequence[Image.Image | np.ndarray]) -> Tensor:
    """RGB images of the same size => float tensor `[B, 3, H, W]` in [0, 1]."""
    return stacked(images).float() / 255


def stacked(images: Sequence[Image.Image | np.ndarray]) -> Tensor:
    """RGB images of the same size => `uint8 [B, 3, H, W]`."""
    import torch

    arrays = np.stack([np.asarray(image, dtype=np.uint8) for image in images])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).contiguous()


def to_images(pixels: Tensor) -> list[Image.Image]:
    """Float tensor `[B, 3, H, W]` in [0, 1] => PIL images."""
    arrays = (pixels.detach().float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array) for array in arrays]


def contact_sheet(
    rows: Sequence[Sequence[Image.Image]],
    column_titles: Sequence[str] = (),
    row_titles: Sequence[str] = (),
    cell: int = 128,
    gap: int = 4,
) -> Image.Image:
    """Tile `rows` of images into one image, with cells of `cell` pixels and titles above and at the left."""
    from PIL import ImageDraw, ImageFont

    font = ImageFont.load_default(size=max(11, cell // 9))
    top = cell // 5 + gap if column_titles else gap
    left = max((int(font.getlength(title)) for title in row_titles), default=0) + (2 * gap if row_titles else gap)
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (left + columns * (cell + gap), top + len(rows) * (cell + gap)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(column_titles):
        pen.text((left + column * (cell + gap), gap), title, fill="black", font=font)
    for index, row in enumerate(rows):
        y = top + index * (cell + gap)
        if index < len(row_titles):
            pen.text((gap, y + cell // 2 - cell // 14), row_titles[index], fill="black", font=font)
        for column, image in enumerate(row):
            scale = Image.Resampling.NEAREST if image.width <= cell // 2 else Image.Resampling.LANCZOS
            sheet.paste(image.resize((cell, cell), scale), (left + column * (cell + gap), y))
    return sheet
