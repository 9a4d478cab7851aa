"""What a base is, and what a system would be for it: counted on the meta device, without weights and without memory."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, T2IAdapter, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from controlkit.bases.base import encoder_stages
from controlkit.bases.known import KNOWN_BASES, known_by_shape
from controlkit.bases.load import HUB_ID, NANO, SINGLE_FILES, base_folder, load_base
from controlkit.bases.single_file import family_of_file
from controlkit.checkpoints.controls import shipped_controls
from controlkit.checkpoints.ctrlora import SUFFIXES
from controlkit.checkpoints.describe import base_needed, giga, memory_of, reads_of, stages_needed
from controlkit.checkpoints.flops import adapter_flops, call_flops, encode_flops, hint_flops, unet_flops
from controlkit.checkpoints.recognise import recognise
from controlkit.controls.control import Control
from controlkit.controls.controlnet import HINT_CHANNELS, ControlNet
from controlkit.controls.ctrlora import CtrLoRA, count_adapter, count_base_control
from controlkit.controls.t2i_adapter import T2IAdapterControl, config_for, listed_stages
from controlkit.errors import UserError, nearest
from controlkit.files import read_json

SYSTEMS = (ControlNet.kind, CtrLoRA.kind, T2IAdapterControl.kind)
"""Systems that `describe_system` knows."""


def is_base(name: str) -> bool:
    """Whether `name` means a base that `describe_base` can tell about, and no control."""
    path = Path(name)
    if name == NANO or known_by_shape(name) or (path / "unet").is_dir():
        return True
    if not path.exists():
        return bool(HUB_ID.fullmatch(name)) and path.suffix not in SUFFIXES and name not in shipped_controls()
    if path.is_dir() or path.suffix not in SINGLE_FILES or path.stat().st_size == 0:
        return False
    try:
        return recognise(path).kind is None and bool(family_of_file(path))
    except UserError:
        return False


def describe_base(name: str, size: int | None = None) -> dict[str, Any]:
    """Facts about a base: `nano`, a diffusers folder, a single file, an id on the hub, or a well-known one (`sd15`,
    `sd21`, `sdxl`), whose shape is enough.

    Args:
        size: side in pixels of the picture that operations are counted for; default: the base's own.

    Raises:
        UserError: there is no such base, or the size does not fit it.
    """
    unet, vae, factor = _configuration(name)
    height = _latent_side(unet, factor, size)
    if known_by_shape(name):
        facts: dict[str, Any] = {"kind": "base", "weights": "none: known by its shape", **_parts(KNOWN_BASES[name])}
        facts["prediction"] = KNOWN_BASES[name]["scheduler"]["prediction_type"]
    else:
        facts = _loaded(name)
    facts |= {"trainable": 0, "memory": memory_of(facts["parameters"])}
    facts["latent"] = f"{unet['in_channels']} channels, {factor} pixels to one"
    facts["own size"] = f"{unet['sample_size'] * factor} x {unet['sample_size'] * factor}"
    facts["where features of a T2I-Adapter enter"] = listed_stages(encoder_stages(unet, factor)[:-1])
    facts[f"GFLOP at {height * factor} x {height * factor}"] = {
        "UNet call": giga(unet_flops(unet, height, height)),
        "autoencoder, encoding": giga(encode_flops(vae, height * factor, height * factor)),
    }
    return facts


def describe_system(system: str, base: str, rank: int | None = None, size: int | None = None) -> dict[str, Any]:
    """What a system (`SYSTEMS`) would be for `base`: its tensors, operations, and what it reads and needs.

    Args:
        base: as `describe_base` takes it; its configuration is enough.
        rank: of a CtrLoRA adapter; counted too if given.
        size: side in pixels of the picture that operations are counted for; default: the base's own.

    Raises:
        UserError: the system or the base is not known, or the size does not fit.
    """
    if system not in SYSTEMS:
        raise UserError(f"there is no system called {system!r}{nearest(system, list(SYSTEMS))}")
    unet, vae, factor = _configuration(base)
    side = _latent_side(unet, factor, size)
    facts, counted, control = _SYSTEMS[system](unet, vae, factor, side, rank)
    said = {"kind": system, "base": base, **facts, f"GFLOP at {side * factor} x {side * factor}": counted}
    return {**said, "reads": reads_of(control), "enters at": control.site.value}


_Told = tuple[dict[str, Any], dict[str, float], type[Control]]


def _controlnet(unet: Mapping[str, Any], vae: Mapping[str, Any], factor: int, side: int, rank: int | None) -> _Told:
    channels = HINT_CHANNELS[factor]
    with torch.device("meta"):
        network = ControlNetModel(**{**_kept(unet), "conditioning_embedding_out_channels": channels})
    facts = {**_trained(_count(network)), "needs": base_needed(unet)}
    hint = hint_flops(channels, unet["block_out_channels"][0], side * factor, side * factor)
    counted = {"control call": giga(call_flops(unet, side, side)), "hint network, once for a condition": giga(hint)}
    return facts, counted, ControlNet


def _ctrlora(unet: Mapping[str, Any], vae: Mapping[str, Any], factor: int, side: int, rank: int | None) -> _Told:
    facts: dict[str, Any] = {"base control": _trained(count_base_control(unet))}
    if rank is not None:
        if rank < 1:
            raise UserError(f"the rank is {rank}; it must be 1 or more")
        facts[f"adapter of rank {rank}"] = _trained(count_adapter(unet, rank))
    facts["needs"] = f"an adapter: its base control; both: {base_needed(unet)}"
    counted = {
        "control call": giga(call_flops(unet, side, side)),
        "autoencoder, once for a condition": giga(encode_flops(vae, side * factor, side * factor)),
    }
    return facts, counted, CtrLoRA


def _t2i_adapter(unet: Mapping[str, Any], vae: Mapping[str, Any], factor: int, side: int, rank: int | None) -> _Told:
    facts: dict[str, Any] = {}
    config = config_for(unet, factor)
    with torch.device("meta"):
        facts |= _trained(_count(T2IAdapter(**config)))
        facts["for grey pictures"] = _trained(_count(T2IAdapter(**config_for(unet, factor, colours=1))))
        with suppress(UserError):
            facts["light"] = _trained(_count(T2IAdapter(**config_for(unet, factor, light=True))))
    facts["network"] = config["adapter_type"]
    facts["needs"] = stages_needed(config)
    return facts, {"once for a condition": giga(adapter_flops(config, side * factor, side * factor))}, T2IAdapterControl


_SYSTEMS: dict[str, Callable[..., _Told]] = {
    ControlNet.kind: _controlnet,
    CtrLoRA.kind: _ctrlora,
    T2IAdapterControl.kind: _t2i_adapter,
}
"""System -> its facts, its operations in GFLOP, and its class."""


_UNET_KEYS = ("block_out_channels", "in_channels", "cross_attention_dim", "sample_size")


def _configuration(base: str) -> tuple[dict[str, Any], dict[str, Any], int]:
    """The configurations of UNet and autoencoder, and the autoencoder's factor."""
    of_file = Path(base).suffix in SINGLE_FILES and not Path(base).is_dir()
    if of_file or known_by_shape(base):
        known = KNOWN_BASES[family_of_file(Path(base)) if of_file else base]
        unet, vae = known["unet"], known["vae"]
    else:
        folder = base_folder(base)
        unet, vae = (read_json(folder / part / "config.json") for part in ("unet", "vae"))
        for part, config, wanted in (("unet", unet, _UNET_KEYS), ("vae", vae, ("block_out_channels",))):
            lacks = [key for key in wanted if not isinstance(config, dict) or key not in config]
            if lacks:
                raise UserError(f"{folder / part / 'config.json'} does not say {', '.join(lacks)}; it is not whole")
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
    networks = {"text encoder": base.text_encoder, "autoencoder": base.vae, "unet": base.unet}
    networks |= {f"text encoder {place}": encoder for place, encoder in enumerate(base.text_encoders[1:], 2)}
    counts = {part: _count(network) for part, network in networks.items()}
    return {
        "kind": "base",
        "prediction": base.prediction_type,
        "fingerprint": base.fingerprint,
        "parameters": sum(count["parameters"] for count in counts.values()),
        **counts,
    }


def _count(network: nn.Module) -> dict[str, int]:
    parameters = list(network.parameters())
    return {"tensors": len(parameters), "parameters": sum(p.numel() for p in parameters)}


def _trained(counts: Mapping[str, int]) -> dict[str, Any]:
    """Counts of a network all of which is trained, and its memory."""
    return {**counts, "trainable": counts["parameters"], "memory": memory_of(counts["parameters"])}


def _kept(unet: Mapping[str, Any]) -> dict[str, Any]:
    known = inspect.signature(ControlNetModel.__init__).parameters
    return {key: value for key, value in unet.items() if key in known}
