"""Images for the tests of conditions: drawn, not read, so that they have any size."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np


def draw_scene(height: int = 64, width: int = 64, number: int = 0) -> np.ndarray:
    """Coloured shapes on a plain background, `uint8 [height, width, 3]`, a little out of focus."""
    rng = np.random.default_rng([number, height, width])
    image = np.empty((height, width, 3), np.uint8)
    image[:] = rng.integers(0, 256, 3)
    for _ in range(5):
        colour = tuple(int(value) for value in rng.integers(0, 256, 3))
        corners = rng.uniform(0.15, 0.85, (4, 2)) * [width, height]
        if rng.random() < 0.5:
            cv2.fillConvexPoly(image, cv2.convexHull(corners.astype(np.int32)), colour)
        else:
            radius = int(rng.uniform(0.1, 0.3) * min(height, width))
            cv2.circle(image, corners[0].astype(int).tolist(), radius, colour, -1)
    return cv2.GaussianBlur(image, (3, 3), 0)


def needed(name: str) -> dict[str, Any]:
    """Parameters without which the condition `name` cannot be drawn."""
    box = {"bbox": [5, 5, 30, 40], "category_id": 3}
    triangle = {"segmentation": [[2, 2, 60, 10, 30, 60]], "category_id": 7}
    return {"bbox": {"boxes": [box]}, "segments": {"segments": [triangle]}}.get(name, {})
