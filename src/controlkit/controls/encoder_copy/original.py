"""Files with the original code's names: `control_model.*`, bare, or inside a full Stable Diffusion checkpoint.

A ControlNet 1.1 file contains `control_model.*` only; many tools drop the prefix (`bare`). ControlNet 1.0's files and
training checkpoints contain all of Stable Diffusion too (`full`), whose decoder was trained along with the control
(lllyasviel/ControlNet #13; #625 shows that its weights differ from Stable Diffusion 1.5's). Converters take the control
alone; here a note says so, and `convert --decoder` keeps a ControlNet's decoder.

Read from .pth, .ckpt or safetensors, written as safetensors: pickles are never written.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from controlkit.controls.control import Control
from controlkit.controls.encoder_copy.names import Structure
from controlkit.controls.file_format import (
    CONFIG_ERRORS,
    Checkpoint,
    Reference,
    TensorFile,
    check_names,
    declared_config,
    on_one_line,
)
from controlkit.errors import UserError

PREFIX = "control_model."
"""Prefix of a control's tensors in files of lllyasviel/ControlNet and xyfJASON/ctrlora."""
UNET_PREFIX = "model.diffusion_model."
"""Prefix of the UNet's tensors in a Stable Diffusion checkpoint."""

ORIGINAL_DESCRIPTION = "the original code's names (control_model.*), as in ControlNet 1.1 and CtrLoRA's pair of files"
BARE_DESCRIPTION = "the original code's names without the prefix control_model"
FULL_DESCRIPTION = "a control inside a full Stable Diffusion checkpoint, as in ControlNet 1.0 and training checkpoints"

_STABLE_DIFFUSION = re.compile(
    # The networks, and their moving average.
    r"(model|first_stage_model|cond_stage_model|conditioner|model_ema)\."
    # The noise schedule, which the original code keeps as buffers.
    r"|(betas|logvar|lvlb_weights|scale_factor|posterior_\w+|(\w+_)?alphas_cumprod(_prev)?)$"
)
"""Names in a Stable Diffusion checkpoint that do not belong to the control."""


@dataclass(frozen=True)
class Names:
    """The original's names in a file, and what they reveal."""

    prefix: str
    inside: frozenset[str]
    """Names of the control, without the prefix."""
    has_stable_diffusion: bool
    """Whether the file also contains Stable Diffusion's UNet."""

    @classmethod
    def of(cls, names: Collection[str]) -> Names:
        """From all names of a file."""
        prefix = PREFIX if any(name.startswith(PREFIX) for name in names) else ""
        inside = frozenset(name.removeprefix(prefix) for name in names if name.startswith(prefix))
        return cls(prefix, inside, any(name.startswith(UNET_PREFIX) for name in names))

    @property
    def has_zero_convolutions(self) -> bool:
        """Whether it has the zero convolutions of a copy."""
        return "zero_convs.0.0.weight" in self.inside

    @property
    def has_encoder(self) -> bool:
        """Whether it has the encoder of a copy; one of two names suffices, as a damaged file may lack one."""
        return any(name in self.inside for name in ("input_blocks.0.0.weight", "input_blocks.1.0.in_layers.2.weight"))

    @property
    def has_resnets(self) -> bool:
        """Whether its blocks are ResNet blocks with time embeddings, as in a UNet; other networks share all other
        names."""
        return any(".in_layers." in name or ".emb_layers." in name for name in self.inside)

    @property
    def has_hint_network(self) -> bool:
        """Whether it has a hint network."""
        return any(name.startswith("input_hint_block.") for name in self.inside)

    @property
    def has_lora(self) -> bool:
        """Whether it has LoRA."""
        return any(".lora_layer." in name for name in self.inside)

    @property
    def is_copy(self) -> bool:
        """Whether these are names of an encoder copy with at most one hint network, or of an adapter of one."""
        # The hint networks of several tasks, and features of several conditions, belong to other systems.
        if any(name.startswith(("input_hint_block_", "feature_extractor.")) for name in self.inside):
            return False
        return (
            self.has_zero_convolutions
            or self.has_hint_network
            or bool(self.prefix and (self.has_encoder or self.has_lora))
        )


