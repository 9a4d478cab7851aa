"""Preprocessing of images for networks, by the `preprocessor_config.json` beside their weights.

The steps are those of transformers' image processors, which mostly need torchvision and can yield a size of zero for
long, narrow images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from PIL import Image

from controlkit.errors import UserError
from controlkit.files import read_json

if TYPE_CHECKING:
    from torch import Tensor


AT_RESOLUTION = "with its short side at `resolution`, both sides multiples of 64"
"""`Condition.input_size` of conditions that use `to_resolution`."""
BY_SETTINGS = "at the size in the model's preprocessor_config.json"
"""`Condition.input_size` of conditions that use `prepare`."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """How an image is scaled and normalised."""

    size: tuple[int, int] | None = None
    """(height, width) to fit."""
    shortest: int | None = None
    """Without `size`: length of the short side. If both are None, the size stays."""
    longest: int | None = None
    """With `shortest`: maximum of the long side."""
    keep_aspect: bool = False
    """With `size`: scale both sides by the factor nearer to 1."""
    multiple: int = 1
    """With `size`: both sides are rounded to multiples of this."""
    resample: Image.Resampling = Image.Resampling.BILINEAR
    """Interpolation."""
    scale: float = 1 / 255
    """Factor for pixel values 0 to 255."""
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    """Subtracted after scaling, per channel."""
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    """Divisor after that, per channel."""
    pad: bool = False
    """Whether to pad the image, for processors that can."""


def read_inputs(condition: str, folder: Path) -> Inputs:
    """The preprocessing settings in a transformers folder.

    Raises:
        UserError: they are missing or malformed.
    """
    path = folder / "preprocessor_config.json"
    if path.is_file():
        settings = read_json(path)
    elif (folder / "processor_config.json").is_file():
        path = folder / "processor_config.json"
        settings = read_json(path).get("image_processor", {})
    else:
        raise UserError(
            f"{condition}: there is no preprocessor_config.json in {folder}; download the model again", "missing-file"
        )
    try:
        return _parse(settings)
    except (TypeError, ValueError, KeyError) as error:
        message = f"{condition}: cannot read the settings in {path} ({error}); download the model again"
        raise UserError(message, "damaged-file") from error


def _parse(settings: Mapping[str, Any]) -> Inputs:
    size = settings.get("size") if settings.get("do_resize", True) else None
    sides: dict[str, Any] = {}
    if isinstance(size, int):
        longest = settings.get("max_size")
        sides = {"size": (size, size)} if longest is None else {"shortest": size, "longest": int(longest)}
    elif size is not None and "shortest_edge" in size:
        longest = size.get("longest_edge") or settings.get("max_size")
        sides = {"shortest": int(size["shortest_edge"]), "longest": longest}
    elif size is not None:
        sides = {"size": (int(size["height"]), int(size["width"]))}
    normalised = settings.get("do_normalize", True) and settings.get("image_mean") is not None
    return Inputs(
        **sides,
        keep_aspect=bool(settings.get("keep_aspect_ratio", False)),
        multiple=max(1, int(settings.get("ensure_multiple_of", 1) or 1)),
        resample=Image.Resampling(int(settings.get("resample", Image.Resampling.BILINEAR))),
        scale=float(settings.get("rescale_factor", 1 / 255)) if settings.get("do_rescale", True) else 1 / 255,
        mean=tuple(float(value) for value in settings["image_mean"]) if normalised else (0.0, 0.0, 0.0),
        std=tuple(float(value) for value in settings["image_std"]) if normalised else (1.0, 1.0, 1.0),
        pad=bool(settings.get("do_pad", False)),
    )


def network_size(inputs: Inputs, height: int, width: int, least: int = 1) -> tuple[int, int]:
    """(height, width) of the network's input for an image of `height` x `width`, no side under `least`."""
    if inputs.size is not None:
        down, across = inputs.size[0] / height, inputs.size[1] / width
        if inputs.keep_aspect:
            down = across = across if abs(1 - across) < abs(1 - down) else down
        rows, columns = (round(side / inputs.multiple) * inputs.multiple for side in (down * height, across * width))
    elif inputs.shortest is not None:
        short = float(inputs.shortest)
        if inputs.longest is not None and max(height, width) / min(height, width) * short > inputs.longest:
            short = inputs.longest * min(height, width) / max(height, width)
        if width < height:
            rows, columns = int(short * height / width), round(short)
        else:
            rows, columns = round(short), int(short * width / height)
    else:
        rows, columns = height, width
    least = -(-max(1, least) // inputs.multiple) * inputs.multiple
    return max(least, rows), max(least, columns)


def normalised(values: np.ndarray, inputs: Inputs) -> Tensor:
    """Pixels `[h, w, 3]` from 0 to 255 => `float32 [1, 3, h, w]`, normalised for the network."""
    import torch

    scaled = values.astype(np.float32) * np.float32(inputs.scale)
    centred = (scaled - np.array(inputs.mean, np.float32)) / np.array(inputs.std, np.float32)
    return torch.from_numpy(np.ascontiguousarray(centred.transpose(2, 0, 1)))[None]


def pixels_of(image: np.ndarray) -> Tensor:
    """`uint8 [H, W, 3]` => `float32 [1, 3, H, W]` from 0 to 255, a copy."""
    import torch

    return torch.from_numpy(image.transpose(2, 0, 1).astype(np.float32, order="C"))[None]


def prepare(image: np.ndarray, inputs: Inputs, least: int = 1) -> Tensor:
    """`uint8 [H, W, 3]` => `float32 [1, 3, h, w]`, no side under `least`."""
    height, width = image.shape[:2]
    rows, columns = network_size(inputs, height, width, least)
    if (rows, columns) == (height, width):
        return normalised(image, inputs)
    return normalised(np.asarray(Image.fromarray(image).resize((columns, rows), inputs.resample)), inputs)


def to_resolution(image: np.ndarray, resolution: int, multiple: int = 64) -> np.ndarray:
    """`image` with its short side scaled to `resolution`, both sides multiples of `multiple`.

    lllyasviel/ControlNet, annotator/util.py: Lanczos to upscale, area averaging to downscale. Here the long side is at
    most four times `resolution`, so that a strip of 16 x 2,000 does not become 512 x 64,000.
    """
    height, width = image.shape[:2]
    zoom = min(resolution / min(height, width), 4 * resolution / max(height, width))
    rows, columns = (max(1, round(side * zoom / multiple)) * multiple for side in (height, width))
    if (rows, columns) == (height, width):
        return image
    return cv2.resize(image, (columns, rows), interpolation=cv2.INTER_LANCZOS4 if zoom > 1 else cv2.INTER_AREA)


def back_to_size(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """`[h, w]` or `[h, w, 3]` => `height` x `width`, bilinear, or area averaging to downscale."""
    if values.shape[:2] == (height, width):
        return values
    shrinks = height <= values.shape[0] and width <= values.shape[1]
    return cv2.resize(values, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
