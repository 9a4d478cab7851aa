"""Images with a black part for the control to fill in: inpainting and outpainting."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from controlkit.conditions.condition import BLACK, condition, seed, truncated_normal, uniform
from controlkit.conditions.fidelity import RESTORED_PSNR
from controlkit.conditions.pixels import length
from controlkit.errors import UserError


@condition(
    "inpaint",
    summary="the image with a black rectangle to fill in",
    background=BLACK,
    aliases=("inpainting", "inpaint_box"),
    fidelity=RESTORED_PSNR,
    random={"seed": seed()},
    mirrors=False,
    croppable=False,
)
def inpaint(image: np.ndarray, *, box: Sequence[float] | None = None, seed: int = 0) -> np.ndarray:
    """A black rectangle near the middle.

    CtrLoRA, annotator/inpainting and scripts/tool_make_cond_images.py: in each direction two extents, normal between 20
    and 80 % of the image; half of the smaller lies before the middle, half of the larger after it. Extents outside that
    range, which can leave an empty rectangle or one beyond the image, are drawn again here.

    Args:
        box: left, top, right, bottom as fractions of width and height, in place of a random rectangle.
        seed: of the random rectangle.

    Raises:
        UserError: `box` is not four fractions in this order.
    """
    if box is None:
        rng = np.random.default_rng(seed)
        left, right = _span(rng)
        top, bottom = _span(rng)
    else:
        try:
            left, top, right, bottom = (float(side) for side in box)
        except (TypeError, ValueError) as error:
            message = (
                f"inpaint: box must be [left,top,right,bottom] as fractions, such as [0.1,0.1,0.5,0.5], not {box!r}"
            )
            raise UserError(message, "wrong-type") from error
        if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            raise UserError(
                f"inpaint: box must have 0 <= left < right <= 1 and 0 <= top < bottom <= 1, not {box!r}", "out-of-range"
            )
    height, width = image.shape[:2]
    masked = image.copy()
    masked[round(top * height) : round(bottom * height), round(left * width) : round(right * width)] = 0
    return masked


def _span(rng: np.random.Generator) -> tuple[float, float]:
    """Two sides in order, around the middle."""
    extent = truncated_normal(0.2, 0.8)
    smaller, larger = sorted((extent(rng), extent(rng)))
    return (1 - smaller) / 2, (1 + larger) / 2


@condition(
    "inpaint_brush",
    summary="the image with black brush strokes to fill in",
    background=BLACK,
    aliases=("inpainting_brush", "free_form_inpaint"),
    fidelity=RESTORED_PSNR,
    random={"seed": seed()},
    mirrors=False,
    croppable=False,
)
def inpaint_brush(image: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Black, jagged brush strokes.

    CtrLoRA, annotator/inpainting_brush (after Yu et al. 2019, arXiv 1806.03589): 5 to 9 strokes of 4 to 18 steps, 2 to
    10 % of the short side wide. Steps turn up and down by turns, each by 2 pi / 5 give or take 2 pi / 15; after each
    stroke, the mask is flipped at random.
    """
    rng = np.random.default_rng(seed)
    height, width = image.shape[:2]
    mask = np.zeros((height, width), np.uint8)
    step = np.hypot(height, width) / 8
    for _ in range(int(rng.integers(5, 10))):
        narrowest, widest = 2 * np.pi / 5 + rng.uniform(0, 2 * np.pi / 15, 2) * [-1, 1]
        thickness = max(1, round(length(image, rng.uniform(0.02, 0.10))))
        point = rng.uniform(0, [width, height])
        vertices = [point]
        for index in range(int(rng.integers(4, 19))):
            angle = rng.uniform(narrowest, widest) * (1 if index % 2 else -1)
            reach = np.clip(rng.normal(step, step / 2), 0, 2 * step)
            point = np.clip(point + reach * np.array([np.cos(angle), np.sin(angle)]), 0, [width - 1, height - 1])
            vertices.append(point)
        path = np.rint(vertices).astype(np.int32)
        cv2.polylines(mask, [path[:, None]], False, 255, thickness)
        for x, y in path.tolist():
            cv2.circle(mask, (x, y), thickness // 2, 255, -1)
        for axis in (0, 1):
            if rng.random() < 0.5:
                mask = np.ascontiguousarray(np.flip(mask, axis))
    masked = image.copy()
    masked[mask > 0] = 0
    return masked


@condition(
    "outpaint",
    summary="the middle of the image on black, to extend outwards",
    background=BLACK,
    aliases=("outpainting", "pad", "uncrop"),
    fidelity=RESTORED_PSNR,
    random={"keep_width": uniform(0.2, 0.8), "keep_height": uniform(0.2, 0.8)},
    limits={"keep_width": (0, 1), "keep_height": (0, 1)},
    croppable=False,
)
def outpaint(image: np.ndarray, *, keep_width: float = 0.5, keep_height: float = 0.5) -> np.ndarray:
    """A centred rectangle of the image on black.

    CtrLoRA, annotator/outpainting: keeps 20 to 79 % of each side; `pad` on its web page keeps 50 %.
    """
    height, width = image.shape[:2]
    top, left = round(height * (1 - keep_height) / 2), round(width * (1 - keep_width) / 2)
    visible = np.zeros_like(image)
    window = (slice(top, height - top), slice(left, width - left))
    visible[window] = image[window]
    return visible
