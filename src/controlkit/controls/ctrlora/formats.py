"""The formats of CtrLoRA's files: the reference's pair (xyfJASON/ctrlora), PEFT's folder, and an adapter merged in.

The reference keeps two files under one prefix: the base control, and an adapter (LoRA of every linear layer, zero
convolutions, transformer norms; scripts/tool_extract_weights.py:22-32). Training checkpoints, and those of
scripts/tool_combine_weights.py, hold both and a whole Stable Diffusion.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from controlkit.controls.control import Control
from controlkit.controls.ctrlora import merged, peft_folder
from controlkit.controls.encoder_copy.original import (
    BARE_SAYS,
    FULL_SAYS,
    ORIGINAL_SAYS,
    PREFIX,
    Names,
    Parted,
    from_original,
    read_original,
    to_original,
)
from controlkit.controls.file_format import Checkpoint, FileFormat, Reference, TensorFile, Written, some
from controlkit.errors import UserError

LEFTOVERS = (
    # A base control is saved with the LoRA of whichever condition was trained last; nobody applies it.
    re.compile(r".*\.lora_layer\.(down|up)\.weight$"),
    # The LoRA of every base condition, in a raw checkpoint of base training.
    re.compile(r"loras_dict\."),
)
"""Tensors in the file of a base control that are no part of it."""


def rank_in(tensors: Mapping[str, Tensor]) -> int:
    """The rank of an adapter's LoRA; 1 if there is none, which its names then tell."""
    ranks = (value.shape[0] for name, value in tensors.items() if name.endswith(".lora_layer.down.weight"))
    return next(ranks, 1)


def empty_lora(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """LoRA of rank 1 that changes nothing, for every linear layer among `tensors`.

    A base control of the reference comes with one; ComfyUI-Advanced-ControlNet (adv_control/control_ctrlora.py)
    looks for it before it reads anything, and no tool applies it.
    """
    made: dict[str, Tensor] = {}
    for name, weight in tensors.items():
        if name.endswith(".weight") and weight.ndim == 2:
            layer = name.removesuffix(".weight")
            made[f"{layer}.lora_layer.down.weight"] = torch.zeros(1, weight.shape[1], dtype=weight.dtype)
            made[f"{layer}.lora_layer.up.weight"] = torch.zeros(weight.shape[0], 1, dtype=weight.dtype)
    return made


def _is_base(names: Names) -> bool:
    combined = names.lora and names.whole
    return names.is_copy and not names.hint and names.encoder and not combined


def _is_adapter(names: Names) -> bool:
    return names.is_copy and not names.hint and not names.encoder and names.lora


def _detect_base(file: TensorFile) -> str | None:
    names = Names.of(file.tensors)
    return "a base control of CtrLoRA under the names of the original code" if _is_base(names) else None


def _detect_adapter(file: TensorFile) -> str | None:
    names = Names.of(file.tensors)
    return "an adapter of CtrLoRA under the names of the original code" if _is_adapter(names) else None


def _detect_combined(file: TensorFile) -> str | None:
    names = Names.of(file.tensors)
    found = names.is_copy and not names.hint and names.encoder and names.lora and names.whole
    return "an adapter of CtrLoRA, its base control and a whole Stable Diffusion, in one file" if found else None


def _read_base(kind: type[Control], file: TensorFile, reference: Reference, says: str) -> Checkpoint:
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
            f"the file also holds {len(leftover)} LoRA tensors that base training left in it; they are no part of"
            " the base control"
        )
    return checkpoint


def _write_base(checkpoint: Checkpoint, prefix: str) -> Written:
    tensors = to_original(checkpoint, prefix)
    kept = {f"{prefix}{name.removeprefix(PREFIX)}": value for name, value in checkpoint.leftover.items()}
    if kept:
        return Written(tensors={**tensors, **kept})
    added = empty_lora(tensors)
    note = (
        f"{len(added)} empty LoRA tensors of rank 1 were added: ComfyUI-Advanced-ControlNet takes no base control"
        " without some"
    )
    return Written(tensors={**tensors, **added}, notes=(note,))


def _read_adapter(kind: type[Control], file: TensorFile, reference: Reference, says: str) -> Checkpoint:
    return read_original(kind, file, reference)


def _read_combined(kind: type[Control], file: TensorFile, reference: Reference, says: str) -> Checkpoint:
    """An adapter and its base control from one checkpoint: both have the adapter's zero convolutions and norms."""
    from controlkit.controls.ctrlora.base_controlnet import BaseControlNet

    parted = Parted.of(file)
    if tables := {name for name in parted.inside if name.startswith("loras_dict.")}:
        raise UserError(
            f"{file.path} is a raw checkpoint of CtrLoRA's base training, with the LoRA of every base condition"
            f" ({some(tables, 1)}); extract base control and adapters from it with the reference's"
            " scripts/tool_extract_weights.py, which knows which is which"
        )
    network = {name: value for name, value in parted.inside.items() if ".lora_layer." not in name}
    own = {
        name: value
        for name, value in parted.inside.items()
        if ".lora_layer." in name
        or name.startswith(("zero_convs.", "middle_block_out."))
        or re.search(r"\.1\.(norm|transformer_blocks\.\d+\.norm\d)\.(weight|bias)$", name)
    }
    base = BaseControlNet
    companion = from_original(base, file, base.title, network, reference, others=parted.unknown, prefix=PREFIX)
    checkpoint = from_original(kind, file, kind.title, own, reference, prefix=PREFIX)
    checkpoint.companion = companion
    checkpoint.leftover = parted.aside
    checkpoint.notes.append(parted.note())
    return checkpoint


BASE_FORMATS = (
    FileFormat(
        name="original",
        says=ORIGINAL_SAYS,
        detect=lambda file: _detect_base(file) if Names.of(file.tensors).prefix else None,
        read=_read_base,
        write=lambda checkpoint, reference: _write_base(checkpoint, PREFIX),
    ),
    FileFormat(
        name="bare",
        says=BARE_SAYS,
        detect=lambda file: None if Names.of(file.tensors).prefix else _detect_base(file),
        read=_read_base,
        write=lambda checkpoint, reference: _write_base(checkpoint, ""),
    ),
)
ADAPTER_FORMATS = (
    FileFormat(
        name="original",
        says=ORIGINAL_SAYS,
        detect=lambda file: _detect_adapter(file) if Names.of(file.tensors).prefix else None,
        read=_read_adapter,
        write=lambda checkpoint, reference: Written(tensors=to_original(checkpoint, PREFIX)),
    ),
    FileFormat(
        name="bare",
        says=BARE_SAYS,
        detect=lambda file: None if Names.of(file.tensors).prefix else _detect_adapter(file),
        read=_read_adapter,
        write=lambda checkpoint, reference: Written(tensors=to_original(checkpoint)),
    ),
    FileFormat(name="full", says=FULL_SAYS, detect=_detect_combined, read=_read_combined),
    FileFormat(
        name="peft",
        says="PEFT's folder of an adapter",
        detect=peft_folder.detect,
        read=peft_folder.read,
        write=peft_folder.write,
        files=(peft_folder.CONFIG, peft_folder.WEIGHTS),
    ),
    FileFormat(
        name="merged",
        says="an adapter baked into its base control, in one file of layout controlkit",
        write=merged.write,
        needs_companion=True,
    ),
)