@dataclass(frozen=True)
class FullCheckpoint:
    """The tensors of a Stable Diffusion checkpoint with a control in it, separated."""

    inside: dict[str, Tensor]
    """The control's, without the prefix."""
    stable_diffusion: dict[str, Tensor]
    """Stable Diffusion's."""
    unknown: tuple[str, ...]
    """Names that belong to neither."""

    @classmethod
    def of(cls, file: TensorFile) -> FullCheckpoint:
        """From a file."""
        inside: dict[str, Tensor] = {}
        stable_diffusion: dict[str, Tensor] = {}
        unknown: list[str] = list(file.others)
        for name, value in file.tensors.items():
            if name.startswith(PREFIX):
                inside[name.removeprefix(PREFIX)] = value
            elif _STABLE_DIFFUSION.match(name):
                stable_diffusion[name] = value
            else:
                unknown.append(name)
        return cls(inside, stable_diffusion, tuple(unknown))


def is_of_stable_diffusion(name: str) -> bool:
    """Whether a tensor of a full checkpoint belongs to Stable Diffusion."""
    return _STABLE_DIFFUSION.match(name) is not None


def full_note(stable_diffusion: Collection[str]) -> str:
    """A note on the tensors of Stable Diffusion in a file, which are dropped."""
    return f"the file also contains all of Stable Diffusion ({len(stable_diffusion)} tensors); only the control is used"


def without_prefix(file: TensorFile) -> tuple[dict[str, Tensor], tuple[str, ...], str]:
    """Content of a file that contains one control: its tensors without the prefix, other names, and the prefix."""
    prefix = Names.of(file.tensors).prefix
    inside = {name.removeprefix(prefix): value for name, value in file.tensors.items() if name.startswith(prefix)}
    outside = [name for name in file.tensors if not name.startswith(prefix)]
    return inside, (*file.others, *outside), prefix


def read_original(kind: type[Control], file: TensorFile, reference: Reference) -> Checkpoint:
    """A file that contains one control, with or without the prefix."""
    inside, others, prefix = without_prefix(file)
    return from_original(kind, file, kind.title, inside, reference, others=others, prefix=prefix)


def from_original(
    kind: type[Control],
    file: TensorFile,
    description: str,
    tensors: Mapping[str, Tensor],
    reference: Reference,
    *,
    others: tuple[str, ...] = (),
    prefix: str = "",
) -> Checkpoint:
    """The checkpoint of tensors with the original's names; every tensor must be accounted for.

    Args:
        description: the supposed content, for errors.
        prefix: of the names in the file, for errors.

    Raises:
        UserError: names or shapes are not those of such a network.
    """
    path: Path = file.path
    unet_config: Mapping[str, Any] = reference.unet_config or {}
    label = "class_embedding" if unet_config.get("class_embed_type") else "add_embedding"
    try:
        structure = Structure.of_original(tensors, label)
        rename = structure.to_diffusers()
        renamed = {name: new for name in tensors if (new := rename(name)) is not None}
        own_tensors = {new: tensors[name] for name, new in renamed.items()}
        config = declared_config(file.metadata) or kind.config_of(own_tensors, reference.unet_config)
        expected = kind.shapes(config)
        original_name = Structure.of_diffusers(expected).to_original()
    except CONFIG_ERRORS as error:
        raise UserError(f"{path} looks like {description}, but {on_one_line(error)}", "damaged-file") from error
    expected_in_file = {f"{prefix}{original_name(name) or name}": shape for name, shape in expected.items()}
    check_names(
        path, description, expected_in_file, {f"{prefix}{name}": value for name, value in tensors.items()}, others
    )
    # In the network's order, on which the fingerprint depends.
    ordered = {name: own_tensors[name] for name in expected}
    return Checkpoint(kind.kind, config, ordered, dict(file.metadata), path=path)


def to_original(checkpoint: Checkpoint, prefix: str = "") -> dict[str, Tensor]:
    """Its tensors with the original's names.

    Raises:
        UserError: a tensor has no name there.
    """
    rename = Structure.of_diffusers(checkpoint.tensors).to_original()
    renamed = {name: rename(name) for name in checkpoint.tensors}
    if lost := [name for name, new in renamed.items() if new is None]:
        raise UserError(
            f"the original code has no names for {len(lost)} tensors of this control, such as {lost[0]}", "unsupported"
        )
    return {f"{prefix}{renamed[name]}": value for name, value in checkpoint.tensors.items()}


def write_full(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The control together with the Stable Diffusion of its file.

    Raises:
        UserError: the file had none.
    """
    if not any(name.startswith(UNET_PREFIX) for name in checkpoint.leftover):
        raise UserError(
            "only a control read from a checkpoint in the format full can be written as full: this one comes"
            " without its Stable Diffusion; use --to original",
            "unsupported",
        )
    return {**checkpoint.leftover, **to_original(checkpoint, PREFIX)}
