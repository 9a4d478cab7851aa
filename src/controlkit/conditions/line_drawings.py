"""Line drawings and straight lines, without learned weights."""

from __future__ import annotations

import cv2
import numpy as np

from controlkit.conditions.condition import BLACK, condition, seed, uniform, uniform_int
from controlkit.conditions.fidelity import COLOUR_DISTANCE, EDGE_F1, PSNR
from controlkit.conditions.pixels import grey, length, smoothed, three_channels, to_uint8


@condition(
    "lineart_xdog",
    summary="white line art on black (XDoG filter; the learned lineart needs weights)",
    background=BLACK,
    aliases=("xdog",),
    fidelity=PSNR,
    random={"scale": uniform(0.0012, 0.004), "sharpness": uniform(20, 60)},
    limits={"scale": (0, 0.2), "sharpness": (0, 1000), "level": (-1, 1)},
    channels=1,
)
def lineart_xdog(
    image: np.ndarray, *, scale: float = 0.0025, sharpness: float = 40.0, level: float = 0.01
) -> np.ndarray:
    """Lines where a channel is darker than its surroundings, by an extended difference of Gaussians.

    Winnemoeller, Kyprianidis and Olsen 2012: difference of Gaussians with ratio 1.6, soft threshold by tanh; inverted,
    because ControlNet's lineart is white on black.

    Args:
        scale: sigma of the finer Gaussian, as a fraction of the short side (at least 0.6 pixels).
        sharpness: slope of the soft threshold (the paper's phi).
        level: how much darker than its surroundings a line is, in [0, 1] (the paper's epsilon, negated).
    """
    return three_channels(_xdog(image, scale, sharpness, level))


@condition(
    "scribble_xdog",
    summary="white strokes on black where the image is darker than around (a thresholded difference of Gaussians)",
    background=BLACK,
    aliases=("fake_scribble_xdog",),
    fidelity=EDGE_F1,
    random={"threshold": uniform_int(16, 48)},
    limits={"threshold": (1, 254)},
    channels=1,
    values=(0, 255),
)
def scribble_xdog(image: np.ndarray, *, threshold: int = 32) -> np.ndarray:
    """White where all channels are darker than their surroundings by more than half of `threshold`.

    Mikubill/sd-webui-controlnet, annotator `scribble_xdog` for ControlNet 1.1: Gaussians of 0.5 and 5 pixels at 512,
    which here scale with the short side.

    Args:
        threshold: for twice the difference, of 255.
    """
    values = image.astype(np.float32)
    fine, coarse = (smoothed(values, length(image, sigma / 512, least=0.5)) for sigma in (0.5, 5.0))
    return three_channels(np.where(2 * (coarse - fine).min(axis=2) > threshold, np.uint8(255), np.uint8(0)))


def _xdog(image: np.ndarray, scale: float, sharpness: float, level: float) -> np.ndarray:
    """White lines on black `uint8 [H, W]`."""
    sigma = length(image, scale, least=0.6)
    values = image.astype(np.float32) / 255
    darker = (smoothed(values, 1.6 * sigma) - smoothed(values, sigma)).max(axis=2)
    return to_uint8(255 * np.tanh(np.maximum(darker - level, 0) * sharpness))


@condition(
    "lines_lsd",
    summary="straight white lines on black (OpenCV's line segment detector; M-LSD needs weights)",
    background=BLACK,
    aliases=("lsd", "straight_lines"),
    fidelity=EDGE_F1,
    random={"shortest": uniform(0.04, 0.15)},
    limits={"shortest": (0, 2), "detail": (0.1, 4)},
    channels=1,
    values=(0, 255),
)
def lines_lsd(image: np.ndarray, *, shortest: float = 0.06, detail: float = 0.8) -> np.ndarray:
    """Line segments a pixel wide.

    Args:
        shortest: segments shorter than this fraction of the short side are dropped.
        detail: scale of detection; images under 256 pixels are upscaled to that first.
    """
    luma = grey(image)
    # The detector is not symmetric; detecting with the darker half at the left makes the result so.
    half = luma.shape[1] // 2
    flipped = bool(luma[:, :half].sum() > luma[:, -half:].sum())
    if flipped:
        luma = cv2.flip(luma, 1)
    # Below about 256 pixels the detector's smallest region is larger than the lines.
    zoom = max(1.0, 256 / max(luma.shape))
    if zoom > 1:
        luma = cv2.resize(luma, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_CUBIC)
    found = cv2.createLineSegmentDetector(cv2.LSD_REFINE_STD, detail).detect(luma)[0]
    canvas = np.zeros(image.shape[:2], np.uint8)
    if found is not None:
        segments = (found.reshape(-1, 2, 2) + 0.5) / zoom - 0.5
        spans = np.linalg.norm(segments[:, 1] - segments[:, 0], axis=1)
        for start, end in np.rint(segments[spans >= length(image, shortest, least=2)]).astype(int):
            cv2.line(canvas, start.tolist(), end.tolist(), 255, 1)
    return three_channels(cv2.flip(canvas, 1) if flipped else canvas)


@condition(
    "lineart_color_hints",
    summary="white line art on black with discs in the image's colours (XDoG lines)",
    background=BLACK,
    aliases=("lineart_colour_hints", "color_hints", "lineart_with_color_prompt"),
    fidelity=COLOUR_DISTANCE,
    random={"scale": uniform(0.0012, 0.004), "seed": seed()},
    limits={"scale": (0, 0.2), "least": (0, 1000), "more": (0, 0.99), "radius": (0, 0.5)},
    mirrors=False,
)
def lineart_color_hints(
    image: np.ndarray,
    *,
    scale: float = 0.0025,
    least: int = 5,
    more: float = 0.9,
    radius: float = 0.03,
    seed: int = 0,
) -> np.ndarray:
    """Line art with colour hints: discs filled with the mean colour below them.

    CtrLoRA, annotator/lineart_anime_with_color_prompt: 5 discs, then another with probability 0.9 each time, radius 2
    to 4 % of the short side. Its lines come from a learned model, and it skips greyscale images.

    Args:
        scale: of the lines, as in `lineart_xdog`.
        least: minimum number of discs.
        more: probability of each further disc.
        radius: mean radius as a fraction of the short side; discs are up to a third smaller or larger.
        seed: of the discs.
    """
    rng = np.random.default_rng(seed)
    height, width = image.shape[:2]
    canvas = three_channels(_xdog(image, scale, 40.0, 0.01))
    for _ in range(least + int(rng.geometric(1 - more)) - 1):
        size = max(1, round(length(image, radius * rng.uniform(2 / 3, 4 / 3))))
        x, y = int(rng.integers(width)), int(rng.integers(height))
        window = (slice(max(0, y - size), y + size + 1), slice(max(0, x - size), x + size + 1))
        mask = np.zeros(image[window].shape[:2], np.uint8)
        cv2.circle(mask, (x - window[1].start, y - window[0].start), size, 255, -1)
        canvas[window][mask > 0] = to_uint8(np.array(cv2.mean(image[window], mask)[:3]))
    return canvas
