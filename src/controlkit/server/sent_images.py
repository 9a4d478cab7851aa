"""Images that clients send: base64 or bytes, checked by their headers; never a path, never a URL."""

from __future__ import annotations

import base64
import binascii
import io
import re
import warnings

from PIL import Image, UnidentifiedImageError

from controlkit.errors import UserError
from controlkit.server.limits import Limits

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""Formats that are read: those of browsers. Every other parser would only add attack surface."""
_DATA_URL = re.compile(r"data:[\w.+-]*/?[\w.+-]*(;[\w.=+-]+)*;base64,", re.ASCII)


def decode_base64(text: str, name: str, limits: Limits) -> bytes:
    """The bytes of an image sent as base64, with or without `data:image/png;base64,` before it.

    Args:
        name: the image's name in errors.

    Raises:
        UserError: it is not base64, not an image, or too large.
    """
    found = _DATA_URL.match(text[:200])
    plain = text[found.end() :] if found else text
    try:
        data = base64.b64decode("".join(plain.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(
            f"{name} is not base64; send the bytes of the image, not a path and not a URL", "bad-image"
        ) from error
    return checked_image(data, name, limits)


def checked_image(data: bytes, name: str, limits: Limits) -> bytes:
    """`data`, checked by its header to be an image of an allowed size; it is not decoded.

    Raises:
        UserError: it is empty, not an image of a supported format, or has too many pixels.
    """
    if not data:
        raise UserError(f"{name} is empty", "bad-image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            Image.init()  # else the plugins of some formats are not there yet
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                width, height = image.size
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise UserError(f"{name} is not an image in a supported format ({', '.join(_FORMATS)})", "bad-image") from error
    if width * height > limits.input_pixels:
        raise UserError(
            f"{name} is {width} x {height}; this server allows {limits.input_pixels / 1e6:.1f} megapixels", "bad-image"
        )
    return data


def encode_base64(data: bytes) -> str:
    """Bytes as base64."""
    return base64.b64encode(data).decode("ascii")
