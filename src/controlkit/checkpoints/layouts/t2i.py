"""T2I-Adapter's tensors under the names of TencentARC/T2I-Adapter and of diffusers' `T2IAdapter`.

The original counts through all residual blocks (`body.5`), diffusers counts blocks of a stage
(`adapter.body.2.resnets.1`); the light adapter has stages in both (branch SD, ldm/modules/encoders/adapter.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from controlkit.checkpoints.content import (
    CONFIG_ERRORS,
    KINDS,
    T2I_ADAPTER,
    Content,
    Options,
    check_names,
    expected_shapes,
    said_config,
)
from controlkit.checkpoints.recognise import Found
from controlkit.checkpoints.tensors import on_one_line
from controlkit.errors import UserError

_PREFIX = "adapter."


def from_original(found: Found, options: Options | None = None) -> Content:
    """The content of a file under the original's names.

    Args:
        options: the base's settings, where they are known.

    Raises:
        UserError: names or shapes are not those of an adapter.
    """
    path, what = found.path, KINDS[T2I_ADAPTER]
    names = _from_original_names(found.file.tensors)
    unknown = {name: value for name, value in found.file.tensors.items() if name not in names}
    tensors = {new: found.file.tensors[name] for name, new in names.items()}
    try:
        unet_config = None if options is None else options.unet_config
        config = said_config(found.file.metadata) or config_of(tensors, unet_config)
        expected = expected_shapes(T2I_ADAPTER, config)
    except CONFIG_ERRORS as error:
        raise UserError(f"{path} looks like {what}, but {on_one_line(error)}") from error
    check_names(path, what, expected, {**tensors, **unknown}, found.file.others)
    return Content(T2I_ADAPTER, config, {name: tensors[name] for name in expected}, dict(found.file.metadata))


def to_original(content: Content) -> dict[str, Tensor]:
    """Its tensors under the original's names."""
    light = content.config["adapter_type"] == "light_adapter"
    each = content.config["num_res_blocks"]
    made: dict[str, Tensor] = {}
    for name, value in content.tensors.items():
        match = re.fullmatch(r"adapter\.body\.(\d+)\.(?:resnets\.(\d+)\.)?(.+)", name)
        if match is None:
            made[name.removeprefix(_PREFIX)] = value
        elif light:
            block = f"body.{match[2]}." if match[2] else ""
            made[f"body.{match[1]}.{block}{match[3]}"] = value
        else:
            made[f"body.{int(match[1]) * each + int(match[2] or 0)}.{match[3]}"] = value
    return made


def config_of(tensors: Mapping[str, Tensor], unet_config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The config of diffusers' `T2IAdapter` whose tensors these are.

    Shapes do not tell the full network from the one of Stable Diffusion XL, whose features are as large at its second
    stage as at its first: the base tells it, or the size of its patches.

    Raises:
        ValueError: they are of no such network.
    """
    stages = _count(tensors, r"adapter\.body\.(\d+)\.")
    each = _count(tensors, r"adapter\.body\.0\.resnets\.(\d+)\.")
    light = "adapter.body.0.out_conv.weight" in tensors
    first = tensors.get("adapter.body.0.in_conv.weight" if light else "adapter.conv_in.weight")
    if not stages or not each or first is None:
        raise ValueError("its first convolution or its residual blocks are missing")
    last = "out_conv" if light else "resnets.0.block1"
    channels = []
    for stage in range(stages - light):  # diffusers adds a light adapter's last stage by itself
        weight = tensors.get(f"adapter.body.{stage}.{last}.weight")
        if weight is None:
            raise ValueError(f"its stage {stage} is missing")
        channels.append(weight.shape[0])
    colours, factor = _input(first.shape[1])
    first_stage = "" if unet_config is None else unet_config["down_block_types"][0]
    halved = factor == 16 if unet_config is None else "CrossAttn" not in first_stage
    kind = "light_adapter" if light else "full_adapter_xl" if halved else "full_adapter"
    return {
        "in_channels": colours,
        "channels": channels,
        "num_res_blocks": each,
        "downscale_factor": factor,
        "adapter_type": kind,
    }


def _from_original_names(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Name in the file -> diffusers' name, of those that have one."""
    light = any(re.match(r"body\.\d+\.out_conv\.", name) for name in tensors)
    # Where channels change, a stage begins; the first change tells how many blocks a stage has.
    begins = [int(match[1]) for name in tensors if (match := re.match(r"body\.(\d+)\.in_conv\.", name))]
    each = min((begin for begin in begins if begin), default=2)
    made: dict[str, str] = {}
    for name in tensors:
        if re.match(r"conv_in\.", name) and not light:
            made[name] = f"{_PREFIX}{name}"
        elif light and (
            match := re.fullmatch(r"body\.(\d+)\.(?:body\.(\d+)\.)?((?:in_conv|out_conv|block\d)\..+)", name)
        ):
            block = f"resnets.{match[2]}." if match[2] else ""
            made[name] = f"{_PREFIX}body.{match[1]}.{block}{match[3]}"
        elif not light and (match := re.fullmatch(r"body\.(\d+)\.(in_conv|block1|block2)\.(.+)", name)):
            stage, place = divmod(int(match[1]), each)
            inner = "in_conv" if match[2] == "in_conv" else f"resnets.{place}.{match[2]}"
            made[name] = f"{_PREFIX}body.{stage}.{inner}.{match[3]}"
    return made


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    return max((int(match[1]) + 1 for name in tensors if (match := re.match(pattern, name))), default=0)


def _input(channels: int) -> tuple[int, int]:
    """Colours of the picture and the side of its patches, from channels after the pixels of a patch are stacked."""
    for colours in (3, 1):
        for factor in (1, 2, 4, 8, 16, 32):
            if channels == colours * factor**2:
                return colours, factor
    raise ValueError(f"its input has {channels} channels, which are no square patches of grey or of colours")
