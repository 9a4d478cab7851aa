"""Crops and flips of a condition image and its image together.

A view says which square of a pair is shown, in fractions, so that it fits both even where their resolutions differ. It
is drawn first and then applied to both, or to the image and a condition computed from it.
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
    """Which square of an image is shown, and whether it is mirrored."""

    place: float = 0.5
    """Where along the long side the square lies, 0 (left, top) to 1."""
    flip: bool = False
    """Whether left and right are exchanged after the crop."""

    def __post_init__(self) -> None:
        if not 0 <= self.place <= 1:
            raise ValueError(f"place is {self.place}, not from 0 to 1")


CENTRE = View()
"""The square in the middle, as it is."""


def random_view(rng: np.random.Generator, *, crop: bool = True, flip: bool = True) -> View:
    """A view for one training step; both numbers are drawn whatever is asked for, so that no option shifts `rng`."""
    place, mirrored = float(rng.random()), bool(rng.random() < 0.5)
    return View(place=place if crop else 0.5, flip=flip and mirrored)


def apply_view(image: np.ndarray, view: View, size: int, *, nearest: bool = False) -> np.ndarray:
    """`uint8 [H, W, 3]` => the view of it, `uint8 [size, size, 3]`.

    Args:
        nearest: keep colours as they are when scaling, for maps whose colours are labels.
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
    source: np.ndarray, target: np.ndarray, view: View, size: int, condition: Condition | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The same view of a finished condition image and its image, both `uint8 [size, size, 3]`.

    Args:
        condition: which one it is, where that is known: label maps keep their colours, normals turn round.

    Raises:
        UserError: the view is mirrored, and images of this condition cannot be.
    """
    upright = View(place=view.place)
    shown = apply_view(source, upright, size, nearest=condition is not None and condition.resize == "nearest")
    if view.flip:
        shown = left_right(shown) if condition is None else condition.mirrored(shown)
    return shown, apply_view(target, view, size)


def compute_pair(
    image: np.ndarray, condition: Condition, view: View, size: int, parameters: Mapping[str, Any] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Condition image and image of a view, both `uint8 [size, size, 3]`, the condition computed after the crop.

    It is computed from what is shown, with one exception: a mask or noise of a fixed seed would stay where it was when
    the image turns round. Such a pair is made upright and mirrored as a whole, so the same view with and without the
    flip shows the same pair. Annotations (`bbox`, `segments`) are measured in the whole image: draw these first, then
    `apply_view_to_pair`.
    """
    if condition.mirrors or condition.mirror_finished is not left_right:
        target = apply_view(image, view, size)
        return condition(target, **(parameters or {})), target
    target = apply_view(image, View(place=view.place), size)
    source = condition(target, **(parameters or {}))
    if view.flip:
        source, target = left_right(source), left_right(target)
    return source, target
