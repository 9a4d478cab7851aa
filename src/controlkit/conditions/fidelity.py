"""Fidelity metrics: how well a result follows its condition image or target."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np

from controlkit.conditions.condition import Condition, Fidelity
from controlkit.conditions.pixels import nearest_colour, packed, three_channels

_SAME_REGION = 64
"""Greatest distance in RGB of colours that can be the same region in two region maps."""


def edge_f1(reference: np.ndarray, result: np.ndarray, tolerance: int = 1) -> float:
    """F1 of the edge pixels of two edge images, in [0, 1].

    Pixels match within `tolerance` pixels in x and y. Two images without edges score 1.
    """
    predicted, true = result[..., 0] > 127, reference[..., 0] > 127
    if not predicted.any() and not true.any():
        return 1.0
    if not predicted.any() or not true.any():
        return 0.0
    kernel = np.ones((2 * tolerance + 1,) * 2, np.uint8)
    near_true = cv2.dilate(true.astype(np.uint8), kernel) > 0
    near_predicted = cv2.dilate(predicted.astype(np.uint8), kernel) > 0
    precision = float((predicted & near_true).sum() / predicted.sum())
    recall = float((true & near_predicted).sum() / true.sum())
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def psnr(reference: np.ndarray, result: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two `uint8` images in dB, at most 100."""
    error = np.mean((reference.astype(np.float64) - result.astype(np.float64)) ** 2)
    return 100.0 if error == 0 else min(100.0, float(10 * np.log10(255**2 / error)))


def colour_distance(reference: np.ndarray, result: np.ndarray) -> float:
    """Mean distance of two `uint8` images in CIE L*a*b* (CIE76), 0 if equal; 2.3 is just noticeable."""
    lab = [cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2LAB) for image in (reference, result)]
    return float(np.linalg.norm(lab[0] - lab[1], axis=-1).mean())


def dark_edge_f1(reference: np.ndarray, result: np.ndarray) -> float:
    """`edge_f1` of drawings with dark strokes on white, in [0, 1]; values below 192 are strokes."""
    edges = [np.where(image < 192, np.uint8(255), np.uint8(0)) for image in (reference, result)]
    return edge_f1(edges[0], edges[1])


def image_edge_f1(target: np.ndarray, result: np.ndarray) -> float:
    """`edge_f1` of the Canny edges (thresholds 100 and 200) of two `uint8` images, in [0, 1]."""
    edges = [three_channels(cv2.Canny(image, 100, 200)) for image in (target, result)]
    return edge_f1(edges[0], edges[1])


def mean_iou(reference: np.ndarray, result: np.ndarray, most: int = 64) -> float:
    """Mean intersection over union, in [0, 1], of single-colour regions in two `uint8` region maps.

    The colours are those of `reference` (its `most` largest regions). A pixel of `result` counts for the nearest of
    them, because the maps of two images seldom share exact colours. A reference of one colour has no other to be
    nearer to: a pixel counts within 64 levels of it.
    """
    colours, labels = np.unique(packed(reference), return_inverse=True)
    if len(colours) > most:
        largest = np.sort(np.argsort(np.bincount(labels.ravel()), kind="stable")[-most:])
        colours = colours[largest]
    palette = np.stack([colours >> 16, colours >> 8 & 255, colours & 255], axis=1).astype(np.uint8)
    if len(palette) == 1:
        distance = np.linalg.norm(result.astype(np.float32) - palette[0], axis=-1)
        return float((distance <= _SAME_REGION).mean())
    true, predicted = nearest_colour(reference, palette), nearest_colour(result, palette)
    size = len(palette)
    counts = np.bincount(true.ravel() * size + predicted.ravel(), minlength=size * size).reshape(size, size)
    union = counts.sum(0) + counts.sum(1) - counts.diagonal()
    return float((counts.diagonal() / union).mean())


