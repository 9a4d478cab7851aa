"""What a control's file is, and what any other file of tensors seems to be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from controlkit.bases.load import NANO, base_folder
from controlkit.checkpoints.content import (
    CONTROLNET,
    CONTROLNET_XS,
    CTRLORA,
    CTRLORA_BASE,
    T2I_ADAPTER,
    Content,
)
from controlkit.checkpoints.controls import find_control
from controlkit.checkpoints.convert import options_for
from controlkit.checkpoints.files import FAMILIES
from controlkit.checkpoints.flops import adapter_flops, call_flops, hint_flops
from controlkit.checkpoints.layouts import read_content
from controlkit.checkpoints.recognise import Found, recognise
from controlkit.controls.control import Control
from controlkit.controls.controlnet import ControlNet
from controlkit.controls.ctrlora import CtrLoRA
from controlkit.controls.t2i_adapter import T2IAdapterControl, feature_stages, listed_stages
from controlkit.errors import UserError
from controlkit.files import read_json

_CONTROLS: dict[str, type[Control]] = {
    CONTROLNET: ControlNet,
    CTRLORA: CtrLoRA,
    CTRLORA_BASE: CtrLoRA,
    T2I_ADAPTER: T2IAdapterControl,
}
_NEED_A_BASE = ("difference", "control-lora")
"""Layouts that hold only what differs from a base, so that without one their own tensors are counted."""
_SIZES = {768: 512, 1024: 768, 2048: 1024}
"""Width of the text that a control reads -> side of the pictures of its base, where its file does not say it."""


def describe(name: str, base: str | None = None, size: int | None = None) -> dict[str, Any]:
    """Facts about a control that ships, a control's file in any layout, or another file of tensors.

    Args:
        base: that it was made for, as `convert` takes it; for files that leave something to their base.
        size: side in pixels of the picture that operations are counted for; default: that of its training, if the
            file says it, else of its family.

    Raises:
        UserError: there is nothing of that name, it cannot be read, or it is not what it looks like.
    """
    path = find_control(name)
    found = recognise(path)
    if found.kind is None:
        return {
            "kind": "none: no control that is read",
            "what": found.says,
            "path": str(path),
            **({} if path.is_dir() and not found.file.tensors else _counts(found.file.tensors)),
            **_end(found),
        }
    alone = base is None and found.layout in _NEED_A_BASE
    content = None if alone else read_content(found, options_for(base))
    control = _CONTROLS.get(found.kind)
    counts = _counts(found.file.tensors if content is None else content.tensors)
    facts: dict[str, Any] = {
        "kind": found.kind,
        "layout": found.layout,
        "what": found.says,
        "path": str(path),
        **counts,
    }
    if control is not None:
        facts["trainable"] = counts["parameters"]
        facts |= {"reads": reads_of(control), "enters at": control.site.value}
    if content is not None:
        facts |= _operations(content, base, size)
    facts["needs"] = _needs(found, content)
    facts["condition"] = found.file.metadata.get("control.condition") or "not said"
    if content is not None and content.rank is not None:
        facts["rank"] = content.rank
    if content is not None and content.notes:
        facts["notes"] = "; ".join(content.notes)
    return {**facts, **_end(found)}


def reads_of(control: Control | type[Control]) -> str:
    """What a control reads, as words."""
    return ", ".join(flag.name.lower() for flag in control.reads if flag.name) or "nothing"


def base_needed(config: Mapping[str, Any]) -> str:
    """The base that a copy of a UNet's encoder needs, in words."""
    width = config["cross_attention_dim"]
    family = f" ({FAMILIES[width]})" if width in FAMILIES else ""
    channels = ", ".join(map(str, config["block_out_channels"]))
    return f"a base whose UNet has {channels} channels and reads text of width {width}{family}"


def stages_needed(config: Mapping[str, Any]) -> str:
    """The base that a T2I-Adapter needs, in words."""
    return (
        f"a base whose encoder has, up to a last one that goes to the middle, {listed_stages(feature_stages(config))}"
    )


def memory_of(parameters: int) -> str:
    """What so many weights take."""
    return f"{2 * parameters / 2**20:,.0f} MiB in fp16, {4 * parameters / 2**20:,.0f} MiB in fp32"


def giga(operations: int) -> float:
    """In units of 1e9."""
    return round(operations / 1e9, 3)


def _counts(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    parameters = sum(value.numel() for value in tensors.values())
    dtypes = ", ".join(sorted({str(value.dtype).removeprefix("torch.") for value in tensors.values()}))
    return {"tensors": len(tensors), "parameters": parameters, "dtypes": dtypes, "memory": memory_of(parameters)}


def _end(found: Found) -> dict[str, Any]:
    size = {"bytes": found.path.stat().st_size} if found.path.is_file() else {}
    return {**size, "metadata": {key: _plain(value) for key, value in found.file.metadata.items()}}


def _operations(content: Content, base: str | None, size: int | None) -> dict[str, Any]:
    """Operations at a size, under a key that names the size."""
    config, said = content.config, content.metadata
    known = said.get("modelspec.resolution", "").partition("x")[0]
    side = size or (int(known) if known.isdigit() else _SIZES.get(config.get("cross_attention_dim", 0), 512))
    hint = config.get("conditioning_embedding_out_channels")
    factor = 2 ** (len(hint) - 1) if hint else _factor(base or said.get("control.base", ""))
    if content.kind == T2I_ADAPTER:
        step = feature_stages(config)[-1][1]
    else:
        step = factor * 2 ** (len(config["block_out_channels"]) - 1)
    if side < step or side % step:
        raise UserError(f"the size {side} does not fit; it must be a multiple of {step}")
    if content.kind == T2I_ADAPTER:
        counted = {"once for a condition": giga(adapter_flops(config, side, side))}
    else:
        counted = {"control call": giga(call_flops(config, side // factor, side // factor))}
        if hint:
            into = config["block_out_channels"][0]
            counted["hint network, once for a condition"] = giga(hint_flops(hint, into, side, side))
    return {f"GFLOP at {side} x {side}": counted}


def _factor(base: str) -> int:
    """Pixels of a picture to one of a base's latent; Stable Diffusion's where the base is not at hand."""
    if base != NANO and not (Path(base) / "vae").is_dir():
        return 8
    vae = read_json(base_folder(base) / "vae" / "config.json")
    return 2 ** (len(vae["block_out_channels"]) - 1)


def _needs(found: Found, content: Content | None) -> str:
    if found.kind == CONTROLNET_XS:
        return "its base's UNet, in diffusers; it is not run here"
    if content is None:
        return "its base with its weights (--base), to which it is a change"
    if content.kind == T2I_ADAPTER:
        return stages_needed(content.config)
    base = base_needed(content.config)
    if content.kind != CTRLORA or content.base_control is not None:
        return base
    name = content.metadata.get("control.base_control")
    mark = content.metadata.get("control.base_control_fingerprint")
    which = f"its base control {name} ({mark})" if name and mark else "its base control, which the file does not name"
    return f"{which}, and {base}"


def _plain(value: str) -> Any:
    try:
        return json.loads(value)
    except (json.JSONDecodeError, RecursionError):
        return value
