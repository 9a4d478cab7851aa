"""Image helpers of conditions: lengths relative to the image, grids, colours, smooth random fields."""

from __future__ import annotations

import cv2
import numpy as np
from PIL import Image

REMAP_SIDE = 32766
"""Largest height and width of images that OpenCV's `remap` takes."""


def short_side(image: np.ndarray) -> int:
    """The smaller of height and width of `[H, W, ...]`."""
    return min(image.shape[:2])


def length(image: np.ndarray, fraction: float, least: float = 0.0) -> float:
    """`fraction` of the short side in pixels, at least `least`."""
    return max(least, fraction * short_side(image))


def grey(image: np.ndarray) -> np.ndarray:
    """`uint8 [H, W, 3]` RGB => luma `uint8 [H, W]`."""
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)


def mirrored_normals(image: np.ndarray, *, reverse: bool = False) -> np.ndarray:
    """Flip a normal map: mirror it, and negate the x component.

    Args:
        reverse: x is in the third channel (blue) instead of the first (red).
    """
    flipped = np.ascontiguousarray(image[:, ::-1])
    channel = 2 if reverse else 0
    flipped[..., channel] = 255 - flipped[..., channel]
    return flipped


def three_channels(values: np.ndarray) -> np.ndarray:
    """`uint8 [H, W]` => `uint8 [H, W, 3]`."""
    return cv2.cvtColor(values, cv2.COLOR_GRAY2RGB)


def to_uint8(values: np.ndarray) -> np.ndarray:
    """Floats from 0 to 255 => `uint8`, rounded and clipped."""
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def smoothed(values: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur by `sigma` pixels; the same array below 0.2."""
    return values if sigma < 0.2 else cv2.GaussianBlur(values, (0, 0), sigma)


def disc(diameter: float) -> np.ndarray:
    """Round structuring element of about `diameter` pixels (odd, at least 1)."""
    side = 2 * round((diameter - 1) / 2) + 1 if diameter > 1 else 1
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))


def grid_size(image: np.ndarray, cells: int) -> tuple[int, int]:
    """(columns, rows) of nearly square cells, `cells` along the short side, each at least a pixel."""
    height, width = image.shape[:2]
    side = short_side(image) / cells
    return min(width, max(1, round(width / side))), min(height, max(1, round(height / side)))


def reduced(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Mean colour of each of `size` (columns, rows) cells, `uint8 [rows, columns, 3]`.

    Averaged with the flipped image, so that a flip of the image exactly flips the cells: OpenCV rounds from left to
    right, and colours chosen from the cells can jump at a difference of one level.
    """
    forward, flipped = (cv2.resize(view, size, interpolation=cv2.INTER_AREA) for view in (image, cv2.flip(image, 1)))
    return ((forward.astype(np.uint16) + flipped[:, ::-1] + 1) // 2).astype(np.uint8)


def enlarge(cells: np.ndarray, height: int, width: int) -> np.ndarray:
    """Cells `[h, w, ...]` => `[height, width, ...]`, each a flat block; the blocks are symmetric."""
    rows, columns = _blocks(height, cells.shape[0]), _blocks(width, cells.shape[1])
    return cells[rows][:, columns]


def _blocks(size: int, count: int) -> np.ndarray:
    """Index of the block, of `count`, of each of `size` pixels; symmetric about the middle."""
    first = (2 * np.arange((size + 1) // 2) + 1) * count // (2 * size)
    first = np.minimum(first, (count - 1) // 2)
    return np.concatenate([first, count - 1 - first[: size // 2][::-1]])


def packed(image: np.ndarray) -> np.ndarray:
    """`uint8 [H, W, 3]` => `int32 [H, W]`, a number per colour."""
    return (image.astype(np.int32) * np.array([65536, 256, 1], np.int32)).sum(axis=-1, dtype=np.int32)


def nearest_colour(image: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Index `[H, W]` of the colour of `palette [N, 3]` nearest to each pixel in RGB, the first on ties."""
    pixels, colours = image.reshape(-1, 3).astype(np.float32), palette.astype(np.float32)
    # Integers below 2**24 are exact in float32, so equal pixels get equal indices wherever they are.
    closeness = colours @ pixels.T - (colours**2).sum(axis=1, keepdims=True) / 2
    return closeness.argmax(axis=0).reshape(image.shape[:2])


def main_colours(image: np.ndarray, count: int) -> np.ndarray:
    """At most `count` representative colours `uint8 [N, 3]`: median cut, then k-means (Pillow).

    Computed at 96 pixels or less, which keeps every region larger than a speck.
    """
    height, width = image.shape[:2]
    small = reduced(image, (min(width, 96), min(height, 96)))
    order = np.argsort(packed(small), axis=None, kind="stable")
    pixels = Image.fromarray(small.reshape(1, -1, 3)[:, order])
    quantised = pixels.quantize(count, Image.Quantize.MEDIANCUT, kmeans=1, dither=Image.Dither.NONE)
    return np.unique(np.asarray(quantised.convert("RGB")).reshape(-1, 3), axis=0)


def smooth_field(rng: np.random.Generator, height: int, width: int, cell: float) -> np.ndarray:
    """A random field `float32 [height, width]` in [0, 1] that varies over about `cell` pixels."""
    rows, columns = max(2, round(height / cell) + 2), max(2, round(width / cell) + 2)
    knots = rng.random((rows, columns), dtype=np.float32)
    field = cv2.resize(knots, (width, height), interpolation=cv2.INTER_CUBIC)
    return cv2.normalize(field, None, 0.0, 1.0, cv2.NORM_MINMAX)
