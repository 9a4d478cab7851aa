"""How well images of two icons follow their boxes: overlap with what is drawn, and the concept in each box."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import cv2
import numpy as np
import torch
from torch import Tensor

from controlkit.evaluation.features import lite0_features
from controlkit.evaluation.metrics import concept_similarity
from controlkit.nano.evaluation_sets import read_set
from controlkit.nano.scenes import Box, pixels_of

_DISTANCE = 18.0
"""Distance in L*a*b* from the background above which a pixel counts as drawn."""
_SPECK = 4
"""Connected pixels fewer than these are not counted as drawn."""
_MARGIN = 0.15
"""Margin of a crop, as a fraction of the longer side of its box; the gallery's drawings have one, too."""


def mean_iou(images: Sequence[np.ndarray], boxes: Sequence[Sequence[Box]]) -> float:
    """Mean over all boxes of the IoU of a box with the bounding box of what is drawn nearest to it.

    Args:
        images: `uint8 [S, S, 3]`.
        boxes: of each image.
    """
    pairs = [
        pair
        for image, own in zip(images, boxes, strict=True)
        for pair in zip(own, found_boxes(image, own), strict=True)
    ]
    return float(np.mean([_iou(box, found) for box, found in pairs]))


def found_boxes(image: np.ndarray, boxes: Sequence[Box]) -> list[Box | None]:
    """For each box the bounding box of the drawn pixels that are nearer to it than to another; None if there are
    none."""
    drawn = drawn_pixels(image)
    size = len(image)
    y, x = (np.mgrid[:size, :size] + 0.5) / size
    distances = [np.hypot(_outside(x, left, right), _outside(y, top, bottom)) for left, top, right, bottom in boxes]
    nearest = np.argmin(distances, axis=0)
    found: list[Box | None] = []
    for number in range(len(boxes)):
        rows, columns = (np.flatnonzero((drawn & (nearest == number)).any(axis)) for axis in (1, 0))
        found.append(
            (columns[0] / size, rows[0] / size, (columns[-1] + 1) / size, (rows[-1] + 1) / size) if len(rows) else None
        )
    return found


def _outside(x: np.ndarray, low: float, high: float) -> np.ndarray:
    """Distance from the interval from `low` to `high`, 0 within it."""
    return np.maximum(np.maximum(low - x, x - high), 0)


def drawn_pixels(image: np.ndarray) -> np.ndarray:
    """Pixels unlike the background, the median colour of the image's outer pixels, without specks; `bool [S, S]`."""
    lab = cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    frame = np.concatenate([lab[0], lab[-1], lab[:, 0], lab[:, -1]])
    drawn = np.linalg.norm(lab - np.median(frame, axis=0), axis=2) > _DISTANCE
    _, labels, statistics, _ = cv2.connectedComponentsWithStats(drawn.astype(np.uint8))
    return drawn & (statistics[labels, cv2.CC_STAT_AREA] >= _SPECK)


def concept_accuracies(
    images: Sequence[np.ndarray],
    boxes: Sequence[Sequence[Box]],
    concepts: Sequence[Sequence[str]],
    ks: Sequence[int] = (1, 5),
) -> tuple[float, ...]:
    """Fraction of boxes whose crop has the features of the box's concept, among the 50 of the evaluation set `seen`.

    Args:
        images: `uint8 [S, S, 3]`.
        boxes: of each image.
        concepts: of each box.
        ks: the concept must be among so many nearest; one result each.

    Raises:
        UserError: the `metrics` extra is not installed.
    """
    crops = [crop(image, box) for image, own in zip(images, boxes, strict=True) for box in own]
    gallery, gallery_concepts = _gallery()
    names, similarity = concept_similarity(lite0_features(crops), gallery, gallery_concepts)
    expected = torch.tensor([names.index(concept) for own in concepts for concept in own])
    ranks = (similarity > similarity.gather(1, expected[:, None])).sum(1)
    return tuple(float((ranks < k).float().mean()) for k in ks)


@cache
def _gallery() -> tuple[Tensor, list[str]]:
    """Features and concepts of the evaluation set `seen`."""
    drawings = read_set("seen")
    return lite0_features(drawings.images), [drawing.concept for drawing in drawings.examples]


def crop(image: np.ndarray, box: Box) -> np.ndarray:
    """The square around a box with a margin, scaled to the size of the image `uint8 [S, S, 3]`."""
    size = len(image)
    left, top, right, bottom = pixels_of(box, size)
    side = round(max(right - left, bottom - top) * (1 + _MARGIN))
    padded = np.pad(image, ((side, side), (side, side), (0, 0)), mode="edge")
    first_row, first_column = side + (top + bottom - side) // 2, side + (left + right - side) // 2
    part = padded[first_row : first_row + side, first_column : first_column + side]
    return cv2.resize(part, (size, size), interpolation=cv2.INTER_CUBIC)


def _iou(box: Box, found: Box | None) -> float:
    if found is None:
        return 0.0
    width = min(box[2], found[2]) - max(box[0], found[0])
    height = min(box[3], found[3]) - max(box[1], found[1])
    shared = max(width, 0.0) * max(height, 0.0)
    area, other = ((right - left) * (bottom - top) for left, top, right, bottom in (box, found))
    return shared / (area + other - shared)
