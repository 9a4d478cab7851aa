"""Depth (near is white) and surface normals computed from it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from controlkit.conditions.condition import BLACK, condition
from controlkit.conditions.fidelity import DEPTH_RMSE, NORMAL_ANGLE
from controlkit.conditions.learned.controlnet_aux import annotate
from controlkit.conditions.learned.inputs import (
    AT_RESOLUTION,
    BY_SETTINGS,
    Inputs,
    network_size,
    normalised,
    pixels_of,
    prepare,
    read_inputs,
)
from controlkit.conditions.models import LearnedModel, find_folder, load_transformers
from controlkit.conditions.pixels import mirrored_normals, three_channels, to_uint8

if TYPE_CHECKING:
    from torch import Tensor

DPT = LearnedModel(hub="Intel/dpt-large", licence="Apache-2.0", commercial=True)
DEPTH_ANYTHING = LearnedModel(hub="depth-anything/Depth-Anything-V2-Small-hf", licence="Apache-2.0", commercial=True)
ZOE = LearnedModel(hub="Intel/zoedepth-nyu-kitti", licence="MIT", commercial=True)
LERES = LearnedModel(
    hub="lllyasviel/Annotators",
    licence="LeReS's own, from Adobe Research",
    commercial=False,
    extra="annotators",
    files=("res101.pth", "latest_net_G.pth"),
)

_KINDS = ("dpt", "depth_anything", "prompt_depth_anything")
# The deepest fusion layer has no skip input, so half of it is unused, and published files omit that half.
_UNREAD = (r"fusion_stage\.layers\.0\.residual_layer1\.", r"pooler\.", r"auxiliary_head\.")


@condition(
    "depth",
    summary="depth, near in white (MiDaS DPT-Large)",
    background=BLACK,
    aliases=("depth_midas", "depth_dpt", "midas"),
    fidelity=DEPTH_RMSE,
    requires=DPT,
    channels=1,
    croppable=False,
    input_size=BY_SETTINGS,
)
def depth(image: np.ndarray, *, model: str | None = None) -> np.ndarray:
    """Relative depth, from the farthest (0) to the nearest (255) point of each image.

    DPT (Ranftl et al. 2021), as in CtrLoRA's annotator/midas. For ControlNet's depth set
    `model=Intel/dpt-hybrid-midas`.

    Args:
        model: a folder with a DPT or Depth Anything model, or such a model on the hub.
    """
    return _relative("depth", image, DPT, model)


@condition(
    "depth_anything",
    summary="depth, near in white (Depth Anything V2, small)",
    background=BLACK,
    aliases=("depth_anything_v2",),
    fidelity=DEPTH_RMSE,
    requires=DEPTH_ANYTHING,
    channels=1,
    croppable=False,
    input_size=BY_SETTINGS,
)
def depth_anything(image: np.ndarray, *, model: str | None = None) -> np.ndarray:
    """Relative depth, from the farthest (0) to the nearest (255) point of each image (Yang et al. 2024).

    The small model allows commercial use; Depth-Anything-V2-Base-hf and -Large-hf (CC BY-NC 4.0) do not.

    Args:
        model: a folder with a Depth Anything or DPT model, or such a model on the hub.
    """
    return _relative("depth_anything", image, DEPTH_ANYTHING, model)


@condition(
    "depth_zoe",
    summary="depth, near in white (ZoeDepth, indoors and outdoors)",
    background=BLACK,
    aliases=("zoe", "depth_zoedepth"),
    fidelity=DEPTH_RMSE,
    requires=ZOE,
    channels=1,
    croppable=False,
    input_size=BY_SETTINGS,
)
def depth_zoe(image: np.ndarray, *, model: str | None = None) -> np.ndarray:
    """Metric depth (Bhat et al. 2023), inverted; its percentiles 2 and 85 become white and black.

    The percentiles are those of ControlNet's annotator. As in the paper's code, the depth is averaged with that of the
    flipped image, and the image is padded by reflection.

    Args:
        model: a folder with a ZoeDepth model, or one on the hub.
    """
    folder = find_folder("depth_zoe", ZOE, model)
    network = load_transformers("depth_zoe", folder, "AutoModelForDepthEstimation", ("zoedepth",), unread=_UNREAD)
    inputs = read_inputs("depth_zoe", folder)
    metres = _zoe_metres(image, network, inputs)
    near, far = np.percentile(metres, (2, 85))
    if far <= near:
        return np.zeros_like(image)
    return three_channels(to_uint8(255 * (1 - (metres - near) / (far - near))))


@condition(
    "depth_leres",
    summary="depth, near in white (LeReS, or LeReS++ with boost)",
    background=BLACK,
    aliases=("leres", "depth_leres++"),
    fidelity=DEPTH_RMSE,
    limits={"resolution": (64, 4096), "near": (0, 100), "far": (0, 100)},
    requires=LERES,
    channels=1,
    croppable=False,
    input_size=AT_RESOLUTION,
)
def depth_leres(
    image: np.ndarray,
    *,
    boost: bool = False,
    near: float = 0.0,
    far: float = 0.0,
    resolution: int = 512,
    model: str | None = None,
) -> np.ndarray:
    """Relative depth, from the farthest (0) to the nearest (255) point of each image (Yin et al. 2021).

    Args:
        boost: merge several resolutions, for finer outlines (Miangoleh et al. 2021; LeReS++).
        near: in percent of the range; what is nearer becomes white.
        far: in percent of the range; what is farther becomes black.
        resolution: short side of the network's input, in pixels.
        model: a folder with `res101.pth` and `latest_net_G.pth`, or another model on the hub with these files.
    """
    settings = {"boost": boost, "thr_a": near, "thr_b": far}
    return annotate("depth_leres", LERES, "LeresDetector", image, resolution, model, **settings)


@condition(
    "normal",
    summary="surface normals as colours, from depth (MiDaS DPT-Large and Sobel)",
    background=(128, 128, 255),
    aliases=("normal_midas", "normal_depth", "normalmap"),
    fidelity=NORMAL_ANGLE,
    limits={"a": (1e-3, 1e3), "background": (0, 1)},
    mirrors=False,
    requires=DPT,
    mirror_finished=mirrored_normals,
    input_size=BY_SETTINGS,
)
def normal(
    image: np.ndarray,
    *,
    a: float = 0.2 * math.pi,
    background: float = 0.02,
    reverse: bool = False,
    model: str | None = None,
) -> np.ndarray:
    """The vector (Sobel x, Sobel y, `a`) of the depth, normalised, times 127.5 plus 127.5.

    Defaults: CtrLoRA, annotator/midas. ControlNet's has a = 2 pi (6.2 in its interface) and background 0.1. Gradients
    are computed at the resolution of the network's output, so they do not fade in large images.

    Args:
        a: length of the z component; the smaller, the stronger the relief.
        background: fraction of the depth range, from the far end, that gets the normal of a plane.
        reverse: store blue, green, red, as for ControlNet 1.0's normal model.
        model: as for `depth`.
    """
    raw = _nearness("normal", image, DPT, model)
    height, width = image.shape[:2]
    # The network's input may be squashed; gradients need square pixels.
    zoom = math.sqrt(raw.shape[0] * raw.shape[1] / (height * width))
    grid = max(1, round(width * zoom)), max(1, round(height * zoom))
    raw = cv2.resize(raw, grid, interpolation=cv2.INTER_LINEAR)
    across, down = (cv2.Sobel(raw, cv2.CV_32F, *order, ksize=3) for order in ((1, 0), (0, 1)))
    flat = _to_unit_range(raw) < background
    across[flat] = down[flat] = 0
    vectors = np.dstack([across, down, np.full_like(raw, a)])
    vectors /= np.linalg.norm(vectors, axis=2, keepdims=True)
    if grid != (width, height):
        vectors = cv2.resize(vectors, (width, height), interpolation=cv2.INTER_LINEAR)
        vectors /= np.maximum(np.linalg.norm(vectors, axis=2, keepdims=True), 1e-6)
    normals = to_uint8(vectors * 127.5 + 127.5)
    return np.ascontiguousarray(normals[..., ::-1]) if reverse else normals


def _relative(name: str, image: np.ndarray, model: LearnedModel, override: str | None) -> np.ndarray:
    import torch

    raw = _nearness(name, image, model, override)
    scaled = _scaled(torch.from_numpy(raw)[None, None], *image.shape[:2])[0, 0].numpy()
    return three_channels(to_uint8(255 * _to_unit_range(scaled)))


def _nearness(name: str, image: np.ndarray, model: LearnedModel, override: str | None) -> np.ndarray:
    """`float32 [h, w]` in the network's resolution and units; larger is nearer."""
    import torch

    folder = find_folder(name, model, override)
    network = load_transformers(name, folder, "AutoModelForDepthEstimation", _KINDS, unread=_UNREAD)
    inputs = read_inputs(name, folder)
    with torch.inference_mode():
        pixels = prepare(image, inputs, _patch(network)).to(network.device)
        raw = network(pixels).predicted_depth[0].float().cpu().numpy()
    metric = getattr(network.config, "depth_estimation_type", "relative") == "metric"
    return -raw if metric else raw


