"""Conditions whose content comes with the data: COCO annotations, or finished condition images.

Annotations are lists of COCO objects, each with `category_id` and `bbox` or `segmentation`, in pixels of the image or,
if it was scaled since, of `size` (width, height). Checking a result against them would need a detector or segmenter;
without one, fidelity is the colour distance to the target image.
"""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np

from controlkit.conditions.coco import BOX_COLOURS
from controlkit.conditions.condition import BLACK, condition
from controlkit.conditions.fidelity import IMAGE_COLOUR_DISTANCE, IMAGE_EDGE_F1, RESTORED_PSNR
from controlkit.errors import UserError


@condition(
    "identity",
    summary="the image as it is, for pairs with finished condition images",
    aliases=("given", "custom", "ip2p", "instruct_pix2pix"),
    fidelity=RESTORED_PSNR,
    provided=True,
)
def identity(image: np.ndarray) -> np.ndarray:
    """A copy of `image`. Fidelity compares the result with the target of the pair."""
    return image.copy()


@condition(
    "lineart_given",
    summary="hand-drawn line art of finished pairs, scored by edges",
    aliases=("drawing", "hand_drawn"),
    fidelity=IMAGE_EDGE_F1,
    provided=True,
)
def lineart_given(image: np.ndarray) -> np.ndarray:
    """A copy of `image`. Fidelity compares the edges of the result with those of the target of the pair."""
    return image.copy()


@condition(
    "bbox",
    summary="filled boxes coloured by class, from annotations (COCO)",
    background=BLACK,
    aliases=("boxes", "bounding_boxes", "bounding_box"),
    fidelity=IMAGE_COLOUR_DISTANCE,
    mirrors=False,
    resize="nearest",
    provided=True,
)
def bbox(
    image: np.ndarray,
    *,
    boxes: Sequence[Any] | None = None,
    size: Sequence[float] | None = None,
) -> np.ndarray:
    """Boxes filled with the colour of their class on black, the largest first.

    CtrLoRA, annotator/bbox, draws YOLOv4 detections the same way, and in the same colours (`coco.BOX_COLOURS`). Classes
    that COCO's 80 lack have those of `category_colour`.

    Args:
        boxes: COCO objects with `bbox` (left, top, width, height) and `category_id`, or bare
            `[left, top, width, height]`, of class 0.
        size: width and height of the image in whose pixels they are; default: this image's.

    Raises:
        UserError: `boxes` is missing or malformed.
    """
    found = []
    for entry in _annotation_list("bbox", "boxes", boxes):
        category, sides = 0, entry
        if isinstance(entry, Mapping):
            category, sides = entry.get("category_id", 0), entry.get("bbox")
        try:
            left, top, width, height = (float(side) for side in sides)
            if not np.isfinite([left, top, width, height]).all():
                raise ValueError("sides must be finite")
            found.append((width * height, left, top, left + width, top + height, int(category)))
        except (TypeError, ValueError, OverflowError) as error:
            raise UserError(f"bbox: a box must be [left, top, width, height], not {entry!r}", "bad-data") from error
    across, down = _scale(image, "bbox", size)
    canvas = np.zeros_like(image)
    for _, left, top, right, bottom, category in sorted(found, key=lambda box: -box[0]):
        rows = slice(max(0, round(top * down)), max(0, round(bottom * down)))
        columns = slice(max(0, round(left * across)), max(0, round(right * across)))
        canvas[rows, columns] = BOX_COLOURS.get(category) or category_colour(category)
    return canvas


