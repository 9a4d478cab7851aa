"""Edges from image gradients, without learned weights."""

from __future__ import annotations

import cv2
import numpy as np

from controlkit.conditions.condition import BLACK, chance, condition, uniform, uniform_int
from controlkit.conditions.fidelity import DARK_EDGE_F1, EDGE_F1, PSNR
from controlkit.conditions.pixels import length, smoothed, three_channels, to_uint8
from controlkit.errors import UserError

_STRONGEST = 6 * 255
"""The largest |dx| + |dy| of a 3 x 3 Sobel gradient of 8 bits, with which Canny compares its thresholds."""


@condition(
    "canny",
    summary="thin white edges on black (OpenCV's Canny detector)",
    background=BLACK,
    aliases=("canny_edges", "canny_edge"),
    fidelity=EDGE_F1,
    random={"low": uniform_int(50, 150), "high": uniform_int(150, 250)},
    limits={"low": (0, _STRONGEST), "high": (0, _STRONGEST)},
    channels=1,
    values=(0, 255),
)
def canny(image: np.ndarray, *, low: int = 100, high: int = 200) -> np.ndarray:
    """Canny edges with hysteresis thresholds `low` and `high`, on gradients of 0 to 1530.

    Defaults: lllyasviel/ControlNet, annotator/canny. ControlNet 1.1 trains with random thresholds.

    Raises:
        UserError: `low` is above `high`.
    """
    if low > high:
        raise UserError(f"canny: low is {low} and high is {high}; low must not exceed high", "contradiction")
    return three_channels(cv2.Canny(image, low, high))


@condition(
    "softedge_sobel",
    summary="soft white edges on black (Sobel gradient; HED and PiDiNet need weights)",
    background=BLACK,
    aliases=("sobel", "soft_edge_sobel"),
    fidelity=PSNR,
    random={"scale": uniform(0.002, 0.008), "gain": uniform(1.5, 3.0), "safe": chance(0.75)},
    limits={"scale": (0, 0.2), "gain": (0, 100)},
    channels=1,
)
def softedge_sobel(image: np.ndarray, *, scale: float = 0.004, gain: float = 2.0, safe: bool = False) -> np.ndarray:
    """Magnitude of the colour gradient, the maximum over channels, white on black.

    Args:
        scale: sigma of the blur that precedes it, as a fraction of the short side.
        gain: brightness; at 1, only a step from black to white is white.
        safe: three levels only, `floor(3 x) / 2`, as for 75 % of ControlNet 1.1's soft edges in training.
    """
    edges = _soft_edges(image, scale, gain)
    if safe:
        edges = np.minimum(np.floor(edges * 3) / 2, 1)
    return three_channels(to_uint8(edges * 255))


def _soft_edges(image: np.ndarray, scale: float, gain: float) -> np.ndarray:
    """Gradient magnitude `float32 [H, W]` in [0, 1]."""
    sigma = length(image, scale)
    blurred = smoothed(image, sigma)
    # Sobel in 16 bits is exact, so a flipped image gives exactly the flipped edges.
    across = cv2.Sobel(blurred, cv2.CV_16S, 1, 0).astype(np.float32)
    down = cv2.Sobel(blurred, cv2.CV_16S, 0, 1).astype(np.float32)
    squared = across**2 + down**2
    strongest = np.maximum(np.maximum(squared[..., 0], squared[..., 1]), squared[..., 2])
    # A blur divides a gradient by about its width in pixels; compensated, edges are as strong at any size.
    return np.minimum(np.sqrt(strongest) * (gain * max(1.0, 1.25 * sigma) / (4 * 255)), 1)


@condition(
    "scribble",
    summary="broad white strokes along the main edges (Canny on a blurred image; a fake hand scribble)",
    background=BLACK,
    aliases=("scribble_edges", "fake_scribble"),
    fidelity=EDGE_F1,
    random={"width": uniform(0.004, 0.047), "scale": uniform(0.008, 0.02), "shortest": uniform(0.05, 0.15)},
    limits={"width": (0, 0.2), "scale": (0, 0.2), "shortest": (0, 2)},
    channels=1,
    values=(0, 255),
)
def scribble(image: np.ndarray, *, width: float = 0.012, scale: float = 0.012, shortest: float = 0.1) -> np.ndarray:
    """Strokes of one width, without detail. ControlNet makes its scribbles from HED or PiDiNet, which need weights.

    Args:
        width: of the strokes, as a fraction of the short side. ControlNet 1.1's have up to 24 pixels of 512.
        scale: sigma of the blur that precedes it, as a fraction of the short side: how much detail is dropped.
        shortest: strokes that span less than this fraction of the short side are dropped.
    """
    rows, columns = image.shape[:2]
    # Canny needs steep edges, so it runs at a scale at which the blur is about a pixel.
    zoom = max(1.0, length(image, scale))
    size = max(1, round(columns / zoom)), max(1, round(rows / zoom))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    lines = cv2.Canny(smoothed(small, length(small, scale)), 50, 120)
    outlines, _ = cv2.findContours(lines, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    canvas = np.zeros(image.shape[:2], np.uint8)
    stretch = np.array([columns / size[0], rows / size[1]])
    thickness = max(1, round(length(image, width)))
    for outline in outlines:
        points = np.rint(((outline + 0.5) * stretch - 0.5) * 16).astype(np.int32)
        if np.ptp(points, axis=0).max() >= 16 * length(image, shortest):
            cv2.polylines(canvas, [points], True, 255, thickness, cv2.LINE_8, 4)
    return three_channels(canvas)


@condition(
    "sketch",
    summary="dark pencil strokes on white (thresholded Sobel edges)",
    aliases=("sketch_sobel",),
    fidelity=DARK_EDGE_F1,
    random={"threshold": uniform_int(110, 159)},
    limits={"threshold": (1, 255), "scale": (0, 0.2)},
    channels=1,
)
def sketch(image: np.ndarray, *, threshold: int = 134, scale: float = 0.005) -> np.ndarray:
    """Edges stronger than `threshold` of 255, dark on white, softened.

    CtrLoRA's hedsketch (annotator/hedsketch) on Sobel gradients in place of HED: threshold 110 to 159, inverted, 3 x 3
    Gaussian, repeated until 0.5 % of the pixels are dark, at most six times. The reference samples its threshold at
    random even in evaluation; here it is a parameter, and each retry lowers it by a quarter.
    """
    return three_channels(dark_strokes(_soft_edges(image, scale, 2.5) * 255, threshold))


def dark_strokes(edges: np.ndarray, threshold: float) -> np.ndarray:
    """Edges `[H, W]` (0 to 255) of at least `threshold`, black on white, softened by 3 x 3, `uint8 [H, W]`.

    While less than 0.5 % of the pixels are dark, the threshold is lowered by a quarter, up to five times.
    """
    dark = edges >= threshold
    for attempt in range(1, 6):
        if dark.mean() > 0.005:
            break
        dark = edges >= threshold * 0.75**attempt
    return cv2.GaussianBlur(np.where(dark, np.uint8(0), np.uint8(255)), (3, 3), 0)
