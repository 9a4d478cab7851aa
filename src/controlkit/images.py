"""Images at the edge of the networks: PIL images in RGB, `uint8` arrays `[H, W, 3]`, and tensors.

Outside the networks an image is a PIL image or a `uint8` array. Inside, images are tensors in [-1, 1] and
condition images are tensors in [0, 1], both `[B, 3, H, W]`.
"""

from __future__ import annotations

import io
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
"""Larger images are refused before they are decoded: 20,000 x 20,000 would take 1.2 GB."""


def read_image(path: str | Path, background: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """The image in `path` as RGB, upright.

    EXIF rotation is applied, an embedded ICC profile is converted to sRGB, transparent pixels are laid over
    `background`, palettes and greyscale are expanded. Of several frames the first is taken. 16-bit greyscale and
    fractions from 0 to 1 are scaled to 8 bits; whole numbers up to 255 stay as they are.

    Raises:
        UserError: the file is missing, empty, torn, not an image, larger than `MAX_PIXELS`, or its numbers have no one
            meaning as an image (`to_rgb`).
    """
    return decode_rgb(read_bytes(path), str(path), background)


def read_bytes(path: str | Path) -> bytes:
    """The bytes of the image file `path`.

    Raises:
        UserError: there is no such file, or it cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"there is no image at {path}: it is a folder; give the name of one image")
    if not path.is_file():
        raise UserError(f"there is no image at {path}")
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from error


def decode_rgb(data: bytes, name: str, background: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """The image in the bytes of a file as `read_image` gives it.

    Args:
        name: what errors call it.

    Raises:
        UserError: as `read_image`.
    """
    return to_rgb(decode_image(data, name), background, name)


def decode_image(data: bytes, name: str) -> Image.Image:
    """The image in the bytes of a file, in whatever mode it has; `to_rgb` makes it upright and RGB.

    Args:
        name: what errors call it.

    Raises:
        UserError: the bytes are none, torn, not an image, or of one larger than `MAX_PIXELS`.
    """
    if not data:
        raise UserError(f"{name} is empty (0 bytes), not an image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image: Image.Image = Image.open(io.BytesIO(data))
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise UserError(
                f"{name} is {width} x {height}, more than the {MAX_PIXELS // 2**20} megapixels that are read;"
                " make it smaller"
            )
        image.load()
    except UnidentifiedImageError as error:
        raise UserError(f"{name} is not an image in a format that is read (PNG, JPEG, WebP, ...)") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{name} is too large to be read (over 67 megapixels); make it smaller") from error
    except (OSError, SyntaxError, ValueError, EOFError, NotImplementedError) as error:
        raise UserError(f"{name} is torn or damaged and cannot be read ({error})") from error
    return image


def to_rgb(
    image: Image.Image, background: tuple[int, int, int] = (255, 255, 255), name: str = "the image"
) -> Image.Image:
    """`image` upright and in sRGB; see `read_image` for how other modes are converted.

    Args:
        name: what errors call it.

    Raises:
        UserError: its numbers have no one meaning as an image: fractions outside [0, 1], whole numbers below 0 or above
            65535, NaN.
    """
    image = _upright(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bits(image, name)
    alpha = None
    if image.has_transparency_data:
        # Colours are converted without their alpha, which is no colour.
        image = image.convert("LA" if image.mode in ("1", "L", "LA", "La") else "RGBA")
        alpha = image.getchannel("A")
        image = image.getchannel("L") if image.mode == "LA" else image.convert("RGB")
    rgb = _to_srgb(image)
    if alpha is None:
        return rgb
    rgb.putalpha(alpha)
    return Image.alpha_composite(Image.new("RGBA", rgb.size, (*background, 255)), rgb).convert("RGB")


def _eight_bits(image: Image.Image, name: str) -> Image.Image:
    """An image of 16 or 32 bits a pixel (`I;16`, `I`, `F`) as `L`, or `LA` if one grey level is transparent."""
    values = np.asarray(image, dtype=np.float64)
    low, high = values.min(initial=0), values.max(initial=0)
    if not (np.isfinite(low) and np.isfinite(high)):
        raise UserError(f"{name} holds NaN or infinite values; replace them before it is used as an image")
    whole = image.mode != "F"
    if low < 0 or high > (65535 if whole else 255) or not (whole or high <= 1 or (values == values.round()).all()):
        kind = "32-bit integers" if whole else "fractions"
        read = "0 to 255, or 0 to 65535 for 16 bits," if whole else "0 to 1, or whole numbers up to 255,"
        raise UserError(f"{name} holds {kind} from {low:g} to {high:g}; {read} are read: scale it to 8 bits first")
    # Fractions up to 1 are as in depth maps.
    white = 65535 if image.mode.startswith("I;16") or high > 255 else 255 if whole or high > 1 else 1
    grey = Image.fromarray((values / (white / 255) + 0.5).astype(np.uint8), mode="L")
    key = image.info.get("transparency")
    if isinstance(key, int):
        grey.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8), mode="L"))
    grey.info = {key: value for key, value in image.info.items() if key != "transparency"}
    return grey


def keeps_colours(image: Image.Image) -> bool:
    """Whether an image's numbers are sRGB as they are: it has no ICC profile, or one of sRGB itself."""
    return _conversion(image) is None


def _to_srgb(image: Image.Image) -> Image.Image:
    """`image`, without alpha, as RGB in sRGB, by its embedded ICC profile."""
    conversion = _conversion(image)
    if conversion is None:
        return image.convert("RGB")
    mode, transform = conversion
    made = ImageCms.applyTransform(image if image.mode == mode else image.convert(mode), transform)
    assert made is not None
    return made


_PROFILE_MODES = {b"RGB ": "RGB", b"GRAY": "L", b"CMYK": "CMYK", b"Lab ": "LAB"}
"""Colour space in the header of an ICC profile -> mode of the images that it is for."""
_NEAR = 2
"""Of 255: a profile that changes no colour more is one of sRGB, of which there are several; pixels are then kept."""


def _conversion(image: Image.Image) -> tuple[str, ImageCms.ImageCmsTransform] | None:
    """The mode and the transform by which `image` becomes sRGB; None where its numbers are sRGB already, or its profile
    is damaged or of another kind of image."""
    profile = image.info.get("icc_profile") if isinstance(image.info, dict) else None
    mode = _PROFILE_MODES.get(profile[16:20]) if isinstance(profile, bytes) else None
    if image.mode == "LAB" and mode != "LAB":  # which is not RGB, whatever its profile says
        mode, profile = "LAB", _lab_profile()
    # An RGB profile holds for grey, too: its tone curve. A palette is one of RGB.
    fits = {"RGB": image.mode not in ("CMYK", "LAB"), "L": image.mode in ("1", "L", "LA", "La")}
    if mode is None or not isinstance(profile, bytes) or not fits.get(mode, image.mode == mode):
        return None
    transform = _transform(profile, mode)
    return None if transform is None else (mode, transform)


@lru_cache(maxsize=64)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From the colours of an ICC profile to sRGB; None if that changes nothing, or the profile is damaged."""
    try:
        transform = ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB"), mode, "RGB"
        )
        if mode not in ("RGB", "L"):
            return transform
        levels = np.arange(0, 256, 51 if mode == "RGB" else 1, dtype=np.uint8)
        grid = np.stack(np.meshgrid(*[levels] * len(mode)), axis=-1).reshape(1, -1, len(mode))
        colours = Image.fromarray(grid if mode == "RGB" else grid[..., 0])
        made = ImageCms.applyTransform(colours, transform)
        assert made is not None
        change = np.abs(np.asarray(made, np.int16) - np.asarray(colours.convert("RGB"), np.int16)).max()
        return None if change <= _NEAR else transform
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None


@lru_cache(maxsize=1)
def _lab_profile() -> bytes:
    """Of CIE L*a*b*, which TIFF files in Lab need not embed."""
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()


_SEQUENCES = ("GIF", "PNG", "WEBP", "AVIF", "TIFF")
"""Formats whose frames are images of their own. (Those of MPO are a photo's gain map, those of PSD its layers.)"""


def sequence_note(data: bytes, name: str) -> list[str]:
    """A note if the bytes of an image's file hold several frames or pages, of which only the first is read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data))
            several = image.format in _SEQUENCES and getattr(image, "is_animated", False)
    except Exception:  # whatever it is, decode_image says it
        return []
    return [f"{name} has several frames; only the first is used"] if several else []


def is_flat(image: np.ndarray) -> bool:
    """Whether an image `uint8 [H, W, 3]` is one colour all over, give or take 2 of 255 (as JPEG leaves it)."""
    return bool(np.ptp(image, axis=(0, 1)).max(initial=0) <= _NEAR)


def _upright(image: Image.Image) -> Image.Image:
    """`image` turned as its EXIF block says; a damaged block says nothing."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # Pillow's parsers raise whatever a damaged block makes them stumble over
        return image


def resize_cover(image: Image.Image, width: int, height: int, *, nearest: bool = False) -> Image.Image:
    """`image` scaled to cover `width` x `height` and cropped around its centre.

    Args:
        nearest: keep colours as they are, for maps whose colours are labels.
    """
    if image.size == (width, height):
        return image
    method = Image.Resampling.NEAREST if nearest else Image.Resampling.LANCZOS
    return ImageOps.fit(image, (width, height), method=method)


def write_png(path: str | Path, image: Image.Image, text: dict[str, str] | None = None) -> None:
    """Write `image` as PNG with `text` in its text chunks, atomically."""
    info = PngInfo()
    for key, value in (text or {}).items():
        info.add_text(key, value)
    write_atomically(path, lambda temporary: image.save(temporary, format="PNG", pnginfo=info))


def to_tensor(images: Sequence[Image.Image | np.ndarray]) -> Tensor:
    """RGB images of one size => float tensor `[B, 3, H, W]` in [0, 1]."""
    import torch

    arrays = np.stack([np.asarray(image, dtype=np.uint8) for image in images])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).contiguous().float() / 255


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
    """One image with `rows` of images in cells of `cell` pixels, titles above and at the left."""
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
