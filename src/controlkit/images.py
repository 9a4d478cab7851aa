"""Pictures at the edge of the networks: PIL images in RGB, `uint8` arrays `[H, W, 3]`, and tensors.

Outside the networks a picture is a PIL image or a `uint8` array. Inside, pictures are tensors in [-1, 1] and
condition images are tensors in [0, 1], both `[B, 3, H, W]`.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from controlkit.errors import UserError
from controlkit.files import write_atomically

if TYPE_CHECKING:
    from torch import Tensor

MAX_PIXELS = 8192 * 8192
"""Larger pictures are refused before they are decoded: 20,000 x 20,000 would take 1.2 GB."""


def read_image(path: str | Path, background: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """The picture in `path` as RGB, upright.

    EXIF rotation is applied, transparent pixels are laid over `background`, 16-bit greyscale and
    fractions up to 1 are scaled to 8 bits, palettes and greyscale are expanded.

    Raises:
        UserError: the file is missing, empty, torn, not a picture, or larger than `MAX_PIXELS`.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"there is no picture at {path}: it is a folder; give the name of one picture")
    if not path.is_file():
        raise UserError(f"there is no picture at {path}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from error
    return to_rgb(decode_image(data, str(path)), background)


def decode_image(data: bytes, name: str) -> Image.Image:
    """The picture in the bytes of a file, in whatever mode it has; `to_rgb` makes it upright and RGB.

    Args:
        name: what errors call it.

    Raises:
        UserError: the bytes are none, torn, not a picture, or of one larger than `MAX_PIXELS`.
    """
    if not data:
        raise UserError(f"{name} is empty (0 bytes), not a picture")
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
        raise UserError(f"{name} is not a picture in a format that is read (PNG, JPEG, WebP, ...)") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{name} is too large to be read (over 67 megapixels); make it smaller") from error
    except (OSError, SyntaxError, ValueError, EOFError, NotImplementedError) as error:
        raise UserError(f"{name} is torn or damaged and cannot be read ({error})") from error
    return image


def to_rgb(image: Image.Image, background: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """`image` upright and in RGB; see `read_image` for how other modes are turned."""
    image = _upright(image)
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        if image.mode.startswith("I;16") or values.max(initial=0) > 255:
            values = values / 257.0
        elif image.mode == "F" and values.max(initial=0) <= 1:  # as depth maps are
            values = values * 255.0
        image = Image.fromarray(np.clip(values + 0.5, 0, 255).astype(np.uint8), mode="L")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        canvas = Image.new("RGBA", rgba.size, (*background, 255))
        return Image.alpha_composite(canvas, rgba).convert("RGB")
    return image.convert("RGB")


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
    """RGB pictures of one size => float tensor `[B, 3, H, W]` in [0, 1]."""
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
    """One picture with `rows` of pictures in cells of `cell` pixels, titles above and at the left."""
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
