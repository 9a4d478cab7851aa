"""OpenPose skeletons: drawing people from keypoints, and scoring two skeleton images.

A person is an array `float [points, 2]` of (x, y) in pixels, NaN where a point was not found. The body has 18 points,
a hand 21, a face 68. Widths are those of ControlNet at a short side of 512 pixels and scale with the image.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np

from controlkit.conditions.condition import Fidelity
from controlkit.conditions.pixels import length, packed

COLOURS = tuple(
    tuple(round(255 * part) for part in colour)
    for colour in (
        *((1, third / 3, 0) for third in range(3)),
        *((1 - third / 3, 1, 0) for third in range(3)),
        *((0, 1, third / 3) for third in range(3)),
        *((0, 1 - third / 3, 1) for third in range(3)),
        *((third / 3, 0, 1) for third in range(3)),
        *((1, 0, 1 - third / 3) for third in range(3)),
    )
)
"""Colours of the body's 18 points, once around the hue circle from red for the nose."""

_NECK, _NOSE = 1, 0
LIMBS = (
    *((_NECK, 2), (_NECK, 5), (2, 3), (3, 4), (5, 6), (6, 7)),
    *((_NECK, 8), (8, 9), (9, 10), (_NECK, 11), (11, 12), (12, 13)),
    *((_NECK, _NOSE), (_NOSE, 14), (14, 16), (_NOSE, 15), (15, 17)),
)
"""Pairs of points: shoulders and arms, hips and legs, head; limb n has colour n at 60 %."""

_FINGERS = tuple(
    (0 if joint == 0 else 4 * finger + joint, 4 * finger + joint + 1) for finger in range(5) for joint in range(4)
)
_HAND, _FACE = (0, 0, 255), (255, 255, 255)
_FINGER_COLOURS = tuple(
    tuple(int(255 * part) for part in colorsys.hsv_to_rgb(number / len(_FINGERS), 1, 1))
    for number in range(len(_FINGERS))
)
_SHARED = frozenset(index for index, colour in enumerate(COLOURS) if colour in (_HAND, *_FINGER_COLOURS))
"""Points of the body with a colour that hands have, too: the nose and both knees."""
_COVERS = {4: _HAND, 7: _HAND, **dict.fromkeys((14, 15, 16, 17), _FACE)}
"""Points of the body that a hand or a face may cover, with the colour of its dots: wrists; eyes and ears."""
# COCO's 17 points have no neck and another order; -1 is the middle of the shoulders.
_FROM_COCO = (0, -1, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)


@dataclass(frozen=True, kw_only=True)
class Person:
    """The points of one person, each `float [points, 2]`, NaN where not found."""

    body: np.ndarray
    """18 points in OpenPose's order."""
    hands: Sequence[np.ndarray] = field(default=())
    """21 points each, from the wrist along each finger."""
    face: np.ndarray | None = None
    """68 points."""


def from_coco(points: np.ndarray) -> np.ndarray:
    """The 17 points of COCO's order `[17, 2]` => OpenPose's 18 `[18, 2]`, with a neck between the shoulders."""
    neck = (points[5] + points[6]) / 2
    return np.stack([neck if index < 0 else points[index] for index in _FROM_COCO])


def draw_people(people: Iterable[Person], height: int, width: int) -> np.ndarray:
    """Skeletons on black, `uint8 [height, width, 3]`. lllyasviel/ControlNet-v1-1-nightly, annotator/openpose."""
    canvas = np.zeros((height, width, 3), np.uint8)
    for person in people:
        _draw_body(canvas, person.body)
        for hand in person.hands:
            _draw_hand(canvas, hand)
        if person.face is not None:
            radius = max(1, round(length(canvas, 3 / 512)))
            _draw_points(canvas, person.face, [_FACE] * len(person.face), radius)
    return canvas


def _draw_body(canvas: np.ndarray, points: np.ndarray) -> None:
    thickness = max(1, round(length(canvas, 4 / 512)))
    for (start, end), colour in zip(LIMBS, COLOURS, strict=False):
        pair = points[[start, end]]
        if not np.isfinite(pair).all():
            continue
        (x1, y1), (x2, y2) = pair.tolist()
        middle = int((x1 + x2) / 2), int((y1 + y2) / 2)
        axes = int(math.hypot(x1 - x2, y1 - y2) / 2), thickness
        angle = int(math.degrees(math.atan2(y1 - y2, x1 - x2)))
        outline = cv2.ellipse2Poly(middle, axes, angle, 0, 360, 1)
        cv2.fillConvexPoly(canvas, outline, [int(part * 0.6) for part in colour])
    _draw_points(canvas, points, COLOURS, thickness)


