"""Weights in float8 with a scale for each layer, as ComfyUI writes them."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from controlkit.errors import UserError

_MARK = "scaled_fp8"
_SCALES = ("scale_weight", "weight_scale")
"""Last parts of the names of scales that multiply `weight`, of older and of newer files."""
_UNUSED = ("scale_input", "input_scale", "comfy_quant")
"""Those of what only serves arithmetic in float8: the scale of a layer's input, and the format's name."""
_FORMATS = ("float8_e4m3fn", "float8_e5m2")


def scaled_in(names: Collection[str]) -> str | None:
    """The first name that shows that a file has scaled weights; None if it has none."""
    return next((name for name in names if name == _MARK or name.rpartition(".")[2] in (*_SCALES, "comfy_quant")), None)


def unscaled(tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """float8 weights with a scale => in `dtype`; others unchanged. Marks and scales of layers are left out.

    Raises:
        UserError: weights are in another format than float8, or a scale is neither one number nor one for each row of
            its weight.
    """
    if scaled_in(tensors) is None:
        return dict(tensors)
    weights: dict[str, Tensor] = {}
    for name, value in tensors.items():
        layer, _, last = name.rpartition(".")
        if last == "comfy_quant":
            _check_format(value, layer)
        of_layer = last in (*_SCALES, *_UNUSED) and f"{layer}.weight" in tensors
        if of_layer or name == _MARK:
            continue
        scales = (tensors.get(f"{layer}.{each}") for each in _SCALES) if last == "weight" else ()
        scale = next((each for each in scales if each is not None), None)
        weights[name] = value if scale is None else _multiplied(value, scale, name).to(dtype)
    return weights


def _check_format(value: Tensor, layer: str) -> None:
    """Check that the format that a file names for a layer is float8.

    Raises:
        UserError: it is not.
    """
    try:
        named = json.loads(bytes(value.flatten().tolist()).decode())["format"]
    except (ValueError, KeyError, TypeError):
        named = "unknown"
    if named not in _FORMATS:
        raise UserError(
            f"{layer} is quantised in the format {named}, which is not supported; expected {' or '.join(_FORMATS)}, or"
            " the float16 file of the model",
            "unsupported",
        )


def _multiplied(weight: Tensor, scale: Tensor, name: str) -> Tensor:
    """A weight times its scale, in float32."""
    if not weight.is_floating_point():
        raise UserError(
            f"{name} is quantised as {str(weight.dtype).removeprefix('torch.')}, which is not supported; use a file in"
            " float8 or float16",
            "unsupported",
        )
    rows = weight.shape[0] if weight.ndim else 1
    if scale.numel() not in (1, rows) or (scale.numel() > 1 and scale.shape[0] != rows):
        raise UserError(
            f"the scale of {name} has the shape {tuple(scale.shape)}; expected one number, or one for each of its"
            f" {rows} rows",
            "damaged-file",
        )
    return weight.float() * scale.float().reshape(-1, *[1] * (weight.ndim - 1))
