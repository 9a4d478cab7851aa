"""What a base is, and what a system would be for it: counted on the meta device, without weights and without memory."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from controlkit.bases.known import KNOWN_BASES
from controlkit.bases.load import NANO, base_folder, load_base
from controlkit.checkpoints.describe import reads_of
from controlkit.checkpoints.flops import controlnet_flops, encode_flops, unet_flops
from controlkit.controls.control import Control
from controlkit.controls.controlnet import HINT_CHANNELS, ControlNet
from controlkit.controls.ctrlora import CtrLoRA, count_adapter, count_base_control
from controlkit.errors import UserError, nearest
from controlkit.files import read_json

SYSTEMS = (ControlNet.kind, CtrLoRA.kind)
"""Systems that `describe_system` knows."""


def is_base(name: str) -> bool:
    """Whether `name` means a base that `describe_base` can tell about."""
    return name == NANO or name in KNOWN_BASES or (Path(name) / "unet").is_dir()


def describe_base(name: str, size: int | None = None) -> dict[str, Any]:
    """Facts about `nano`, a diffusers folder, or a well-known base (`sd15`, `sd21`, `sdxl`), whose shape is enough.

    Args:
        size: side in pixels of the picture that operations are counted for; default: the base's own.

    Raises:
        UserError: there is no such base, or the size does not fit it.
    """
    unet, vae, factor = _configuration(name)
    height = _latent_side(unet, factor, size)
    if name in KNOWN_BASES:
        facts: dict[str, Any] = {"kind": "base", "weights": "none: known by its shape", **_parts(KNOWN_BASES[name])}
        facts["prediction"] = KNOWN_BASES[name]["scheduler"]["prediction_type"]
    else:
        facts = _loaded(name)
    facts["latent"] = f"{unet['in_channels']} channels, {factor} pixels to one"
    facts["own size"] = f"{unet['sample_size'] * factor} x {unet['sample_size'] * factor}"
    facts[f"GFLOP at {height * factor} x {height * factor}"] = {
        "UNet call": _giga(unet_flops(unet, height, height)),
        "autoencoder, encoding": _giga(encode_flops(vae, height * factor, height * factor)),
    }
    return facts


def describe_system(system: str, base: str, rank: int | None = None, size: int | None = None) -> dict[str, Any]:
    """What `controlnet` or `ctrlora` would be for `base`.

    Args:
        base: `nano`, a diffusers folder, or a well-known base, whose configuration is enough.
        rank: of a CtrLoRA adapter; counted too if given.
        size: side in pixels of the picture that operations are counted for; default: the base's own.

    Raises:
        UserError: the system or the base is not known, or the size does not fit.
    """
    unet, vae, factor = _configuration(base)
    side = _latent_side(unet, factor, size)
    if system not in SYSTEMS:
        raise UserError(f"there is no system called {system!r}{nearest(system, list(SYSTEMS))}")
    facts: dict[str, Any] = {"kind": system, "base": base}
    flops = controlnet_flops(unet, factor, side, side)
    # The call of both is the same network; what differs is how the condition image comes in, and how often it runs.
    counted = {"control call": _giga(flops["call"])}
    control: type[Control]
    if system == ControlNet.kind:
        with torch.device("meta"):
            network = ControlNetModel(**{**_kept(unet), "conditioning_embedding_out_channels": HINT_CHANNELS[factor]})
        control = ControlNet
        facts |= {**_count(network), "trainable": _count(network)["parameters"], "memory": _memory(network)}
        counted["hint network, once for a condition"] = _giga(flops["hint"])
    else:
        control = CtrLoRA
        facts["base control"] = count_base_control(unet)
        if rank is not None:
            adapter = count_adapter(unet, rank)
            facts[f"adapter of rank {rank}"] = {**adapter, "trainable": adapter["parameters"]}
        counted["autoencoder, once for a condition"] = _giga(encode_flops(vae, side * factor, side * factor))
    facts[f"GFLOP at {side * factor} x {side * factor}"] = counted
    return {**facts, "reads": reads_of(control), "enters at": control.site.value}


def _configuration(base: str) -> tuple[dict[str, Any], dict[str, Any], int]:
    """The configurations of UNet and autoencoder, and the autoencoder's factor."""
    if base in KNOWN_BASES:
        unet, vae = (KNOWN_BASES[base][part] for part in ("unet", "vae"))
    else:
        folder = base_folder(base)
        unet, vae = (read_json(folder / part / "config.json") for part in ("unet", "vae"))
    return unet, vae, 2 ** (len(vae["block_out_channels"]) - 1)


def _latent_side(unet: Mapping[str, Any], factor: int, size: int | None) -> int:
    step = factor * 2 ** (len(unet["block_out_channels"]) - 1)
    size = unet["sample_size"] * factor if size is None else size
    if size < step or size % step:
        raise UserError(f"the size {size} does not fit; it must be a multiple of {step}")
    return size // factor


def _parts(known: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    with torch.device("meta"):
        networks: dict[str, nn.Module] = {
            "text encoder": CLIPTextModel(CLIPTextConfig(**known["text_encoder"])),
            "autoencoder": AutoencoderKL(**known["vae"]),
            "unet": UNet2DConditionModel(**known["unet"]),
        }
        if "text_encoder_2" in known:
            networks["text encoder 2"] = CLIPTextModelWithProjection(CLIPTextConfig(**known["text_encoder_2"]))
    counts = {name: _count(network) for name, network in networks.items()}
    return {"parameters": sum(count["parameters"] for count in counts.values()), **counts}


def _loaded(name: str) -> dict[str, Any]:
    base = load_base(name)
    counts = [_count(network) for network in base.networks]
    return {
        "kind": "base",
        "prediction": base.prediction_type,
        "fingerprint": base.fingerprint,
        "parameters": sum(count["parameters"] for count in counts),
        "text encoder": _count(base.text_encoder),
        "autoencoder": _count(base.vae),
        "unet": _count(base.unet),
    }


def _count(network: nn.Module) -> dict[str, int]:
    parameters = list(network.parameters())
    return {"tensors": len(parameters), "parameters": sum(p.numel() for p in parameters)}


def _memory(network: nn.Module) -> str:
    count = _count(network)["parameters"]
    return f"{2 * count / 2**20:,.0f} MiB in fp16, {4 * count / 2**20:,.0f} MiB in fp32"


def _giga(operations: int) -> float:
    return round(operations / 1e9, 3)


def _kept(unet: Mapping[str, Any]) -> dict[str, Any]:
    known = inspect.signature(ControlNetModel.__init__).parameters
    return {key: value for key, value in unet.items() if key in known}
