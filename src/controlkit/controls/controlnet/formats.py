"""File formats of ControlNets."""

from __future__ import annotations

from controlkit.controls.control import Control
from controlkit.controls.controlnet import control_lora, difference
from controlkit.controls.encoder_copy.original import (
    BARE_DESCRIPTION,
    FULL_DESCRIPTION,
    ORIGINAL_DESCRIPTION,
    PREFIX,
    UNET_PREFIX,
    FullCheckpoint,
    Names,
    from_original,
    read_original,
    to_original,
    write_full,
)
from controlkit.controls.file_format import Checkpoint, FileFormat, Reference, TensorFile, Written


def _detect_original(file: TensorFile) -> str | None:
    names = Names.of(file.tensors)
    matches = _is_controlnet(file, names) and bool(names.prefix) and not names.has_stable_diffusion
    return "a ControlNet under the names of the original code" if matches else None


def _detect_bare(file: TensorFile) -> str | None:
    names = Names.of(file.tensors)
    matches = _is_controlnet(file, names) and not names.prefix
    return "a ControlNet under the names of the original code" if matches else None


def _detect_full(file: TensorFile) -> str | None:
    names = Names.of(file.tensors)
    matches = _is_controlnet(file, names) and names.has_stable_diffusion
    return "a ControlNet inside the Stable Diffusion checkpoint that it was trained in" if matches else None


def _detect_difference(file: TensorFile) -> str | None:
    matches = Names.of(file.tensors).has_hint_network and difference.MARK in file.tensors
    return "a ControlNet as its difference from the base's UNet" if matches else None


def _detect_control_lora(file: TensorFile) -> str | None:
    matches = control_lora.MARK in file.tensors
    return "a Control-LoRA: a ControlNet as low-rank changes of the base's UNet" if matches else None


def _is_controlnet(file: TensorFile, names: Names) -> bool:
    marked = difference.MARK in file.tensors or control_lora.MARK in file.tensors
    return names.has_hint_network and names.has_resnets and not marked


def _read(kind: type[Control], file: TensorFile, reference: Reference, description: str) -> Checkpoint:
    return read_original(kind, file, reference)


def _read_full(kind: type[Control], file: TensorFile, reference: Reference, description: str) -> Checkpoint:
    full = FullCheckpoint.of(file)
    checkpoint = from_original(kind, file, kind.title, full.inside, reference, others=full.unknown, prefix=PREFIX)
    checkpoint.leftover = full.stable_diffusion
    decoder = sum(name.startswith(f"{UNET_PREFIX}output_blocks.") for name in full.stable_diffusion)
    note = full.note()
    if decoder:
        note += (
            f"; its decoder ({decoder} tensors), which ControlNet 1.0 trained along with the control, is dropped, so"
            " images differ slightly from the original code's"
        )
    checkpoint.notes.append(note)
    return checkpoint


def _write(checkpoint: Checkpoint, reference: Reference) -> Written:
    return Written(tensors=to_original(checkpoint, PREFIX))


def _write_bare(checkpoint: Checkpoint, reference: Reference) -> Written:
    return Written(tensors=to_original(checkpoint))


def _write_full(checkpoint: Checkpoint, reference: Reference) -> Written:
    tensors = write_full(checkpoint)
    checkpoint.notes = [note for note in checkpoint.notes if "decoder" not in note]
    return Written(tensors=tensors)


FORMATS = (
    FileFormat(name="original", description=ORIGINAL_DESCRIPTION, detect=_detect_original, read=_read, write=_write),
    FileFormat(name="bare", description=BARE_DESCRIPTION, detect=_detect_bare, read=_read, write=_write_bare),
    FileFormat(name="full", description=FULL_DESCRIPTION, detect=_detect_full, read=_read_full, write=_write_full),
    FileFormat(
        name="difference",
        description="a ControlNet as its difference from the base's UNet",
        detect=_detect_difference,
        read=difference.read,
        write=difference.write,
        needs_base=True,
    ),
    FileFormat(
        name="control-lora",
        description="Stability AI's Control-LoRA: low-rank changes of the base's UNet",
        detect=_detect_control_lora,
        read=control_lora.read,
        write=control_lora.write,
        needs_base=True,
    ),
)
