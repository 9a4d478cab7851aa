"""Region maps by colour alone, without weights or classes."""

from __future__ import annotations

import cv2
import numpy as np

from controlkit.conditions.condition import BLACK, condition, uniform_int
from controlkit.conditions.fidelity import MEAN_IOU
from controlkit.conditions.pixels import disc, length, main_colours, nearest_colour, three_channels


@condition(
    "color_regions",
    summary="flat regions of few colours (k-means; no classes: semantic segmentation needs weights)",
    aliases=("colour_regions", "flat_regions", "segments_kmeans"),
    fidelity=MEAN_IOU,
    random={"colours": uniform_int(4, 10)},
    limits={"colours": (2, 256), "smallest": (0, 0.2)},
    resize="nearest",
)
def color_regions(image: np.ndarray, *, colours: int = 6, smallest: float = 0.01) -> np.ndarray:
    """Every pixel in the nearest of the image's main colours, without detail.

    Args:
        colours: maximum number of colours.
        smallest: width of details that are removed, as a fraction of the short side.
    """
    side = min(2 * int(length(image, smallest) / 2) + 1, 255)
    smooth = cv2.medianBlur(image, side) if side > 1 else image
    palette = main_colours(smooth, colours)
    labels = nearest_colour(smooth, palette).astype(np.uint8)
    # Soft edges pass through the colours of other regions; the second median removes these seams.
    return cv2.medianBlur(palette[labels], side) if side > 1 else palette[labels]


@condition(
    "silhouette",
    summary="white foreground on black, for images with a plain background (by colour; no learned matting)",
    background=BLACK,
    aliases=("mask", "foreground"),
    fidelity=MEAN_IOU,
    limits={"threshold": (0, 400), "smallest": (0, 0.2)},
    channels=1,
    values=(0, 255),
    resize="nearest",
)
def silhouette(
    image: np.ndarray, *, threshold: float = 12.0, smallest: float = 0.01, fill_holes: bool = False
) -> np.ndarray:
    """Whatever differs from the colour of the border.

    Args:
        threshold: distance from the border's median colour in L*a*b* (CIE76); 2.3 is just noticeable.
        smallest: width of specks that are removed, as a fraction of the short side.
        fill_holes: include enclosed background, such as the white of an eye on white.
    """
    lab = cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    border = np.concatenate([lab[0], lab[-1], lab[:, 0], lab[:, -1]])
    distance = np.linalg.norm(lab - np.median(border, axis=0), axis=2)
    mask = np.where(distance > threshold, np.uint8(255), np.uint8(0))
    mask = cv2.morphologyEx(mask, cv2.MORPH_OPEN, disc(length(image, smallest)))
    if fill_holes:
        outlines, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        mask = cv2.drawContours(mask, outlines, -1, 255, -1)
    return three_channels(mask)