def _draw_hand(canvas: np.ndarray, points: np.ndarray) -> None:
    for (start, end), colour in zip(_FINGERS, _FINGER_COLOURS, strict=True):
        pair = points[[start, end]]
        if np.isfinite(pair).all():
            first, second = pair.astype(int).tolist()
            cv2.line(canvas, first, second, colour, max(1, round(length(canvas, 2 / 512))))
    _draw_points(canvas, points, [_HAND] * len(points), max(1, round(length(canvas, 4 / 512))))


def _draw_points(canvas: np.ndarray, points: np.ndarray, colours: Sequence[Sequence[int]], radius: int) -> None:
    for point, colour in zip(points, colours, strict=True):
        if np.isfinite(point).all():
            cv2.circle(canvas, point.astype(int).tolist(), radius, tuple(colour), -1)


def read_points(image: np.ndarray) -> dict[int, np.ndarray]:
    """Index -> centres `[N, 2]` (x, y) of the body's points in a skeleton image, if there are any.

    A point is a connected patch of exactly its colour. Covered points are missed, and parts of hands have the colours
    of the nose and the knees.
    """
    colours, points = packed(image), {}
    for index, colour in enumerate(COLOURS):
        count, _, _, centres = cv2.connectedComponentsWithStats(_where(colours, colour), connectivity=8)
        if count > 1:
            points[index] = centres[1:]
    return points


def _where(colours: np.ndarray, colour: Sequence[int]) -> np.ndarray:
    """Mask `uint8 [H, W]` of the pixels of a colour, from `packed` colours."""
    return (colours == packed(np.array([[colour]], np.uint8))[0, 0]).astype(np.uint8)


def pose_f1(reference: np.ndarray, result: np.ndarray, reach: float = 0.05) -> float:
    """F1, in [0, 1], of the body's points in two skeleton images `uint8 [H, W, 3]` without hands and faces.

    PCK (percentage of correct keypoints) in both directions, with `reach` times the longer side as radius: a point is
    correct if the other image has one of its kind that near, so missing and surplus people count. Two images without
    people score 1.
    """
    true, predicted = read_points(reference), read_points(result)
    return _points_f1(true, predicted, true, predicted, reach * max(reference.shape[:2]))


def whole_body_f1(reference: np.ndarray, result: np.ndarray, reach: float = 0.05) -> float:
    """`pose_f1` of the body in images that may have hands and faces, which do not count themselves.

    Nose and knees are left out, because hands have their colours. A wrist is also correct near a hand of the other
    image, and an eye or ear near a face, because these may cover it there.
    """
    true, predicted = (
        {index: points for index, points in read_points(image).items() if index not in _SHARED}
        for image in (reference, result)
    )
    near_true, near_predicted = _with_covers(reference, true), _with_covers(result, predicted)
    return _points_f1(true, predicted, near_true, near_predicted, reach * max(reference.shape[:2]))


def _with_covers(image: np.ndarray, points: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
    """The points, with the pixels of what may cover others of their kind."""
    colours, found = packed(image), dict(points)
    for index, cover in _COVERS.items():
        pixels = np.argwhere(_where(colours, cover))[:, ::-1].astype(float)
        if len(pixels):
            found[index] = np.concatenate([points.get(index, np.empty((0, 2))), pixels])
    return found


def _points_f1(
    true: dict[int, np.ndarray],
    predicted: dict[int, np.ndarray],
    near_true: dict[int, np.ndarray],
    near_predicted: dict[int, np.ndarray],
    radius: float,
) -> float:
    """F1 of points, each correct within `radius` of one of its kind in `near_true` or `near_predicted`."""
    if not true and not predicted:
        return 1.0
    found = [_near(points, near_predicted.get(index), radius) for index, points in true.items()]
    correct = [_near(points, near_true.get(index), radius) for index, points in predicted.items()]
    recall, precision = (float(np.concatenate(part).mean()) if part else 0.0 for part in (found, correct))
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _near(points: np.ndarray, others: np.ndarray | None, radius: float) -> np.ndarray:
    if others is None:
        return np.zeros(len(points), bool)
    return np.linalg.norm(points[:, None] - others[None], axis=-1).min(axis=1) <= radius


POSE_F1 = Fidelity(name="pose F1", compare=pose_f1)
WHOLE_BODY_F1 = Fidelity(name="pose F1 without nose and knees", compare=whole_body_f1)
