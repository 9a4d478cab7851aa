"""Scenes: two icons in boxes over a background, to train and evaluate controls of boxes with phrases on nano."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from controlkit.evaluation.sets import Example
from controlkit.nano.icons import COLOURS, Icon, background, caption_of, paste, to_uint8

SIDES = (0.34, 0.5)
"""Longer side of an icon, as a fraction of the scene's."""
_VISIBLE = 20
"""Alpha above which a pixel of an icon counts as drawn, of 255."""
_TRIES = 50

Box = tuple[float, float, float, float]
"""Left, top, right and bottom, as fractions of width and height."""


@dataclass(frozen=True, kw_only=True)
class Scene(Example):
    """Two icons of one style; the caption is `red apple and cat face, noto style, on a blue background`."""

    concepts: tuple[str, str]
    boxes: tuple[Box, Box]
    """Of the visible pixels of each icon; they do not overlap."""
    style: str
    colour: str

    @property
    def inputs(self) -> dict[str, Any]:
        """The input of a control: boxes with phrases."""
        return _inputs(self.concepts, self.boxes)

    @property
    def swapped(self) -> dict[str, Any]:
        """The same with the phrases exchanged."""
        return _inputs(self.concepts[::-1], self.boxes)


def _inputs(concepts: Sequence[str], boxes: Sequence[Box]) -> dict[str, Any]:
    phrases = map(caption_of, concepts)
    return {"boxes": [{"box": list(box), "phrase": phrase} for box, phrase in zip(boxes, phrases, strict=True)]}


def by_style(icons: Sequence[Icon]) -> Mapping[str, Sequence[Icon]]:
    """Style -> its icons, of the styles with at least two."""
    groups: dict[str, list[Icon]] = defaultdict(list)
    for icon in icons:
        groups[icon.style].append(icon)
    return {style: group for style, group in groups.items() if len(group) > 1}


def draw_scene(styles: Mapping[str, Sequence[Icon]], rng: np.random.Generator, size: int = 64) -> Scene:
    """Compose two random icons of one style at random places that do not overlap.

    Args:
        styles: of `by_style`.
    """
    style = list(styles)[rng.integers(len(styles))]
    group = styles[style]
    first, second = (group[index] for index in rng.choice(len(group), 2, replace=False))
    cut = [_visible(icon.rgba) for icon in (first, second)]
    places = _places([rgba.shape[:2] for rgba in cut], rng, size)
    colour = list(COLOURS)[rng.integers(len(COLOURS))]
    image = background(colour, rng, size)
    for rgba, (left, top, width, height) in zip(cut, places, strict=True):
        paste(image, rgba, left, top, width, height)
    one, other = (
        (left / size, top / size, (left + width) / size, (top + height) / size) for left, top, width, height in places
    )
    return Scene(
        image=to_uint8(image),
        caption=scene_caption((first.concept, second.concept), style, colour),
        concepts=(first.concept, second.concept),
        boxes=(one, other),
        style=style,
        colour=colour,
    )


def scene_caption(concepts: Sequence[str], style: str | None = None, colour: str | None = None) -> str:
    """A caption, without parts that are None."""
    return caption_of(" and ".join(concepts), style, colour)


def picture_of_boxes(boxes: Sequence[Box], size: int = 64) -> np.ndarray:
    """Outlines of boxes, white on black, `uint8 [size, size, 3]`; the first box is filled with grey."""
    image = np.zeros((size, size, 3), np.uint8)
    for number, box in enumerate(boxes):
        left, top, right, bottom = pixels_of(box, size)
        if number == 0:
            image[top:bottom, left:right] = 96
        cv2.rectangle(image, (left, top), (right - 1, bottom - 1), (255, 255, 255))
    return image


def pixels_of(box: Box, size: int) -> tuple[int, int, int, int]:
    """A box in pixels of a square image, at least one wide and high."""
    left, top, right, bottom = (round(side * size) for side in box)
    return left, top, max(right, left + 1), max(bottom, top + 1)


def _visible(rgba: np.ndarray) -> np.ndarray:
    """The part of an icon within the bounding box of its visible pixels."""
    rows, columns = (np.flatnonzero((rgba[..., 3] > _VISIBLE).any(axis)) for axis in (1, 0))
    return rgba[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _places(shapes: Sequence[tuple[int, int]], rng: np.random.Generator, size: int) -> list[tuple[int, int, int, int]]:
    """Left, top, width and height in pixels for two icons of these heights and widths, which do not overlap."""
    while True:
        sides = [size * rng.uniform(*SIDES) / max(shape) for shape in shapes]
        extents = [(max(4, round(w * s)), max(4, round(h * s))) for (h, w), s in zip(shapes, sides, strict=True)]
        for _ in range(_TRIES):
            one, other = (
                (int(rng.integers(size - width + 1)), int(rng.integers(size - height + 1)), width, height)
                for width, height in extents
            )
            apart = [
                one[axis] + one[axis + 2] <= other[axis] or other[axis] + other[axis + 2] <= one[axis]
                for axis in (0, 1)
            ]
            if any(apart):
                return [one, other]
