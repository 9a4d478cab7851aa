"""Measures of how well a result follows what was given."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np

from controlkit.conditions.condition import Condition, Fidelity
from controlkit.conditions.pixels import nearest_colour, packed, three_channels


def edge_f1(given: np.ndarray, produced: np.ndarray, tolerance: int = 1) -> float:
    """F1 of the edge pixels of two edge images, in [0, 1].

    A produced edge pixel is right if a given one lies within `tolerance` pixels (in both directions), and a
    given one is found if a produced one does. Two images without edges agree fully.
    """
    mine, theirs = produced[..., 0] > 127, given[..., 0] > 127
    if not mine.any() and not theirs.any():
        return 1.0
    if not mine.any() or not theirs.any():
        return 0.0
    kernel = np.ones((2 * tolerance + 1,) * 2, np.uint8)
    near_theirs = cv2.dilate(theirs.astype(np.uint8), kernel) > 0
    near_mine = cv2.dilate(mine.astype(np.uint8), kernel) > 0
    precision = float((mine & near_theirs).sum() / mine.sum())
    recall = float((theirs & near_mine).sum() / theirs.sum())
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def psnr(given: np.ndarray, produced: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two `uint8` images in dB; 100 for equal ones."""
    error = np.mean((given.astype(np.float64) - produced.astype(np.float64)) ** 2)
    return 100.0 if error == 0 else min(100.0, float(10 * np.log10(255**2 / error)))


def colour_distance(given: np.ndarray, produced: np.ndarray) -> float:
    """Mean distance of two `uint8` images in CIE L*a*b* (CIE76), 0 if equal; 2.3 is just noticeable."""
    lab = [cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2LAB) for image in (given, produced)]
    return float(np.linalg.norm(lab[0] - lab[1], axis=-1).mean())


def dark_edge_f1(given: np.ndarray, produced: np.ndarray) -> float:
    """`edge_f1` of drawings with dark strokes on white, in [0, 1]; a softened stroke counts from 192 down."""
    mine, theirs = (np.where(image < 192, np.uint8(255), np.uint8(0)) for image in (produced, given))
    return edge_f1(theirs, mine)


def image_edge_f1(truth: np.ndarray, produced: np.ndarray) -> float:
    """`edge_f1` of the Canny edges (thresholds 100 and 200) of two `uint8` images, in [0, 1]."""
    edges = [three_channels(cv2.Canny(image, 100, 200)) for image in (truth, produced)]
    return edge_f1(edges[0], edges[1])


def mean_iou(given: np.ndarray, produced: np.ndarray, most: int = 64) -> float:
    """Mean intersection over union, in [0, 1], of the regions of one colour in two `uint8` region maps.

    The regions are those of the colours of `given` (its `most` largest). A pixel of `produced` belongs to the
    nearest of these colours, because maps made from two images seldom share exact colours.
    """
    colours, mine = np.unique(packed(given), return_inverse=True)
    if len(colours) > most:
        kept = np.sort(np.argsort(np.bincount(mine.ravel()), kind="stable")[-most:])
        colours = colours[kept]
    palette = np.stack([colours >> 16, colours >> 8 & 255, colours & 255], axis=1).astype(np.uint8)
    mine, theirs = nearest_colour(given, palette), nearest_colour(produced, palette)
    size = len(palette)
    counts = np.bincount(mine.ravel() * size + theirs.ravel(), minlength=size * size).reshape(size, size)
    union = counts.sum(0) + counts.sum(1) - counts.diagonal()
    return float((counts.diagonal() / union).mean())


def class_iou(given: np.ndarray, produced: np.ndarray) -> float:
    """Mean intersection over union, in [0, 1], of the classes in either of two maps in a fixed palette.

    A class is a colour, matched exactly, as maps of one segmenter share them. Unlike `mean_iou`, a class that is in
    `produced` only counts, as 0.
    """
    colours, both = np.unique(np.concatenate([packed(given).ravel(), packed(produced).ravel()]), return_inverse=True)
    mine, theirs = np.split(both, 2)
    size = len(colours)
    shared = np.bincount(mine[mine == theirs], minlength=size)
    union = np.bincount(mine, minlength=size) + np.bincount(theirs, minlength=size) - shared
    return float((shared / union).mean())


def depth_rmse(given: np.ndarray, produced: np.ndarray) -> float:
    """Root of the mean squared difference of two depth images, on their scale of 0 to 255; 0 if equal."""
    return float(np.sqrt(np.mean((given.astype(np.float64) - produced.astype(np.float64)) ** 2)))


def normal_angle(given: np.ndarray, produced: np.ndarray) -> float:
    """Mean angle in degrees between the surface normals of two normal images, 0 if equal."""
    vectors = [image.astype(np.float64) / 127.5 - 1 for image in (given, produced)]
    lengths = [np.maximum(np.linalg.norm(vector, axis=-1), 1e-6) for vector in vectors]
    cosine = (vectors[0] * vectors[1]).sum(axis=-1) / (lengths[0] * lengths[1])
    # Twice the angle to the middle of both is exact where an arc cosine near 1 is not.
    apart = np.linalg.norm(vectors[0] / lengths[0][..., None] - vectors[1] / lengths[1][..., None], axis=-1)
    angles = np.where(cosine > 0, 2 * np.arcsin(np.clip(apart / 2, 0, 1)), np.arccos(np.clip(cosine, -1, 1)))
    return float(np.degrees(angles).mean())


def palette_distance(given: np.ndarray, produced: np.ndarray) -> float:
    """Distance of the colours of two `uint8` images wherever they stand, in L*a*b* units; 0 for the same.

    Sliced Wasserstein distance: the mean over fixed directions in colour space of the 1-D distance between
    the sorted projections, at 256 quantiles.
    """
    corners = np.array([[x, y, z] for x in (-1, 0, 1) for y in (-1, 0, 1) for z in (-1, 0, 1)], float)
    directions = corners[len(corners) // 2 + 1 :]
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    quantiles = []
    for image in (given, produced):
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
    """`condition`, scored by the true image: where the model that would draw it of a result is not to be had."""
    return replace(condition, fidelity=RESTORED_PSNR)
