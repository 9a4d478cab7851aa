"""Heuristic check for swapped source and target sides, from a sample of pairs."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from controlkit.conditions import find, registry

Images = tuple[np.ndarray, np.ndarray]
"""Condition image and image, both `uint8 [H, W, 3]` of the same size."""

_ABSTRACTIONS = (
    *("canny", "sketch", "scribble", "softedge_sobel", "lineart_xdog", "lines_lsd"),
    *("grayscale", "palette", "silhouette", "illusion"),
)
"""Conditions that discard most of an image. Degradations (noise, rain) add detail, and a blur of their result comes
close to the image, so they cannot show which side is which."""

_FEWEST = 4
_FITTED = 6
_NEAR, _NEAR_RANDOM = 4.0, 16.0
"""Mean difference, of 255, up to which a side counts as a condition of the other: for deterministic conditions, and for
those whose parameters may have been sampled."""
_LESS = 0.15
_MUCH_LESS = 0.4
"""Median drop of log detail from condition image to image."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A finding that sides are probably swapped."""

    certainty: str
    """`likely`, or `possible`."""
    text: str


def find_swapped_sides(pairs: Sequence[Images], name: str = "") -> Verdict | None:
    """Judge a sample; None if the sides look right, or there are fewer than four pairs.

    Three tests. Likely: images are grey and condition images are not. Likely: images have less detail, and a known
    condition computes them from the condition images. Possible: images have much less detail, since conditions such as
    noise and rain add some.

    Args:
        name: the condition's name; if it is a known one, no other is tried.
    """
    if len(pairs) < _FEWEST:
        return None
    grey_images = float(np.mean([_is_grey(target) for _, target in pairs]))
    grey_conditions = float(np.mean([_is_grey(source) for source, _ in pairs]))
    if grey_images >= 0.9 and grey_conditions <= 0.5:
        text = (
            f"condition images and images are most likely swapped: {grey_images:.0%} of the images are grey, and"
            f" {grey_conditions:.0%} of the condition images"
        )
        return Verdict(certainty="likely", text=text)
    gains = np.array([np.log(_detail(target) / _detail(source)) for source, target in pairs])
    less = float(np.mean(gains < 0))
    reversed_condition = (
        _reversed_condition(pairs[:_FITTED], name) if np.median(gains) < -_LESS and less >= 0.8 else None
    )
    if reversed_condition is not None:
        text = (
            "condition images and images are most likely swapped: the images are what"
            f" {reversed_condition} computes from the condition images"
        )
        return Verdict(certainty="likely", text=text)
    if np.median(gains) < -_MUCH_LESS and less >= 0.9:
        text = (
            f"{less:.0%} of the images have less detail than their condition images: the sides may be swapped, or this"
            " condition adds detail (noise, rain, masks); look at the sheet"
        )
        return Verdict(certainty="possible", text=text)
    return None


def _reversed_condition(pairs: Sequence[Images], name: str) -> str | None:
    """The condition that maps condition images to images far better than any maps images to condition images."""
    known = [condition.name for condition in registry().values() if condition.name == name and not condition.requires]
    forward: dict[str, float] = {}
    backward: dict[str, float] = {}
    for candidate in known or _ABSTRACTIONS:
        condition = find(candidate)
        forward[candidate] = float(np.median([_distance(condition(target), source) for source, target in pairs]))
        backward[candidate] = float(np.median([_distance(condition(source), target) for source, target in pairs]))
    best = min(backward, key=lambda candidate: backward[candidate])
    near = _NEAR_RANDOM if find(best).random else _NEAR
    return best if backward[best] <= near and backward[best] < 0.6 * min(forward.values()) else None


def _distance(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.abs(first.astype(np.int16) - second.astype(np.int16)).mean())


def _is_grey(image: np.ndarray) -> bool:
    return float(np.ptp(image, axis=2).mean()) < 2.0


def _detail(image: np.ndarray, side: int = 48) -> int:
    """Compressed size in bytes of a small, coarsely quantised copy: a measure of detail."""
    height, width = image.shape[:2]
    scale = min(1.0, side / min(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = cv2.cvtColor(cv2.resize(image, size, interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2YCrCb)
    planes = (small[..., 0] >> 3, small[..., 1] >> 4, small[..., 2] >> 4)
    return sum(len(zlib.compress(np.diff(plane.astype(np.int8), axis=1).tobytes(), 9)) for plane in planes)
