"""Are condition images and images exchanged? Told from a sample of pairs, with how certain it is."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from controlkit.conditions import find, registry

Images = tuple[np.ndarray, np.ndarray]
"""Condition image and image, `uint8 [H, W, 3]` of one size."""

_ABSTRACTIONS = (
    *("canny", "sketch", "scribble", "softedge_sobel", "lineart_xdog", "lines_lsd"),
    *("grayscale", "palette", "silhouette", "illusion"),
)
"""Conditions that leave much out. Those that damage an image add detail, and a blur of their result comes near the
image, so that they say nothing about which side is which."""

_FEWEST = 4
_FITTED = 6
_NEAR, _NEAR_FOR_DRAWN = 4.0, 16.0
"""Mean difference, of 255, up to which a condition made the image: one that is always the same, and one whose
parameters may have been drawn."""
_LESS = 0.15
_MUCH_LESS = 0.4


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Sides that seem to be exchanged."""

    certainty: str
    """`likely`, or `possible`."""
    text: str


def find_swapped_sides(pairs: Sequence[Images], name: str = "") -> Verdict | None:
    """A verdict about a sample; None if nothing speaks for exchanged sides, or there are fewer than four pairs.

    Three tests: whether images are grey and condition images are not; whether a known condition makes the image of
    the condition image, where the image also has less detail; whether it has much less detail, which is only possible
    since conditions such as noise and rain add some.

    Args:
        name: what the condition is called; if that is a known condition, no other is tried.
    """
    if len(pairs) < _FEWEST:
        return None
    grey_images = float(np.mean([_is_grey(target) for _, target in pairs]))
    grey_conditions = float(np.mean([_is_grey(source) for source, _ in pairs]))
    if grey_images >= 0.9 and grey_conditions <= 0.5:
        text = (
            f"condition images and images are exchanged, most likely: {grey_images:.0%} of the images are grey,"
            f" and {grey_conditions:.0%} of the condition images"
        )
        return Verdict(certainty="likely", text=text)
    gains = np.array([np.log(_detail(target) / _detail(source)) for source, target in pairs])
    less = float(np.mean(gains < 0))
    fitting = _fitting_backwards(pairs[:_FITTED], name) if np.median(gains) < -_LESS and less >= 0.8 else None
    if fitting is not None:
        text = f"condition images and images are exchanged, most likely: the images are what {fitting} makes of them"
        return Verdict(certainty="likely", text=text)
    if np.median(gains) < -_MUCH_LESS and less >= 0.9:
        text = (
            f"{less:.0%} of the images have less detail than their condition images: the sides may be exchanged,"
            " or this condition adds to the image (noise, rain, masks); the sheet shows which"
        )
        return Verdict(certainty="possible", text=text)
    return None


def _fitting_backwards(pairs: Sequence[Images], name: str) -> str | None:
    """The condition that makes the images of the condition images far better than any makes it the other way."""
    tried = [made.name for made in registry().values() if made.name == name and made.requires is None]
    forward: dict[str, float] = {}
    backward: dict[str, float] = {}
    for candidate in tried or _ABSTRACTIONS:
        condition = find(candidate)
        forward[candidate] = float(np.median([_distance(condition(target), source) for source, target in pairs]))
        backward[candidate] = float(np.median([_distance(condition(source), target) for source, target in pairs]))
    best = min(backward, key=lambda candidate: backward[candidate])
    near = _NEAR_FOR_DRAWN if find(best).random else _NEAR
    return best if backward[best] <= near and backward[best] < 0.6 * min(forward.values()) else None


def _distance(made: np.ndarray, image: np.ndarray) -> float:
    return float(np.abs(made.astype(np.int16) - image.astype(np.int16)).mean())


def _is_grey(image: np.ndarray) -> bool:
    return float(np.ptp(image, axis=2).mean()) < 2.0


def _detail(image: np.ndarray, side: int = 48) -> int:
    """Bytes that a small copy of the image takes, coarsely rounded: how much there is to see."""
    height, width = image.shape[:2]
    scale = min(1.0, side / min(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = cv2.cvtColor(cv2.resize(image, size, interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2YCrCb)
    planes = (small[..., 0] >> 3, small[..., 1] >> 4, small[..., 2] >> 4)
    return sum(len(zlib.compress(np.diff(plane.astype(np.int8), axis=1).tobytes(), 9)) for plane in planes)