@condition(
    "segments",
    summary="regions coloured by class, from annotations (COCO polygons and run lengths)",
    background=BLACK,
    aliases=("coco_segments", "segmentation_given"),
    fidelity=IMAGE_COLOUR_DISTANCE,
    mirrors=False,
    resize="nearest",
    provided=True,
)
def segments(
    image: np.ndarray,
    *,
    segments: Sequence[Any] | None = None,
    size: Sequence[float] | None = None,
) -> np.ndarray:
    """Regions filled with the colour of their class on black, the largest first.

    Args:
        segments: COCO objects with `segmentation` (a list of polygons `[x, y, x, y, ...]`, or run lengths
            `{"size": [height, width], "counts": ...}`, compressed or not) and `category_id`.
        size: width and height of the image in whose pixels polygons are; default: this image's. Run lengths have
            their own.

    Raises:
        UserError: `segments` is missing or malformed.
    """
    across, down = _scale(image, "segments", size)
    found = []
    for entry in _annotation_list("segments", "segments", segments):
        try:
            shape = entry["segmentation"]
            mask = _run_lengths(image, shape) if isinstance(shape, Mapping) else _polygons(image, shape, across, down)
            found.append((int(mask.sum()), mask, int(entry.get("category_id", 0))))
        except (TypeError, ValueError, KeyError, IndexError, AttributeError, OverflowError, cv2.error) as error:
            text = repr(entry)
            raise UserError(
                "segments: every object needs a COCO `segmentation` (polygons or run lengths), not"
                f" {text[:80]}{'...' if len(text) > 80 else ''}",
                "bad-data",
            ) from error
    canvas = np.zeros_like(image)
    for _, mask, category in sorted(found, key=lambda region: -region[0]):
        canvas[mask] = category_colour(category)
    return canvas


def category_colour(category: int) -> tuple[int, int, int]:
    """RGB colour of a class, never black: hues step by the golden ratio, so that adjacent classes differ."""
    hue = category * 0.61803398875 % 1.0
    saturation, value = ((0.85, 1.0), (0.55, 0.9), (0.9, 0.65))[category % 3]
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(hue, saturation, value))
    return red, green, blue


def _annotation_list(name: str, key: str, annotations: Any) -> list[Any]:
    if annotations is None:
        raise UserError(f"{name} needs annotations: give {key}=[...], a list of COCO objects", "missing-setting")
    if isinstance(annotations, (str, bytes, Mapping)) or not hasattr(annotations, "__iter__"):
        raise UserError(f"{name}: {key} must be a list of COCO objects, not {type(annotations).__name__}", "wrong-type")
    return list(annotations)


def _scale(image: np.ndarray, name: str, size: Sequence[float] | None) -> tuple[float, float]:
    """Image pixels per pixel of `size`, horizontally and vertically."""
    if size is None:
        return 1.0, 1.0
    try:
        width, height = (float(side) for side in size)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{name}: size must be [width,height], such as [640,480], not {size!r}", "wrong-type"
        ) from error
    if not (width > 0 and height > 0):
        raise UserError(f"{name}: size must be positive, not {size!r}", "out-of-range")
    return image.shape[1] / width, image.shape[0] / height


def _polygons(image: np.ndarray, polygons: Any, across: float, down: float) -> np.ndarray:
    """Mask `bool [H, W]`, the union of polygons `[[x, y, x, y, ...], ...]`."""
    mask = np.zeros(image.shape[:2], np.uint8)
    for polygon in polygons:
        points = np.asarray(polygon, float).reshape(-1, 2) * [across, down]
        # COCO measures from the corner of the first pixel, OpenCV from its centre, here with 4 fractional bits.
        cv2.fillPoly(mask, [np.rint((points - 0.5) * 16).astype(np.int32)], 1, cv2.LINE_8, 4)
    return mask > 0


def _run_lengths(image: np.ndarray, runs: Mapping[str, Any]) -> np.ndarray:
    """Mask `bool [H, W]` of COCO run lengths (column-major, zeros first), scaled to the image."""
    height, width = (int(side) for side in runs["size"])
    counts = runs["counts"]
    if isinstance(counts, (str, bytes)):
        counts = _decompress_counts(counts.encode() if isinstance(counts, str) else counts)
    flat = np.repeat(np.arange(len(counts)) % 2, np.asarray(counts, dtype=np.int64)).astype(np.uint8)
    mask = np.ascontiguousarray(flat.reshape(width, height).T)
    if mask.shape != image.shape[:2]:
        mask = cv2.resize(mask, image.shape[1::-1], interpolation=cv2.INTER_NEAREST_EXACT)
    return mask > 0


def _decompress_counts(text: bytes) -> list[int]:
    """Decode COCO's compressed counts: 5 bits per character; from the fourth on, differences to two before."""
    counts: list[int] = []
    value = shift = 0
    for character in text:
        code = character - 48
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:
            if code & 16:
                value -= 1 << shift
            counts.append(value + counts[-2] if len(counts) > 2 else value)
            value = shift = 0
    return counts
