"""DensePose: the body part at each pixel."""

from __future__ import annotations

import contextlib
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from controlkit.conditions.condition import condition
from controlkit.conditions.fidelity import CLASS_IOU
from controlkit.conditions.learned.inputs import to_resolution
from controlkit.conditions.models import LearnedModel, device, find_folder, import_extra, load_once
from controlkit.errors import UserError

if TYPE_CHECKING:
    import torch

DENSEPOSE = LearnedModel(
    hub="LayerNorm/DensePose-TorchScript-with-hint-image",
    licence="CC BY-NC 4.0 (DensePose-COCO)",
    commercial=False,
    extra="annotators",
    files=("densepose_r50_fpn_dl.torchscript",),
)

_PARTS = 24


@condition(
    "densepose",
    summary="body parts of people as colours (DensePose, viridis)",
    background=(68, 1, 84),
    aliases=("dense_pose",),
    fidelity=CLASS_IOU,
    limits={"resolution": (64, 4096)},
    mirrors=False,
    requires=DENSEPOSE,
    mirror_finished=None,
    resize="nearest",
    input_size="short side at `resolution`",
)
def densepose(image: np.ndarray, *, resolution: int = 512, model: str | None = None) -> np.ndarray:
    """The 24 parts of DensePose (Gueler et al. 2018) in the colours of viridis, on its darkest.

    CtrLoRA, annotator/densepose, uses the larger network (R101).

    Args:
        resolution: short side of the network's input, in pixels.
        model: a folder with `densepose_r50_fpn_dl.torchscript`, or another model on the hub with that file.
    """
    import torch

    network = load_once("densepose", find_folder("densepose", DENSEPOSE, model), _load)
    scaled = to_resolution(image, resolution, multiple=1)
    with torch.inference_mode():
        pixels = torch.from_numpy(np.ascontiguousarray(scaled.transpose(2, 0, 1))).to(device())
        boxes, coarse, fine = (part.float().cpu() for part in network(pixels)[:3])
    parts = draw_parts(boxes.numpy(), coarse.numpy(), fine.numpy(), *scaled.shape[:2])
    labels = cv2.resize(parts, image.shape[1::-1], interpolation=cv2.INTER_NEAREST_EXACT)
    return viridis()[labels]


def _load(folder: Path, where: torch.device) -> Any:
    import torch

    # The network calls operators of torchvision; without it, torch cannot load the file.
    with contextlib.suppress(Exception):
        importlib.import_module("torchvision")
    path = folder / DENSEPOSE.files[0]
    try:
        return torch.jit.load(path, map_location=where).eval()
    except RuntimeError as error:
        if "torchvision::" in str(error):
            import_extra("densepose", DENSEPOSE, "torchvision")
        raise UserError(f"densepose: cannot load {path}; download it again", "damaged-file") from error


def draw_parts(boxes: np.ndarray, coarse: np.ndarray, fine: np.ndarray, height: int, width: int) -> np.ndarray:
    """Part indices `uint8 [height, width]`, 0 for background; later people cover earlier ones.

    Args:
        boxes: left, top, right, bottom in pixels `[N, 4]`.
        coarse: scores of background and body in each box `[N, C, h, w]`.
        fine: scores of background and the 24 parts `[N, 25, h, w]`.
    """
    parts = np.zeros((height, width), np.uint8)
    for box, body, part in zip(boxes, coarse, fine, strict=True):
        left, top, right, bottom = (int(side) for side in box)
        size = max(right - left, 1), max(bottom - top, 1)
        scaled = [
            np.stack([cv2.resize(layer, size, interpolation=cv2.INTER_LINEAR) for layer in scores]).argmax(axis=0)
            for scores in (body, part)
        ]
        labels = np.where(scaled[0] > 0, scaled[1], 0).astype(np.uint8)
        rows, columns = slice(max(top, 0), min(top + size[1], height)), slice(max(left, 0), min(left + size[0], width))
        window = labels[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
        view = parts[rows, columns]
        view[window > 0] = window[window > 0]
    return parts


def viridis() -> np.ndarray:
    """Colour of each part `uint8 [25, 3]`: viridis from 0 (background) to 1, in equal steps."""
    steps = (np.arange(_PARTS + 1) * 255 / _PARTS).astype(np.uint8)[:, None]
    return np.ascontiguousarray(cv2.applyColorMap(steps, cv2.COLORMAP_VIRIDIS)[:, 0, ::-1])
