"""File formats of CtrLoRA: the reference's pair (xyfJASON/ctrlora), PEFT's folder, and merged adapters.

The reference has two files with one prefix: the base control, and an adapter (LoRA of every linear layer, zero
convolutions, transformer norms; scripts/tool_extract_weights.py:22-32). Training checkpoints, and those of
scripts/tool_combine_weights.py, contain both and Stable Diffusion.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from controlkit.controls.control import Control
from controlkit.controls.ctrlora import merged, peft_folder
from controlkit.controls.encoder_copy.original import (
    BARE_DESCRIPTION,
    FULL_DESCRIPTION,
    ORIGINAL_DESCRIPTION,
    PREFIX,
    FullCheckpoint,
    Names,
    from_original,
    full_note,
    read_original,
    to_original,
)
from controlkit.controls.file_format import Checkpoint, FileFormat, Reference, TensorFile, Written, listed
from controlkit.errors import UserError

LEFTOVERS = (
    # A base control is saved with the LoRA of the condition trained last, which no tool applies.
    re.compile(r".*\.lora_layer\.(down|up)\.weight$"),
    # The LoRA of every base condition, in a raw checkpoint of base training.
    re.compile(r"loras_dict\."),
)
"""Tensors in the file of a base control that do not belong to it."""


def rank_in(tensors: Mapping[str, Tensor]) -> int:
    """The rank of an adapter's LoRA; 1 without LoRA, which the check of names then reports."""
    ranks = (value.shape[0] for name, value in tensors.items() if name.endswith(".lora_layer.down.weight"))
    return next(ranks, 1)


