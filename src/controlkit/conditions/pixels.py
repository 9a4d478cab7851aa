"""What kinds of condition share: lengths that scale with the image, grids, colours, smooth fields."""

from __future__ import annotations

import cv2
import numpy as np
from PIL import Image


def short_side(image: np.ndarray) -> int:
    """The smaller of height and width of `[H, W, ...]`."""
    return min(image.shape[:2])


def length(image: np.ndarray, fraction: float, least: float = 0.0) -> float:
    """`fraction` of the short side in pixels, at least `least`."""
    return max(least, fraction * short_side(image))


def grey(image: np.ndarray) -> np.ndarray:
    """`uint8 [H, W, 3]` RGB => luma `uint8 [H, W]`."""
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)


def mirrored_normals(image: np.ndarray) -> np.ndarray:
    """A map of normals as that of the flipped image: the part along x, in red, points the other way."""
    turned = np.ascontiguousarray(image[:, ::-1])
    turned[..., 0] = 255 - turned[..., 0]
    return turned


def three_channels(values: np.ndarray) -> np.ndarray:
    """`uint8 [H, W]` => `uint8 [H, W, 3]`."""
    return cv2.cvtColor(values, cv2.COLOR_GRAY2RGB)


def to_uint8(values: np.ndarray) -> np.ndarray:
    """Floats on the scale of 0 to 255 => `uint8`, rounded and clipped."""
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def smoothed(values: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur by `sigma` pixels; the same array if that is too little to matter."""
    return values if sigma < 0.2 else cv2.GaussianBlur(values, (0, 0), sigma)


def disc(diameter: float) -> np.ndarray:
    """Round structuring element of about `diameter` pixels (odd, at least 1)."""
    side = 2 * round((diameter - 1) / 2) + 1 if diameter > 1 else 1
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))


def grid_size(image: np.ndarray, cells: int) -> tuple[int, int]:
    """(columns, rows) of about square cells, `cells` of them along the short side, none under a pixel."""
    height, width = image.shape[:2]
    side = short_side(image) / cells
    return min(width, max(1, round(width / side))), min(height, max(1, round(height / side)))


def reduced(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Means over the areas of `size` (columns, rows) cells, `uint8 [rows, columns, 3]`.

    The mean of both directions, so that a flipped image has exactly the flipped cells: OpenCV rounds from left to
    right, and colours that are chosen by the cells can jump at a difference of one level.
    """
    straight, turned = (cv2.resize(view, size, interpolation=cv2.INTER_AREA) for view in (image, cv2.flip(image, 1)))
    return ((straight.astype(np.uint16) + turned[:, ::-1] + 1) // 2).astype(np.uint8)


def enlarge(cells: np.ndarray, height: int, width: int) -> np.ndarray:
    """Cells `[h, w, ...]` => `[height, width, ...]`, each a flat block; blocks lie symmetrically."""
    rows, columns = _blocks(height, cells.shape[0]), _blocks(width, cells.shape[1])
    return cells[rows][:, columns]


def _blocks(size: int, count: int) -> np.ndarray:
    """Which of `count` blocks each of `size` pixels falls in, symmetric about the middle."""
    first = (2 * np.arange((size + 1) // 2) + 1) * count // (2 * size)
    first = np.minimum(first, (count - 1) // 2)
    return np.concatenate([first, count - 1 - first[: size // 2][::-1]])


def packed(image: np.ndarray) -> np.ndarray:
    """`uint8 [H, W, 3]` => `int32 [H, W]`, one number for each colour."""
    return (image.astype(np.int32) * np.array([65536, 256, 1], np.int32)).sum(axis=-1, dtype=np.int32)


def nearest_colour(image: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Index `[H, W]` of the colour of `palette [N, 3]` nearest to each pixel in RGB, the first of equals."""
    pixels, colours = image.reshape(-1, 3).astype(np.float32), palette.astype(np.float32)
    # Whole numbers below 2**24 are exact in float32, so equal pixels get equal answers wherever they stand.
    closeness = colours @ pixels.T - (colours**2).sum(axis=1, keepdims=True) / 2
    return closeness.argmax(axis=0).reshape(image.shape[:2])


def main_colours(image: np.ndarray, count: int) -> np.ndarray:
    """At most `count` colours `uint8 [N, 3]` that stand for the image: median cut, then k-means (Pillow).

    Chosen on a reduction to 96 pixels, which keeps every region that is larger than a speck.
    """
    height, width = image.shape[:2]
    small = reduced(image, (min(width, 96), min(height, 96)))
    order = np.argsort(packed(small), axis=None, kind="stable")
    pixels = Image.fromarray(small.reshape(1, -1, 3)[:, order])
    quantised = pixels.quantize(count, Image.Quantize.MEDIANCUT, kmeans=1, dither=Image.Dither.NONE)
    return np.unique(np.asarray(quantised.convert("RGB")).reshape(-1, 3), axis=0)


def smooth_field(rng: np.random.Generator, height: int, width: int, cell: float) -> np.ndarray:
    """A random field `float32 [height, width]` that varies over about `cell` pixels, from 0 to 1."""
    rows, columns = max(2, round(height / cell) + 2), max(2, round(width / cell) + 2)
    knots = rng.random((rows, columns), dtype=np.float32)
    field = cv2.resize(knots, (width, height), interpolation=cv2.INTER_CUBIC)
    return cv2.normalize(field, None, 0.0, 1.0, cv2.NORM_MINMAX)
