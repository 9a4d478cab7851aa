"""Files of a GLIGEN: gligen/GLIGEN's checkpoints, and diffusers' UNet with gated attention.

Names: `position_net` everywhere; `fusers.N` here is `BLOCK.fuser` in UNets.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from controlkit.bases.stable_diffusion import SD15_UNET
from controlkit.bases.unet import attention_blocks, layers_of
from controlkit.controls.control import Control
from controlkit.controls.encoder_copy.network import with_heads
from controlkit.controls.file_format import (
    CONFIG_ERRORS,
    Checkpoint,
    Reference,
    TensorFile,
    Written,
    check_names,
    declared_config,
    on_one_line,
)
from controlkit.controls.gligen.boxes import MAX_OBJECTS
from controlkit.controls.gligen.config import PHRASE_WIDTH, config_for, max_objects_of
from controlkit.errors import UserError

_Value = TypeVar("_Value")

_FUSER = re.compile(r"(.+\.transformer_blocks\.\d+)\.fuser\.(.+)")
_UNET_PREFIX = "model.diffusion_model."
_ORIGINAL_UNET = re.compile(r"(input_blocks|middle_block|output_blocks|time_embed|out|label_emb)\.")


def _original_path(module: str, layers: Sequence[int]) -> str:
    """diffusers' path of a transformer block -> the original's.

    Args:
        layers: number of layers of each encoder block.
    """
    part, *numbers = re.findall(
        r"[a-z]+_blocks?|\d+", module.replace("transformer_blocks", "").replace("attentions", "")
    )
    inner = numbers[-1]
    if part == "mid_block":
        return f"middle_block.1.transformer_blocks.{inner}"
    block, layer = int(numbers[0]), int(numbers[1])
    if part == "down_blocks":
        return f"input_blocks.{1 + sum(layers[:block]) + block + layer}.1.transformer_blocks.{inner}"
    upwards = [count + 1 for count in reversed(layers)]
    return f"output_blocks.{sum(upwards[:block]) + layer}.1.transformer_blocks.{inner}"


def _paths(config: Mapping[str, Any], *, original: bool) -> list[str]:
    """Paths of the transformer blocks in a UNet, in order."""
    modules = [block.module for block in attention_blocks(with_heads(config))]
    return [_original_path(module, layers_of(config)) for module in modules] if original else modules


def _to_unet_names(values: Mapping[str, _Value], paths: Sequence[str]) -> dict[str, _Value]:
    """Values under the names that tensors have in a UNet whose transformer blocks are at `paths`."""

    def renamed(name: str) -> str:
        _, _, rest = name.partition("fusers.")
        place, _, layer = rest.partition(".")
        return f"{paths[int(place)]}.fuser.{layer}" if rest else name

    return {renamed(name): value for name, value in values.items()}


def _is_ours(name: str) -> bool:
    return name.startswith("position_net.") or _FUSER.fullmatch(name) is not None


def _without_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(_UNET_PREFIX): value for name, value in tensors.items()}


def _detect(names: Mapping[str, Tensor], block: str, description: str) -> str | None:
    found = "position_net.linears.0.weight" in names and any(
        name.startswith(block) and _FUSER.fullmatch(name) for name in names
    )
    return f"a GLIGEN of boxes with phrases under {description}" if found else None


def detect_original(file: TensorFile) -> str | None:
    return _detect(_without_prefix(file.tensors), "input_blocks.", "the names of the original code")


def detect_diffusers(file: TensorFile) -> str | None:
    return _detect(file.tensors, "down_blocks.", "the names of diffusers' UNet")


def is_gated_unet(config: Mapping[str, Any]) -> bool:
    return config.get("_class_name") == UNet2DConditionModel.__name__ and config.get("attention_type") == "gated"


def read_original(kind: type[Control], file: TensorFile, reference: Reference, description: str) -> Checkpoint:
    """A file with the original's names: only the control's tensors, or with the UNet around them."""
    tensors = _without_prefix(file.tensors)
    own = {name: value for name, value in tensors.items() if _is_ours(name)}
    unknown = {name: value for name, value in tensors.items() if not _is_ours(name) and not _ORIGINAL_UNET.match(name)}
    first = tensors.get("input_blocks.0.0.weight")
    return _checkpoint(kind, file, reference, description, own, unknown, original=True, first=first)


def read_diffusers(kind: type[Control], file: TensorFile, reference: Reference, description: str) -> Checkpoint:
    """A UNet with gated attention, or only the control's tensors with its names."""
    own = {name: value for name, value in file.tensors.items() if _is_ours(name)}
    unknown = {name: value for name, value in file.tensors.items() if name not in own}
    first = file.tensors.get("conv_in.weight")
    if unknown:
        config = _plain(file.config or reference.unet_config or SD15_UNET)
        try:
            with torch.device("meta"):
                names = UNet2DConditionModel(**{**config, "attention_type": "default"}).state_dict()
        except CONFIG_ERRORS as error:
            raise UserError(
                f"{file.path} looks like {description}, but {on_one_line(error)}", "damaged-file"
            ) from error
        unknown = {name: value for name, value in unknown.items() if name not in names}
    return _checkpoint(kind, file, reference, description, own, unknown, original=False, first=first)


