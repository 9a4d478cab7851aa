"""The files of the original code: lllyasviel/ControlNet, xyfJASON/ctrlora, TencentARC/T2I-Adapter.

A ControlNet 1.1 file holds `control_model.*` alone; many tools drop the prefix (`bare`). CtrLoRA has two files
under the same prefix: the base control, and an adapter (LoRA of every linear layer, zero convolutions, transformer
norms; scripts/tool_extract_weights.py:22-32). A T2I-Adapter's file has no prefix at all.

Read as .pth, .ckpt or safetensors, written as safetensors: pickles are never written.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from controlkit.checkpoints.content import CONTROLNET, CTRLORA, CTRLORA_BASE, KINDS, T2I_ADAPTER, Content, Options
from controlkit.checkpoints.files import write_tensors
from controlkit.checkpoints.layouts import t2i
from controlkit.checkpoints.layouts.layout import Layout
from controlkit.checkpoints.layouts.ldm import from_original, to_original
from controlkit.checkpoints.recognise import CONTROL_PREFIX, Found

LEFTOVERS = (
    # A base control is saved with the LoRA of whichever condition was trained last; nobody applies it.
    re.compile(r".*\.lora_layer\.(down|up)\.weight$"),
    # The LoRA of every base condition, in a raw checkpoint of base training.
    re.compile(r"loras_dict\."),
)
"""Tensors in the file of a base control that are no part of it."""


def read(found: Found, options: Options) -> Content:
    """A file under the original's names, with or without the prefix."""
    kind, file = found.kind or "", found.file
    if kind == T2I_ADAPTER:
        return t2i.from_original(found, options)
    prefix = CONTROL_PREFIX if any(name.startswith(CONTROL_PREFIX) for name in file.tensors) else ""
    inside: dict[str, Tensor] = {}
    leftover: dict[str, Tensor] = {}
    outside: list[str] = list(file.others)
    for name, value in file.tensors.items():
        bare = name.removeprefix(prefix)
        if not name.startswith(prefix):
            outside.append(name)
        elif kind == CTRLORA_BASE and any(pattern.match(bare) for pattern in LEFTOVERS):
            leftover[name] = value
        else:
            inside[bare] = value
    content = from_original(
        found.path, kind, KINDS[kind], inside, file.metadata, options, others=tuple(outside), prefix=prefix
    )
    content.leftover = leftover
    if leftover:
        content.notes.append(
            f"the file also holds {len(leftover)} LoRA tensors that base training left in it; they are no part of"
            " the base control"
        )
    return content


def write(content: Content, path: Path, options: Options) -> list[str]:
    """One safetensors file under the original's names."""
    return _write(content, path, CONTROL_PREFIX)


def write_bare(content: Content, path: Path, options: Options) -> list[str]:
    """The same without the prefix."""
    return _write(content, path, "")


def _write(content: Content, path: Path, prefix: str) -> list[str]:
    if content.kind == T2I_ADAPTER:
        tensors = t2i.to_original(content)
    else:
        tensors = {f"{prefix}{name}": value for name, value in to_original(content).items()}
    notes = []
    if content.kind == CTRLORA_BASE:
        kept = {f"{prefix}{name.removeprefix(CONTROL_PREFIX)}": value for name, value in content.leftover.items()}
        if not kept:
            kept = empty_lora(tensors)
            notes.append(
                f"{len(kept)} empty LoRA tensors of rank 1 were added: ComfyUI-Advanced-ControlNet takes no base"
                " control without some"
            )
        tensors |= kept
    write_tensors(path, tensors, content.file_metadata(path), None)
    return notes


def empty_lora(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
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


LAYOUT = Layout(
    name="original",
    says="the original code's names (control_model.*), as in ControlNet 1.1 and CtrLoRA's pair of files",
    reads=read,
    writes=write,
    kinds=(CONTROLNET, CTRLORA_BASE, CTRLORA, T2I_ADAPTER),
)
BARE = Layout(
    name="bare",
    says="the original code's names without the prefix control_model",
    reads=read,
    writes=write_bare,
    kinds=(CONTROLNET, CTRLORA_BASE, CTRLORA),
)
