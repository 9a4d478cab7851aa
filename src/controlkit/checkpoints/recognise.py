"""What a file or folder is: by its metadata, then by the names and shapes in it, never by its own name."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from controlkit.checkpoints.content import (
    CONTROLNET,
    CONTROLNET_XS,
    CTRLORA,
    CTRLORA_BASE,
    KINDS,
    T2I_ADAPTER,
)
from controlkit.checkpoints.foreign import relative, seems
from controlkit.checkpoints.tensors import TensorFile, read_tensor_file
from controlkit.errors import UserError
from controlkit.files import read_json

CONTROL_PREFIX = "control_model."
"""Of a control's tensors in the files of lllyasviel/ControlNet and of xyfJASON/ctrlora."""
UNET_PREFIX = "model.diffusion_model."
"""Of the UNet's tensors in a whole Stable Diffusion checkpoint."""

_CLASSES = {
    "ControlNetModel": CONTROLNET,
    "T2IAdapter": T2I_ADAPTER,
    "ControlNetXSAdapter": CONTROLNET_XS,
}
_OTHER_CLASSES = {
    "UNetControlNetXSModel": "a UNet with a ControlNet-XS grown into it; a folder of the adapter alone is recognised",
    "ControlNetUnionModel": "a ControlNet Union (several conditions in one network), which is not read",
    "MultiAdapter": "several T2I-Adapters in one folder; give one of them",
    "UNet2DConditionModel": "a UNet (UNet2DConditionModel): part of a base, not a control",
    "AutoencoderKL": "an autoencoder: part of a base, not a control",
}


@dataclass(frozen=True)
class Found:
    """What is at a path, and what it was taken for."""

    path: Path
    kind: str | None
    """As `control.kind` has it; None if it is no control that is read."""
    layout: str | None
    """Name of its layout."""
    says: str
    """What it seems to be, in a few words."""
    file: TensorFile
    config: dict[str, Any] = field(default_factory=dict)
    """Of a folder, its JSON."""


def recognise(path: str | Path) -> Found:
    """Say what a file or folder is. Tensors are mapped, not copied.

    Raises:
        UserError: it cannot be read at all: empty, torn, no file of tensors, a pickle of more than tensors, or a
            folder without a model.
    """
    path = Path(path)
    if path.is_dir():
        return _recognise_folder(path)
    file = read_tensor_file(path)
    kind, layout, says = _classify(file)
    return Found(path, kind, layout, says, file)


def known(found: Found) -> Found:
    """The same, if it is a control that is read.

    Raises:
        UserError: it is something else; the message says what it seems to be.
    """
    if found.kind is None or found.layout is None:
        raise UserError(f"{found.path} is not a control that can be read; it seems to be {found.says}")
    return found


def _classify(file: TensorFile) -> tuple[str | None, str | None, str]:
    """Kind, layout and words. The layout follows from the names alone; metadata decides between kinds."""
    names = set(file.tensors)
    said = file.metadata.get("control.kind")
    if said is not None and said not in KINDS:
        return None, None, f"a control of kind {said!r}, which this version does not know"
    if "lora_controlnet" in names:
        return CONTROLNET, "control-lora", "a Control-LoRA: a ControlNet as low-rank changes of the base's UNet"
    if (says := relative(names)) is not None:
        return None, None, says
    if found := _classify_original(names):
        return found
    if found := _classify_diffusers(names):
        return (said or found[0]), found[1], found[2]
    if found := _classify_t2i(file.tensors):
        return found
    if said is not None:
        return said, "controlkit", KINDS[said]
    if {"control_to_base_for_conv_in.weight", "conv_in.weight"} <= names:
        return None, None, "a ControlNet-XS out of its diffusers folder; give the folder, which has its config too"
    return None, None, seems(file.tensors, file.others)


