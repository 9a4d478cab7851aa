"""Names of the files that a request writes, without suffix."""

from __future__ import annotations

START_NAMES = ("image", "mask")
"""File stems of the image and mask of a request, scaled and cropped; also the names of these settings."""

HIRES_PREFIX = "hires-"
"""Before the file stems of condition images and masks of the second pass."""


def condition_name(index: int, name: str | None) -> str:
    """File stem of a condition image: of the control at `index`, or of its input `name`."""
    return f"condition{index}" if name is None else f"condition{index}-{name}"


def mask_name(index: int) -> str:
    """File stem of the mask of the control at `index`."""
    return f"mask{index}"


def first_name(seed: int, name: str = "") -> str:
    """File stem of the first image of a seed, in prompt mode `automatic`; `name` is of the combination of axes."""
    return f"{name}-first{seed}" if name else f"first{seed}"


def image_name(name: str, seed: int) -> str:
    """File stem of an image; `name` is of the combination of axes (`axes.Point.name`)."""
    return f"{name}-seed{seed}" if name else f"seed{seed}"
