"""Joint crops and flips of a condition image and its image.

A `View` is a square crop in relative coordinates, so that it fits both sides even at different resolutions. It is
sampled first, then applied to both, or to the image before the condition is computed from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from controlkit.conditions import Condition
from controlkit.conditions.condition import left_right


@dataclass(frozen=True, kw_only=True)
class View:
    """A square crop, optionally flipped."""

    place: float = 0.5
    """Position of the square along the long side, from 0 (left, top) to 1."""
    flip: bool = False
    """Flip horizontally after the crop."""

    def __post_init__(self) -> None:
        if not 0 <= self.place <= 1:
            raise ValueError(f"place is {self.place}, not from 0 to 1")


CENTRE = View()
"""The centre crop, not flipped."""


def random_view(rng: np.random.Generator, *, crop: bool = True, flip: bool = True) -> View:
    """Sample a view; both numbers are always drawn, so that `crop` and `flip` do not shift the state of `rng`."""
    place, flipped = float(rng.random()), bool(rng.random() < 0.5)
    return View(place=place if crop else 0.5, flip=flip and flipped)


def apply_view(image: np.ndarray, view: View, size: int, *, nearest: bool = False) -> np.ndarray:
    """`uint8 [H, W, 3]` => its view, `uint8 [size, size, 3]`.

    Args:
        nearest: nearest-neighbour resampling, for maps whose colours are labels.
    """
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = round(view.place * (height - side)), round(view.place * (width - side))
    part = image[top : top + side, left : left + side]
    if side != size:
        smooth = cv2.INTER_AREA if side > size else cv2.INTER_LANCZOS4
        part = cv2.resize(part, (size, size), interpolation=cv2.INTER_NEAREST_EXACT if nearest else smooth)
    return np.ascontiguousarray(part[:, ::-1] if view.flip else part)


def apply_view_to_pair(
    source: np.ndarray,
    target: np.ndarray,
    view: View,
    size: int,
    condition: Condition | None = None,
    parameters: Mapping[str, Any] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The same view of a finished condition image and its image, both `uint8 [size, size, 3]`.

    Args:
        condition: the condition, if known: label maps keep their colours, normals are flipped in x.
        parameters: those with which the condition image was made, if known.

    Raises:
        UserError: the view is flipped, and images of this condition cannot be.
    """
    nearest = condition is not None and condition.resize == "nearest"
    cropped = apply_view(source, View(place=view.place), size, nearest=nearest)
    if view.flip:
        cropped = left_right(cropped) if condition is None else condition.mirrored(cropped, parameters)
    return cropped, apply_view(target, view, size)


def compute_pair(
    image: np.ndarray, condition: Condition, view: View, size: int, parameters: Mapping[str, Any] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Condition image and image of a view, both `uint8 [size, size, 3]`, the condition computed after the crop.

    Conditions that depend on a seed and not only on the image (masks, noise) would not follow a flip, so such a pair
    is computed unflipped and then flipped on both sides. Annotations (`bbox`, `segments`) refer to the uncropped
    image: compute these first, then use `apply_view_to_pair`.
    """
    if condition.mirrors or condition.mirror_finished is not left_right:
        target = apply_view(image, view, size)
        return condition(target, **(parameters or {})), target
    target = apply_view(image, View(place=view.place), size)
    source = condition(target, **(parameters or {}))
    if view.flip:
        source, target = left_right(source), left_right(target)
    return source, target
