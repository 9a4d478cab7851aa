"""What a file, a control or a base is."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel
from torch import nn

from controlkit.bases.known import KNOWN_BASES
from controlkit.bases.load import NANO, base_folder, load_base
from controlkit.checkpoints.content import CONTROLNET_XS
from controlkit.checkpoints.controls import find_control
from controlkit.checkpoints.ctrlora import BASE_KIND
from controlkit.checkpoints.layouts import read_content
from controlkit.checkpoints.recognise import known, recognise
from controlkit.controls.control import Control
from controlkit.controls.controlnet import HINT_CHANNELS, ControlNet
from controlkit.controls.ctrlora import CtrLoRA, count_adapter, count_base_control
from controlkit.errors import UserError, nearest
from controlkit.files import read_json

SYSTEMS = (ControlNet.kind, CtrLoRA.kind)
"""Systems that `describe_system` knows."""

_CONTROLS: dict[str, type[Control]] = {ControlNet.kind: ControlNet, CtrLoRA.kind: CtrLoRA, BASE_KIND: CtrLoRA}
_NEED_A_BASE = ("difference", "control-lora")
"""Layouts that hold only what differs from a base, so that their own tensors are counted."""


def describe(name: str) -> dict[str, Any]:
    """Facts about `nano`, a diffusers folder of a base, a control's name, or a control's file in any layout.

    Raises:
        UserError: there is nothing of that name, or it is nothing that is known.
    """
    if name == NANO or (Path(name) / "unet").is_dir():
        return _base(name)
    path = find_control(name)
    found = known(recognise(path))
    content = None if found.kind == CONTROLNET_XS or found.layout in _NEED_A_BASE else read_content(found)
    control = _CONTROLS.get(found.kind or "")
    tensors = found.file.tensors if content is None else content.tensors
    facts: dict[str, Any] = {
        "kind": found.kind,
        "layout": found.layout,
        "what": found.says,
        "path": str(path),
        "tensors": len(tensors),
        "parameters": sum(value.numel() for value in tensors.values()),
        "dtypes": ", ".join(sorted({str(value.dtype).removeprefix("torch.") for value in tensors.values()})),
    }
    if control is not None:
        facts |= {"reads": _reads(control), "enters at": control.site.value}
    facts["condition"] = found.file.metadata.get("control.condition") or "not said"
    if content is not None and content.rank is not None:
        facts["rank"] = content.rank
    if content is not None and content.notes:
        facts["notes"] = "; ".join(content.notes)
    if path.is_file():
        facts["bytes"] = path.stat().st_size
    facts["metadata"] = {key: _plain(value) for key, value in found.file.metadata.items()}
    return facts


def describe_system(system: str, base: str, rank: int | None = None) -> dict[str, Any]:
    """What `controlnet` or `ctrlora` would be for `base`, counted without weights and without memory.

    Args:
        base: `nano`, a diffusers folder, or a well-known base (`sd15`), whose configuration is enough.
        rank: of a CtrLoRA adapter; counted too if given.

    Raises:
        UserError: the system or the base is not known.
    """
    unet, factor = _configuration(base)
    facts: dict[str, Any] = {"kind": system, "base": base}
    if system == ControlNet.kind:
        with torch.device("meta"):
            network = ControlNetModel(**{**_kept(unet), "conditioning_embedding_out_channels": HINT_CHANNELS[factor]})
        control: type[Control] = ControlNet
        facts |= _count(network)
    elif system == CtrLoRA.kind:
        control = CtrLoRA
        facts["base control"] = count_base_control(unet)
        if rank is not None:
            facts[f"adapter of rank {rank}"] = count_adapter(unet, rank)
    else:
        raise UserError(f"there is no system called {system!r}{nearest(system, list(SYSTEMS))}")
    return {**facts, "reads": _reads(control), "enters at": control.site.value}


def _configuration(base: str) -> tuple[dict[str, Any], int]:
    """The UNet's configuration and the autoencoder's factor."""
    if base in KNOWN_BASES:
        unet, vae = (KNOWN_BASES[base][part] for part in ("unet", "vae"))
    else:
        folder = base_folder(base)
        unet, vae = (read_json(folder / part / "config.json") for part in ("unet", "vae"))
    return unet, 2 ** (len(vae["block_out_channels"]) - 1)


def _kept(unet: dict[str, Any]) -> dict[str, Any]:
    known = inspect.signature(ControlNetModel.__init__).parameters
    return {key: value for key, value in unet.items() if key in known}


def _base(name: str) -> dict[str, Any]:
    base = load_base(name)
    return {
        "kind": "base",
        "latent": f"{base.latent_channels} channels, {base.factor} pixels to one",
        "size": f"{base.size} x {base.size}, sides multiples of {base.size_multiple}",
        "prediction": base.prediction_type,
        "fingerprint": base.fingerprint,
        "parameters": sum(_count(network)["parameters"] for network in base.networks),
        "text encoder": _count(base.text_encoder),
        "autoencoder": _count(base.vae),
        "unet": _count(base.unet),
    }


def _reads(control: Control | type[Control]) -> str:
    return ", ".join(flag.name.lower() for flag in control.reads if flag.name) or "nothing"


def _count(network: nn.Module) -> dict[str, int]:
    parameters = list(network.parameters())
    return {"tensors": len(parameters), "parameters": sum(p.numel() for p in parameters)}


def _plain(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value
