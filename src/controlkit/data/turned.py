"""Annotations of photos with an EXIF rotation, whose coordinates may refer to the image before it."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from controlkit.conditions import Condition
from controlkit.errors import UserError
from controlkit.images import shapes_differ

_ORIENTATION = 0x0112
_TURNS = {
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what makes an image upright, of those that exchange width and height."""


def compute_upright(condition: Condition, image: np.ndarray, data: bytes, parameters: Mapping[str, Any]) -> np.ndarray:
    """The condition image `uint8 [H, W, 3]` of an upright image, also from annotations whose coordinates refer to the
    image before its EXIF rotation.

    Args:
        image: the upright image, `uint8 [H, W, 3]`.
        data: the bytes of its file.
        parameters: those of the condition; `size` is the width and height that coordinates refer to.

    Raises:
        UserError: an image of that size has another shape than this one, upright or not.
    """
    height, width = image.shape[:2]
    turn = turn_of(parameters, (width, height), data)
    if turn is None:
        return condition(image, **parameters)
    drawn = condition(np.zeros((width, height, 3), np.uint8), **parameters)
    return np.asarray(Image.fromarray(drawn).transpose(turn))


def turn_of(parameters: Mapping[str, Any], upright: tuple[int, int], data: bytes) -> Image.Transpose | None:
    """What turns a drawing of annotations upright; None if they refer to the upright image, whose size is given.

    Raises:
        UserError: they are for an image of another shape.
    """
    size = parameters.get("size")
    if size is None or not shapes_differ(size, upright):
        return None
    turn = _TURNS.get(_orientation_of(data))
    if turn is None or shapes_differ(size, upright[::-1]):
        raise UserError(
            f"the annotations are for an image of {size[0]:g} x {size[1]:g}, and the image is {upright[0]} x"
            f" {upright[1]}; correct width and height in the list, or take the image that it was made for",
            "bad-data",
        )
    return turn


def _orientation_of(data: bytes) -> int:
    """EXIF orientation in the bytes of an image file; 1 (upright) if they cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return orientation(Image.open(io.BytesIO(data)))
    except Exception:  # decode_image reports it
        return 1


def orientation(image: Image.Image) -> int:
    """EXIF orientation; 1 (upright) for a damaged EXIF block."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged blocks warn
            return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # Pillow's parsers raise all kinds of errors on a damaged block
        return 1
