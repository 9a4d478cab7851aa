"""Conditions of colour and tone: grayscale, palette, pixel art, shuffle, illusion."""

from __future__ import annotations

import cv2
import numpy as np

from controlkit.conditions.condition import condition, seed, uniform_int
from controlkit.conditions.fidelity import COLOUR_DISTANCE, MEAN_IOU, PALETTE_DISTANCE, PSNR
from controlkit.conditions.pixels import (
    REMAP_SIDE,
    disc,
    enlarge,
    grey,
    grid_size,
    length,
    main_colours,
    nearest_colour,
    reduced,
    short_side,
    smooth_field,
    three_channels,
)


@condition(
    "grayscale",
    summary="the image without colour",
    aliases=("greyscale", "gray", "grey", "colorization", "recolor"),
    fidelity=PSNR,
    channels=1,
)
def grayscale(image: np.ndarray) -> np.ndarray:
    """Luma (ITU-R BT.601, OpenCV) in all three channels; CtrLoRA's grayscale."""
    return three_channels(grey(image))


@condition(
    "palette",
    summary="a coarse grid of mean colours",
    aliases=("color_palette", "colour_palette", "color_grid", "colour_grid", "color", "t2ia_color"),
    fidelity=COLOUR_DISTANCE,
    limits={"cells": (1, 2000)},
)
def palette(image: np.ndarray, *, cells: int = 8) -> np.ndarray:
    """Flat cells of the mean colour below them, `cells` along the short side.

    CtrLoRA, annotator/palette, has cells of 64 x 64 pixels: 8 x 8 of them at 512, one at 64. Here the number is the
    same at every size. It also samples bicubically, so that a single pixel can set a cell; here it is the mean.
    """
    height, width = image.shape[:2]
    return enlarge(reduced(image, grid_size(image, cells)), height, width)


@condition(
    "pixel",
    summary="pixel art: large pixels of few colours",
    aliases=("pixel_art", "pixelate"),
    fidelity=COLOUR_DISTANCE,
    random={"cells": uniform_int(64, 128), "colours": uniform_int(8, 16)},
    limits={"cells": (1, 2000), "colours": (2, 256)},
)
def pixel(image: np.ndarray, *, cells: int = 96, colours: int = 12) -> np.ndarray:
    """Large pixels, `cells` along the short side, in at most `colours` colours of the image.

    CtrLoRA, annotator/pixel: downscaled 4 to 8 times (64 to 128 cells at 512) by Lanczos, to no less than 32; 8 to 16
    colours by k-means. Here a cell is at least 2 pixels wide, so a 64 x 64 image has 32 of them.
    """
    height, width = image.shape[:2]
    size = grid_size(image, max(1, min(cells, short_side(image) // 2)))
    small = reduced(image, size)
    chosen = main_colours(small, colours)
    return enlarge(chosen[nearest_colour(small, chosen)], height, width)


@condition(
    "shuffle",
    summary="the image's colours and textures, displaced by a smooth random field",
    aliases=("content_shuffle",),
    fidelity=PALETTE_DISTANCE,
    random={"seed": seed()},
    limits={"scale": (0.02, 4)},
    greatest_side=REMAP_SIDE,
    mirrors=False,
    croppable=False,
)
def shuffle(image: np.ndarray, *, scale: float = 0.5, seed: int = 0) -> np.ndarray:
    """Pixels sampled at the positions of a smooth random field.

    ControlNet 1.1 and CtrLoRA, annotator/shuffle: a field that varies over 256 pixels of 512. It fixes which colours
    occur but not where, so fidelity compares their distributions.

    Args:
        scale: length over which the field varies, as a fraction of the short side.
        seed: of the field.
    """
    rng = np.random.default_rng(seed)
    height, width = image.shape[:2]
    cell = length(image, scale, least=2)
    x = smooth_field(rng, height, width, cell) * (width - 1)
    y = smooth_field(rng, height, width, cell) * (height - 1)
    return cv2.remap(image, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


@condition(
    "illusion",
    summary="three tones: black, grey and white shapes",
    aliases=("three_tones", "posterize"),
    fidelity=MEAN_IOU,
    random={"dark": uniform_int(70, 100), "bright": uniform_int(155, 185)},
    limits={"dark": (0, 255), "bright": (0, 255), "closing": (0, 0.5), "opening": (0, 0.5)},
    channels=1,
    values=(0, 127, 255),
    resize="nearest",
)
def illusion(
    image: np.ndarray,
    *,
    dark: int = 85,
    bright: int = 170,
    closing: float = 0.0215,
    opening: float = 0.006,
) -> np.ndarray:
    """Brightness in three tones (0, 127, 255), split at `dark` and `bright`, small shapes removed.

    CtrLoRA, annotator/illusion: split at 85 and 170, closed by an ellipse of 11 pixels and opened by one of 3 at 512.
    It computes the brightness (HSV value) but then uses the blue channel; here it is the value.

    Args:
        dark: values below are black.
        bright: values from here up are white.
        closing: diameter below which dark specks are removed, as a fraction of the short side.
        opening: diameter below which bright specks are removed, as a fraction of the short side.
    """
    value = image.max(axis=2)
    tones = np.where(value < dark, 0, np.where(value < bright, 127, 255)).astype(np.uint8)
    tones = cv2.morphologyEx(tones, cv2.MORPH_CLOSE, disc(length(image, closing)))
    return three_channels(cv2.morphologyEx(tones, cv2.MORPH_OPEN, disc(length(image, opening))))