def _classify_original(names: Collection[str]) -> tuple[str, str, str] | None:
    """Names of the original code, with or without its prefix."""
    prefix = CONTROL_PREFIX if any(name.startswith(CONTROL_PREFIX) for name in names) else ""
    layout = "original" if prefix else "bare"
    inside = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    zero_convolutions = "zero_convs.0.0.weight" in inside
    # A file that lost a tensor should still be told apart, so several names speak for each kind.
    encoder = any(name in inside for name in ("input_blocks.0.0.weight", "input_blocks.1.0.in_layers.2.weight"))
    hint = any(name.startswith("input_hint_block.") for name in inside)
    lora = any(".lora_layer." in name for name in inside)
    whole = any(name.startswith(UNET_PREFIX) for name in names)
    if not (zero_convolutions or hint or (prefix and (encoder or lora))):
        return None
    if hint and "difference" in names:
        return CONTROLNET, "difference", "a ControlNet as its difference from the base's UNet"
    if hint:
        if whole:
            return CONTROLNET, "full", "a ControlNet together with the whole Stable Diffusion that it was trained in"
        return CONTROLNET, layout, "a ControlNet under the names of the original code"
    if encoder and lora and whole:
        return CTRLORA, "full", "an adapter of CtrLoRA, its base control and a whole Stable Diffusion, in one file"
    if encoder:
        return CTRLORA_BASE, layout, "a base control of CtrLoRA under the names of the original code"
    if lora:
        return CTRLORA, layout, "an adapter of CtrLoRA under the names of the original code"
    return None


def _classify_diffusers(names: Collection[str]) -> tuple[str, str, str] | None:
    """One file in diffusers' names: ours, or another tool's without metadata."""
    zero_convolutions = any(name.startswith("controlnet_down_blocks.") for name in names)
    if not zero_convolutions:
        return None
    if any(name.startswith("controlnet_cond_embedding.") for name in names):
        return CONTROLNET, "controlkit", "a ControlNet under diffusers' names"
    if any(".lora_layer." in name for name in names):
        return CTRLORA, "controlkit", "an adapter of CtrLoRA under diffusers' names"
    return CTRLORA_BASE, "controlkit", "a base control of CtrLoRA under diffusers' names"


def _classify_t2i(tensors: Mapping[str, Tensor]) -> tuple[str, str, str] | None:
    def four_dimensional(name: str) -> bool:
        return name in tensors and tensors[name].ndim == 4

    if four_dimensional("adapter.body.0.resnets.0.block1.weight"):
        return T2I_ADAPTER, "controlkit", "a T2I-Adapter under diffusers' names"
    full = four_dimensional("body.0.block1.weight") and four_dimensional("conv_in.weight")
    if full or four_dimensional("body.0.body.0.block1.weight"):
        return T2I_ADAPTER, "original", "a T2I-Adapter under the names of the original code"
    return None


def _recognise_folder(path: Path) -> Found:
    nothing = TensorFile(path, {})
    if (path / "adapter_config.json").is_file():
        config = _mapping(path / "adapter_config.json")
        file = _weights(path, "adapter_model")
        if any(".controlnet_down_blocks." in name for name in file.tensors):
            return Found(path, CTRLORA, "peft", "an adapter of CtrLoRA as PEFT's folder", file, config)
        return Found(path, None, None, "a PEFT adapter of another network", file, config)
    if (path / "model_index.json").is_file() or (path / "unet").is_dir():
        return Found(path, None, None, "diffusers' folder of a whole base, not of a control", nothing)
    if not (path / "config.json").is_file():
        weights = next(path.glob("*.safetensors"), None)
        instead = f"; {weights.name} in it may be a control by itself: give that file" if weights else ""
        raise UserError(f"{path} is not a diffusers folder of a control, nor PEFT's: it has no config.json{instead}")
    config = _mapping(path / "config.json")
    name = str(config.get("_class_name", "model of no class"))
    kind = _CLASSES.get(name)
    if kind is None:
        return Found(path, None, None, _OTHER_CLASSES.get(name, f"a {name}"), nothing, config)
    file = _weights(path, "diffusion_pytorch_model")
    return Found(path, kind, "diffusers", f"{KINDS[kind]} as diffusers' folder ({name})", file, config)


def _weights(folder: Path, stem: str) -> TensorFile:
    """The weights of a folder, in one file or in several of an index."""
    for name in (f"{stem}.safetensors", f"{stem}.fp16.safetensors", f"{stem}.bin", f"{stem}.fp16.bin"):
        if (folder / name).is_file():
            return read_tensor_file(folder / name)
    index = folder / f"{stem}.safetensors.index.json"
    if not index.is_file():
        raise UserError(f"{folder} has a config, but no weights: {stem}.safetensors is missing")
    parts = sorted(set(_mapping(index).get("weight_map", {}).values()))
    tensors: dict[str, Tensor] = {}
    for part in parts:
        if Path(part).name != part:
            raise UserError(f"{index} names {part!r}, which is not a file of the folder")
        tensors |= read_tensor_file(folder / part).tensors
    return TensorFile(folder, tensors)


def _mapping(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path} is not the config of a network: expected a mapping")
    return value