def _patch(network: Any) -> int:
    """Side of a patch: the minimum side of the input."""
    for config in (network.config, getattr(network.config, "backbone_config", None)):
        side = getattr(config, "patch_size", None)
        if side is not None:
            return int(max(side)) if isinstance(side, (list, tuple)) else int(side)
    return 32


def _zoe_metres(image: np.ndarray, network: Any, inputs: Inputs) -> np.ndarray:
    """Depth in metres `float32 [H, W]`."""
    import torch

    height, width = image.shape[:2]
    rim = [int(math.sqrt(side / 2) * 3) if inputs.pad else 0 for side in (height, width)]
    padded = np.pad(image, ((rim[0],) * 2, (rim[1],) * 2, (0, 0)), mode="reflect")
    size = network_size(inputs, padded.shape[0], padded.shape[1], _patch(network))
    with torch.inference_mode():
        pixels = torch.nn.functional.interpolate(pixels_of(padded), size, mode="bilinear", align_corners=True)
        pixels = normalised(pixels[0].permute(1, 2, 0).numpy(), inputs).to(network.device)
        depths = [network(view).predicted_depth for view in (pixels, pixels.flip(-1))]
        mean = (depths[0] + depths[1].flip(-1)).float().cpu() / 2
        metres = _scaled(mean[None], *padded.shape[:2])[0, 0].numpy()
    return metres[rim[0] : rim[0] + height, rim[1] : rim[1] + width]


def _scaled(values: Tensor, height: int, width: int) -> Tensor:
    """`[1, 1, h, w]` => `[1, 1, height, width]`, bicubic as in transformers."""
    import torch

    return torch.nn.functional.interpolate(values, (height, width), mode="bicubic", align_corners=False)


def _to_unit_range(values: np.ndarray) -> np.ndarray:
    """`values` scaled from minimum (0) to maximum (1); zeros if all are equal."""
    low, high = float(values.min()), float(values.max())
    return (values - low) / (high - low) if high > low else np.zeros_like(values)