def empty_lora(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """LoRA of rank 1 with no effect, for every linear layer among `tensors`.

    The reference's base controls come with one; ComfyUI-Advanced-ControlNet (adv_control/control_ctrlora.py) requires
    its presence, and no tool applies it.
    """
    lora: dict[str, Tensor] = {}
    for name, weight in tensors.items():
        if name.endswith(".weight") and weight.ndim == 2:
            layer = name.removesuffix(".weight")
            lora[f"{layer}.lora_layer.down.weight"] = torch.zeros(1, weight.shape[1], dtype=weight.dtype)
            lora[f"{layer}.lora_layer.up.weight"] = torch.zeros(weight.shape[0], 1, dtype=weight.dtype)
    return lora


def _is_base(names: Names) -> bool:
    combined = names.has_lora and names.has_stable_diffusion
    return names.is_copy and not names.has_hint_network and names.has_encoder and not combined


def _is_adapter(names: Names) -> bool:
    return names.is_copy and not names.has_hint_network and not names.has_encoder and names.has_lora


def _detect_base(file: TensorFile) -> str | None:
    names = Names.of(file.tensors)
    return "a base control of CtrLoRA under the names of the original code" if _is_base(names) else None


def _detect_adapter(file: TensorFile) -> str | None:
    names = Names.of(file.tensors)
    return "an adapter of CtrLoRA under the names of the original code" if _is_adapter(names) else None


def _detect_combined(file: TensorFile) -> str | None:
    names = Names.of(file.tensors)
    matches = (
        names.is_copy
        and not names.has_hint_network
        and names.has_encoder
        and names.has_lora
        and names.has_stable_diffusion
    )
    return "an adapter of CtrLoRA, its base control and Stable Diffusion, in one file" if matches else None


def _read_base(kind: type[Control], file: TensorFile, reference: Reference, description: str) -> Checkpoint:
    prefix = Names.of(file.tensors).prefix
    inside: dict[str, Tensor] = {}
    leftover: dict[str, Tensor] = {}
    outside: list[str] = list(file.others)
    for name, value in file.tensors.items():
        bare = name.removeprefix(prefix)
        if not name.startswith(prefix):
            outside.append(name)
        elif any(pattern.match(bare) for pattern in LEFTOVERS):
            leftover[name] = value
        else:
            inside[bare] = value
    checkpoint = from_original(kind, file, kind.title, inside, reference, others=tuple(outside), prefix=prefix)
    checkpoint.leftover = leftover
    if leftover:
        checkpoint.notes.append(
            f"the file also contains {len(leftover)} LoRA tensors left over from base training; they do not belong to"
            " the base control"
        )
    return checkpoint


def _write_base(checkpoint: Checkpoint, prefix: str) -> Written:
    tensors = to_original(checkpoint, prefix)
    leftover = {f"{prefix}{name.removeprefix(PREFIX)}": value for name, value in checkpoint.leftover.items()}
    if leftover:
        return Written(tensors={**tensors, **leftover})
    empty = empty_lora(tensors)
    note = (
        f"{len(empty)} empty LoRA tensors of rank 1 were added: ComfyUI-Advanced-ControlNet rejects base controls"
        " without any"
    )
    return Written(tensors={**tensors, **empty}, notes=(note,))


def _read_adapter(kind: type[Control], file: TensorFile, reference: Reference, description: str) -> Checkpoint:
    return read_original(kind, file, reference)


def _read_combined(kind: type[Control], file: TensorFile, reference: Reference, description: str) -> Checkpoint:
    """An adapter and its base control from one checkpoint; both have the adapter's zero convolutions and norms."""
    from controlkit.controls.ctrlora.base_controlnet import BaseControlNet

    full = FullCheckpoint.of(file)
    if tables := {name for name in full.inside if name.startswith("loras_dict.")}:
        raise UserError(
            f"{file.path} is a raw checkpoint of CtrLoRA's base training with the LoRA of every base"
            f" condition ({listed(tables, 1)}); extract the base control and the adapters with the reference's"
            " scripts/tool_extract_weights.py",
            "unsupported",
        )
    network = {name: value for name, value in full.inside.items() if ".lora_layer." not in name}
    adapter = {
        name: value
        for name, value in full.inside.items()
        if ".lora_layer." in name
        or name.startswith(("zero_convs.", "middle_block_out."))
        or re.search(r"\.1\.(norm|transformer_blocks\.\d+\.norm\d)\.(weight|bias)$", name)
    }
    base_class = BaseControlNet
    companion = from_original(
        base_class, file, base_class.title, network, reference, others=full.unknown, prefix=PREFIX
    )
    checkpoint = from_original(kind, file, kind.title, adapter, reference, prefix=PREFIX)
    checkpoint.companion = companion
    checkpoint.leftover = full.stable_diffusion
    checkpoint.notes.append(full_note(full.stable_diffusion))
    return checkpoint


BASE_FORMATS = (
    FileFormat(
        name="original",
        description=ORIGINAL_DESCRIPTION,
        detect=lambda file: _detect_base(file) if Names.of(file.tensors).prefix else None,
        read=_read_base,
        write=lambda checkpoint, reference: _write_base(checkpoint, PREFIX),
    ),
    FileFormat(
        name="bare",
        description=BARE_DESCRIPTION,
        detect=lambda file: None if Names.of(file.tensors).prefix else _detect_base(file),
        read=_read_base,
        write=lambda checkpoint, reference: _write_base(checkpoint, ""),
    ),
)
ADAPTER_FORMATS = (
    FileFormat(
        name="original",
        description=ORIGINAL_DESCRIPTION,
        detect=lambda file: _detect_adapter(file) if Names.of(file.tensors).prefix else None,
        read=_read_adapter,
        write=lambda checkpoint, reference: Written(tensors=to_original(checkpoint, PREFIX)),
    ),
    FileFormat(
        name="bare",
        description=BARE_DESCRIPTION,
        detect=lambda file: None if Names.of(file.tensors).prefix else _detect_adapter(file),
        read=_read_adapter,
        write=lambda checkpoint, reference: Written(tensors=to_original(checkpoint)),
    ),
    FileFormat(name="full", description=FULL_DESCRIPTION, detect=_detect_combined, read=_read_combined),
    FileFormat(
        name="peft",
        description="PEFT's folder of an adapter",
        detect=peft_folder.detect,
        read=peft_folder.read,
        write=peft_folder.write,
        files=(peft_folder.CONFIG, peft_folder.WEIGHTS),
    ),
    FileFormat(
        name="merged",
        description="an adapter merged into its base control, in one file of the format controlkit",
        write=merged.write,
        needs_companion=True,
    ),
)
