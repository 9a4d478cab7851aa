"""What a file, a control or a base is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from controlkit.bases.load import NANO, load_base
from controlkit.checkpoints.controls import find_control, load_control, read_metadata


def describe(name: str) -> dict[str, Any]:
    """Facts about `nano`, a diffusers folder of a base, a control's name, or a control's file.

    Raises:
        UserError: there is nothing of that name, or it is nothing that is known.
    """
    if name == NANO or (Path(name) / "unet").is_dir():
        return _base(name)
    path = find_control(name)
    control = load_control(path)
    facts: dict[str, Any] = {
        "kind": control.kind,
        "path": str(path),
        **_count(control),
        "reads": ", ".join(flag.name.lower() for flag in control.reads if flag.name) or "nothing",
        "enters at": control.site.value,
        "condition": control.condition or "not said",
    }
    if path.is_file():
        facts["bytes"] = path.stat().st_size
        facts["metadata"] = {key: _plain(value) for key, value in read_metadata(path).items()}
    return facts


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


def _count(network: nn.Module) -> dict[str, int]:
    parameters = list(network.parameters())
    return {"tensors": len(parameters), "parameters": sum(p.numel() for p in parameters)}


def _plain(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value