def class_iou(reference: np.ndarray, result: np.ndarray) -> float:
    """Mean intersection over union, in [0, 1], of the classes in either of two maps with a fixed palette.

    A class is an exact colour, as the maps of one segmenter share them. Unlike in `mean_iou`, a class that occurs in
    `result` only counts as 0.
    """
    pixels = np.concatenate([packed(reference).ravel(), packed(result).ravel()])
    colours, labels = np.unique(pixels, return_inverse=True)
    true, predicted = np.split(labels, 2)
    size = len(colours)
    shared = np.bincount(true[true == predicted], minlength=size)
    union = np.bincount(true, minlength=size) + np.bincount(predicted, minlength=size) - shared
    return float((shared / union).mean())


def depth_rmse(reference: np.ndarray, result: np.ndarray) -> float:
    """Root mean squared difference of two depth images, on the scale of 0 to 255."""
    return float(np.sqrt(np.mean((reference.astype(np.float64) - result.astype(np.float64)) ** 2)))


def normal_angle(reference: np.ndarray, result: np.ndarray) -> float:
    """Mean angle in degrees between the surface normals of two normal maps."""
    vectors = [image.astype(np.float64) / 127.5 - 1 for image in (reference, result)]
    lengths = [np.maximum(np.linalg.norm(vector, axis=-1), 1e-6) for vector in vectors]
    cosine = (vectors[0] * vectors[1]).sum(axis=-1) / (lengths[0] * lengths[1])
    # The chord gives small angles exactly, where an arc cosine near 1 does not.
    apart = np.linalg.norm(vectors[0] / lengths[0][..., None] - vectors[1] / lengths[1][..., None], axis=-1)
    angles = np.where(cosine > 0, 2 * np.arcsin(np.clip(apart / 2, 0, 1)), np.arccos(np.clip(cosine, -1, 1)))
    return float(np.degrees(angles).mean())


def palette_distance(reference: np.ndarray, result: np.ndarray) -> float:
    """Distance of the colour distributions of two `uint8` images, in L*a*b* units, whatever their positions.

    Sliced Wasserstein distance: the mean, over fixed directions in colour space, of the 1-D distance between the
    sorted projections at 256 quantiles.
    """
    corners = np.array([[x, y, z] for x in (-1, 0, 1) for y in (-1, 0, 1) for z in (-1, 0, 1)], float)
    directions = corners[len(corners) // 2 + 1 :]
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    quantiles = []
    for image in (reference, result):
        lab = cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2LAB).reshape(-1, 3)
        projected = np.sort(lab @ directions.T.astype(np.float32), axis=0)
        quantiles.append(projected[((np.arange(256) + 0.5) / 256 * len(projected)).astype(int)])
    return float(np.abs(quantiles[0] - quantiles[1]).mean())


EDGE_F1 = Fidelity(name="edge F1", compare=edge_f1)
DARK_EDGE_F1 = Fidelity(name="edge F1", compare=dark_edge_f1)
MEAN_IOU = Fidelity(name="mean IoU", compare=mean_iou)
CLASS_IOU = Fidelity(name="class IoU", compare=class_iou)
DEPTH_RMSE = Fidelity(name="depth RMSE, of 255", compare=depth_rmse, higher_is_better=False)
NORMAL_ANGLE = Fidelity(name="normal angle, degrees", compare=normal_angle, higher_is_better=False)
PSNR = Fidelity(name="PSNR, dB", compare=psnr)
COLOUR_DISTANCE = Fidelity(name="colour distance, Lab", compare=colour_distance, higher_is_better=False)
PALETTE_DISTANCE = Fidelity(name="palette distance, Lab", compare=palette_distance, higher_is_better=False)
IMAGE_COLOUR_DISTANCE = Fidelity(
    name="colour distance to the image, Lab",
    compare=colour_distance,
    higher_is_better=False,
    against="target",
)
IMAGE_EDGE_F1 = Fidelity(name="edge F1 to the target", compare=image_edge_f1, against="target")
RESTORED_PSNR = Fidelity(name="PSNR to the target, dB", compare=psnr, against="target")


def scored_by_target(condition: Condition) -> Condition:
    """`condition` with fidelity to the target image, for use without the model that computes it."""
    return replace(condition, fidelity=RESTORED_PSNR)