def _checkpoint(
    kind: type[Control],
    file: TensorFile,
    reference: Reference,
    description: str,
    own: Mapping[str, Tensor],
    unknown: Mapping[str, Tensor],
    *,
    original: bool,
    first: Tensor | None,
) -> Checkpoint:
    """The checkpoint of the control's tensors with the names that they have in a UNet.

    Args:
        unknown: tensors that are neither the control's nor the UNet's.
        first: weight of the UNet's first convolution, if the file has it.

    Raises:
        UserError: names or shapes are not those of a control for the UNet of the file, of the reference, or of Stable
            Diffusion 1.
    """
    if first is not None and first.shape[1] == 9:
        raise UserError(
            f"{file.path} is a GLIGEN for inpainting, whose first convolution was trained too; only GLIGENs for"
            " generation are supported",
            "unsupported",
        )
    phrase_width = _phrase_width(own)
    declared = declared_config(file.metadata)
    unet_config = file.config or reference.unet_config or SD15_UNET
    try:
        config = declared or config_for(unet_config, phrase_width)
        expected = kind.shapes(config)
        in_file = _to_unet_names(expected, _paths(config, original=original))
    except CONFIG_ERRORS as error:
        raise UserError(f"{file.path} looks like {description}, but {on_one_line(error)}", "damaged-file") from error
    try:
        check_names(file.path, description, in_file, {**own, **unknown}, _others(file, original))
    except UserError as error:
        if declared or file.config or reference.unet_config:
            raise
        raise UserError(
            f"{error} (compared with Stable Diffusion 1; if it was made for another base, pass that: --base)",
            error.code,
        ) from error
    tensors = {name: own[place] for name, place in zip(expected, in_file, strict=True)}
    notes = (
        ["the UNet in the file is left out: the control acts on the base that is in use"] if first is not None else []
    )
    return Checkpoint(kind.kind, config, tensors, dict(file.metadata), notes=notes, path=file.path)


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without private entries."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


def _others(file: TensorFile, original: bool) -> Sequence[str]:
    """Entries of a file that are neither tensors nor parts of the original's checkpoint around its UNet."""
    around = ("autoencoder", "text_encoder", "diffusion", "opt", "scheduler", "iters", "ema", "config_dict")
    return [name for name in file.others if not (original and name in around)]


def _phrase_width(tensors: Mapping[str, Tensor]) -> int:
    weight = tensors.get("position_net.null_positive_feature")
    return 0 if weight is None or weight.ndim != 1 else len(weight)


def _check_objects(checkpoint: Checkpoint) -> None:
    """Refuse a control that other tools would run with another number of grounding tokens."""
    if (number := max_objects_of(checkpoint.config)) != MAX_OBJECTS:
        raise UserError(
            f"{checkpoint.path} has {number} grounding tokens (max_objects); other tools always compute {MAX_OBJECTS},"
            " with which it would give other images. Train it with max_objects=30 to convert it",
            "unsupported",
        )


def to_original(checkpoint: Checkpoint) -> dict[str, Tensor]:
    _check_objects(checkpoint)
    return _to_unet_names(checkpoint.tensors, _paths(checkpoint.config, original=True))


def write_diffusers(checkpoint: Checkpoint, reference: Reference) -> Written:
    """The control inside the UNet of a base.

    Raises:
        UserError: there is no base, the control does not fit it, or its number of grounding tokens is not 30.
    """
    _check_objects(checkpoint)
    unet_config, weights = reference.unet_config, reference.unet_weights
    if unet_config is None or weights is None:
        raise UserError("diffusers' folder contains the base's UNet too; pass the base (--base)", "missing-setting")
    config, width = checkpoint.config, checkpoint.config[PHRASE_WIDTH]
    if attention_blocks(config) != attention_blocks(unet_config) or width != unet_config["cross_attention_dim"]:
        raise UserError(
            f"{checkpoint.path} does not fit the UNet of the base, or its phrases have another width ({width}) than the"
            " text, which diffusers does not support",
            "incompatible",
        )
    return Written(
        tensors={**weights, **_to_unet_names(checkpoint.tensors, _paths(config, original=False))},
        configs={
            "config.json": {
                "_class_name": UNet2DConditionModel.__name__,
                **_plain(unet_config),
                "attention_type": "gated",
            },
        },
    )
