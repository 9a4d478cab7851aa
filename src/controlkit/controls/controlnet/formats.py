"""The formats of a ControlNet's files."""

from __future__ import annotations

from controlkit.controls.control import Control
from controlkit.controls.controlnet import control_lora, difference
from controlkit.controls.encoder_copy.original import (
    BARE_SAYS,
    FULL_SAYS,
    ORIGINAL_SAYS,
    PREFIX,
    UNET_PREFIX,
    Names,
    Parted,
    from_original,
    read_original,
    to_original,
    write_full,
)
from controlkit.controls.file_format import Checkpoint, FileFormat, Reference, TensorFile, Written


def _detect_original(file: TensorFile) -> str | None:
    names = Names.of(file.tensors)
    found = _is_controlnet(file, names) and bool(names.prefix) and not names.whole
    return "a ControlNet under the names of the original code" if found else None


def _detect_bare(file: TensorFile) -> str | None:
    names = Names.of(file.tensors)
    found = _is_controlnet(file, names) and not names.prefix
    return "a ControlNet under the names of the original code" if found else None


def _detect_full(file: TensorFile) -> str | None:
    names = Names.of(file.tensors)
    found = _is_controlnet(file, names) and names.whole
    return "a ControlNet together with the whole Stable Diffusion that it was trained in" if found else None


def _detect_difference(file: TensorFile) -> str | None:
    found = Names.of(file.tensors).hint and difference.MARK in file.tensors
    return "a ControlNet as its difference from the base's UNet" if found else None


def _detect_control_lora(file: TensorFile) -> str | None:
    found = control_lora.MARK in file.tensors
    return "a Control-LoRA: a ControlNet as low-rank changes of the base's UNet" if found else None


def _is_controlnet(file: TensorFile, names: Names) -> bool:
    marked = difference.MARK in file.tensors or control_lora.MARK in file.tensors
    return names.hint and names.resnets and not marked


def _read(kind: type[Control], file: TensorFile, reference: Reference, says: str) -> Checkpoint:
    return read_original(kind, file, reference)


def _read_full(kind: type[Control], file: TensorFile, reference: Reference, says: str) -> Checkpoint:
    parted = Parted.of(file)
    checkpoint = from_original(kind, file, kind.title, parted.inside, reference, others=parted.unknown, prefix=PREFIX)
    checkpoint.leftover = parted.aside
    decoder = sum(name.startswith(f"{UNET_PREFIX}output_blocks.") for name in parted.aside)
    note = parted.note()
    if decoder:
        note += (
            f", so its decoder ({decoder} tensors), which ControlNet 1.0 trained along with the control, is dropped,"
            " and images differ a little from the original code's"
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
    FileFormat(name="original", says=ORIGINAL_SAYS, detect=_detect_original, read=_read, write=_write),
    FileFormat(name="bare", says=BARE_SAYS, detect=_detect_bare, read=_read, write=_write_bare),
    FileFormat(name="full", says=FULL_SAYS, detect=_detect_full, read=_read_full, write=_write_full),
    FileFormat(
        name="difference",
        says="a ControlNet as its difference from the base's UNet",
        detect=_detect_difference,
        read=difference.read,
        write=difference.write,
        needs_base=True,
    ),
    FileFormat(
        name="control-lora",
        says="Stability AI's Control-LoRA: low-rank changes of the base's UNet",
        detect=_detect_control_lora,
        read=control_lora.read,
        write=control_lora.write,
        needs_base=True,
    ),
)
