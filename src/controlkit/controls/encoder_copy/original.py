"""Files under the names of the original code: `control_model.*`, bare, or inside of a whole Stable Diffusion.

A ControlNet 1.1 file holds `control_model.*` alone; many tools drop the prefix (`bare`). ControlNet 1.0's files, and
training checkpoints, hold a whole Stable Diffusion beside it (`full`), whose decoder was trained along with the control
(lllyasviel/ControlNet #13; #625 shows that its weights differ from Stable Diffusion 1.5's). Nobody but the original
code uses that decoder: all converters, this one too, take the control alone, and say so.

Read as .pth, .ckpt or safetensors, written as safetensors: pickles are never written.
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
    announced_config,
    check_names,
    on_one_line,
)
from controlkit.errors import UserError

PREFIX = "control_model."
"""Of a control's tensors in the files of lllyasviel/ControlNet and of xyfJASON/ctrlora."""
UNET_PREFIX = "model.diffusion_model."
"""Of the UNet's tensors in a whole Stable Diffusion checkpoint."""

ORIGINAL_SAYS = "the original code's names (control_model.*), as in ControlNet 1.1 and CtrLoRA's pair of files"
BARE_SAYS = "the original code's names without the prefix control_model"
FULL_SAYS = "a control with the whole Stable Diffusion around it, as in ControlNet 1.0 and training checkpoints"

_STABLE_DIFFUSION = re.compile(
    # The networks, and their moving average.
    r"(model|first_stage_model|cond_stage_model|conditioner|model_ema)\."
    # The noise schedule, which the original code keeps as buffers.
    r"|(betas|logvar|lvlb_weights|scale_factor|posterior_\w+|(\w+_)?alphas_cumprod(_prev)?)$"
)
"""Names in a whole Stable Diffusion checkpoint that are not the control's."""


@dataclass(frozen=True)
class Names:
    """What the names of a file in the original's names tell."""

    prefix: str
    inside: frozenset[str]
    """Those of the control, without the prefix."""
    whole: bool
    """Whether a Stable Diffusion's UNet is beside them."""

    @classmethod
    def of(cls, names: Collection[str]) -> Names:
        """From all names of a file."""
        prefix = PREFIX if any(name.startswith(PREFIX) for name in names) else ""
        inside = frozenset(name.removeprefix(prefix) for name in names if name.startswith(prefix))
        return cls(prefix, inside, any(name.startswith(UNET_PREFIX) for name in names))

    @property
    def zero_convolutions(self) -> bool:
        """Whether it has a copy's zero convolutions."""
        return "zero_convs.0.0.weight" in self.inside

    @property
    def encoder(self) -> bool:
        """Whether it has a copy's encoder; one of several names does, as a file may have lost a tensor."""
        return any(name in self.inside for name in ("input_blocks.0.0.weight", "input_blocks.1.0.in_layers.2.weight"))

    @property
    def resnets(self) -> bool:
        """Whether its blocks are ResNet blocks that are told the time, as a UNet's are; networks of another structure
        share all other names."""
        return any(".in_layers." in name or ".emb_layers." in name for name in self.inside)

    @property
    def hint(self) -> bool:
        """Whether it has a hint network."""
        return any(name.startswith("input_hint_block.") for name in self.inside)

    @property
    def lora(self) -> bool:
        """Whether it has LoRA."""
        return any(".lora_layer." in name for name in self.inside)

    @property
    def is_copy(self) -> bool:
        """Whether these are names of a copy of an encoder, or of an adapter of one."""
        return self.zero_convolutions or self.hint or bool(self.prefix and (self.encoder or self.lora))


@dataclass(frozen=True)
class Parted:
    """The tensors of a whole Stable Diffusion checkpoint with a control in it."""

    inside: dict[str, Tensor]
    """The control's, without the prefix."""
    aside: dict[str, Tensor]
    """Stable Diffusion's."""
    unknown: tuple[str, ...]
    """Names of neither."""

    @classmethod
    def of(cls, file: TensorFile) -> Parted:
        """From a file."""
        inside: dict[str, Tensor] = {}
        aside: dict[str, Tensor] = {}
        unknown: list[str] = list(file.others)
        for name, value in file.tensors.items():
            if name.startswith(PREFIX):
                inside[name.removeprefix(PREFIX)] = value
            elif _STABLE_DIFFUSION.match(name):
                aside[name] = value
            else:
                unknown.append(name)
        return cls(inside, aside, tuple(unknown))

    def note(self) -> str:
        """What is said of the rest."""
        return (
            f"the file also carries a whole Stable Diffusion ({len(self.aside)} tensors); only the control is taken"
            " from it"
        )


def read_original(kind: type[Control], file: TensorFile, reference: Reference) -> Checkpoint:
    """A file that holds one control, with the prefix or without."""
    prefix = Names.of(file.tensors).prefix
    inside = {name.removeprefix(prefix): value for name, value in file.tensors.items() if name.startswith(prefix)}
    outside = [name for name in file.tensors if not name.startswith(prefix)]
    return from_original(kind, file, kind.title, inside, reference, others=(*file.others, *outside), prefix=prefix)


def from_original(
    kind: type[Control],
    file: TensorFile,
    says: str,
    tensors: Mapping[str, Tensor],
    reference: Reference,
    *,
    others: tuple[str, ...] = (),
    prefix: str = "",
) -> Checkpoint:
    """The checkpoint of tensors under the original's names, each of them accounted for.

    Args:
        says: what the file was taken for.
        prefix: that names have in the file, for messages.

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
        under_mine = {new: tensors[name] for name, new in renamed.items()}
        config = announced_config(file.metadata) or kind.config_of(under_mine, reference.unet_config)
        expected = kind.shapes(config)
        wanted = Structure.of_diffusers(expected).to_original()
    except CONFIG_ERRORS as error:
        raise UserError(f"{path} looks like {says}, but {on_one_line(error)}") from error
    in_file = {f"{prefix}{wanted(name) or name}": shape for name, shape in expected.items()}
    check_names(path, says, in_file, {f"{prefix}{name}": value for name, value in tensors.items()}, others)
    # In the order of the network, which is the order of its fingerprint.
    ordered = {name: under_mine[name] for name in expected}
    return Checkpoint(kind.kind, config, ordered, dict(file.metadata), path=path)


def to_original(checkpoint: Checkpoint, prefix: str = "") -> dict[str, Tensor]:
    """Its tensors under the original's names.

    Raises:
        UserError: a tensor has no name there.
    """
    rename = Structure.of_diffusers(checkpoint.tensors).to_original()
    renamed = {name: rename(name) for name in checkpoint.tensors}
    if lost := [name for name, new in renamed.items() if new is None]:
        raise UserError(f"the original code has no name for {len(lost)} tensors of this control, such as {lost[0]}")
    return {f"{prefix}{renamed[name]}": value for name, value in checkpoint.tensors.items()}


def write_full(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The control and the Stable Diffusion that came with it.

    Raises:
        UserError: none did.
    """
    if not any(name.startswith(UNET_PREFIX) for name in checkpoint.leftover):
        raise UserError(
            "only a file of layout full can be written as full: the control that was given comes without the"
            " Stable Diffusion that belongs to it; --to original writes the control alone"
        )
    return {**checkpoint.leftover, **to_original(checkpoint, PREFIX)}
