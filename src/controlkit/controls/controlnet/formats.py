"""File formats of ControlNets."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from controlkit.controls.control import Control
from controlkit.controls.controlnet import control_lora, difference
from controlkit.controls.controlnet.decoder import PREFIX as DECODER_PREFIX
from controlkit.controls.controlnet.decoder import decoder_shapes, is_original_name, original_names, split
from controlkit.controls.encoder_copy.original import (
    BARE_DESCRIPTION,
    FULL_DESCRIPTION,
    ORIGINAL_DESCRIPTION,
    PREFIX,
    UNET_PREFIX,
    FullCheckpoint,
    Names,
    from_original,
    full_note,
    read_original,
    to_original,
    write_full,
)
from controlkit.controls.file_format import (
    Checkpoint,
    FileFormat,
    Reference,
    TensorFile,
    Written,
    check_names,
    declared_config,
)
from controlkit.errors import UserError

DECODER_TITLE = "a decoder that was trained with it (sd_locked false)"
"""What a control may contain besides itself, for errors."""
_LOCKED = "sd_locked"


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
    config = declared_config(file.metadata) or {}
    if config.pop(_LOCKED, True) is False:  # the tensors of the control are read first, by themselves
        file = replace(file, metadata={**file.metadata, "control.config": json.dumps(config)})
    checkpoint = from_original(kind, file, kind.title, full.inside, reference, others=full.unknown, prefix=PREFIX)
    checkpoint.leftover = full.stable_diffusion
    if all(is_original_name(name.removeprefix(UNET_PREFIX)) for name in full.stable_diffusion):
        take_decoder(checkpoint)  # as `_write_full` writes a control that was not read from a full checkpoint
    else:
        checkpoint.notes.append(_leftover_note(checkpoint))
    return checkpoint


def _leftover_note(checkpoint: Checkpoint) -> str:
    """A note on the Stable Diffusion in a checkpoint's file, which other formats drop."""
    count = len(checkpoint.leftover)
    if not checkpoint.config.get(_LOCKED, True):
        return f"the file also contains the rest of Stable Diffusion ({count} tensors), which is dropped"
    decoder = sum(name.startswith(f"{UNET_PREFIX}output_blocks.") for name in checkpoint.leftover)
    if not decoder:
        return full_note(checkpoint.leftover)
    return (
        f"{full_note(checkpoint.leftover)}; its decoder ({decoder} tensors), which ControlNet 1.0 trained along with"
        " the control, is dropped, so images differ slightly from the original code's (`convert --decoder` keeps it)"
    )


def take_decoder(checkpoint: Checkpoint) -> None:
    """Make the decoder of the Stable Diffusion in a checkpoint's file part of the control, unless it is already.

    Raises:
        UserError: the file has no Stable Diffusion, or not the decoder of the UNet that the control copies.
    """
    if not checkpoint.config.get(_LOCKED, True):
        return
    name, prefix, note = checkpoint.path, UNET_PREFIX, _leftover_note(checkpoint)
    inside = {key.removeprefix(prefix) for key in checkpoint.leftover if key.startswith(prefix)}
    in_file = {key for key in inside if is_original_name(key)}
    if not in_file:
        raise UserError(f"{name} contains no decoder of Stable Diffusion, so none can be kept", "wrong-kind")
    shapes = decoder_shapes(checkpoint.config)
    names = original_names(shapes)
    expected = {f"{prefix}{names[own]}": shape for own, shape in shapes.items()}
    tensors = {f"{prefix}{key}": checkpoint.leftover[f"{prefix}{key}"] for key in in_file}
    check_names(name or Path(), f"a ControlNet with {DECODER_TITLE}", expected, tensors)
    for own in shapes:
        checkpoint.tensors[f"{DECODER_PREFIX}{own}"] = checkpoint.leftover.pop(f"{prefix}{names[own]}")
    checkpoint.config = {**checkpoint.config, _LOCKED: False}
    checkpoint.notes = [_leftover_note(checkpoint) if each == note else each for each in checkpoint.notes]


def _alone(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint whose format has no place for a decoder.

    Raises:
        UserError: it has one.
    """
    if any(name.startswith(DECODER_PREFIX) for name in checkpoint.tensors):
        raise UserError(
            f"{checkpoint.path} contains {DECODER_TITLE}, for which this format has no place; write it as controlkit"
            " or full",
            "unsupported",
        )
    return checkpoint


_UNRECORDED = {
    "global_pool_conditions": (True, "averages its residuals over the image (global_average_pooling)"),
    "only_mid_control": (True, "adds to the middle block only (only_mid_control)"),
    "controlnet_conditioning_channel_order": ("bgr", "takes condition images in the order BGR"),
}
"""Setting -> a value that the original code's files cannot record, and in words."""


def _setting_notes(checkpoint: Checkpoint) -> list[str]:
    """Notes on settings that other tools do not find in a file of the original code's names."""
    return [
        f"it {words}, which no tensor shows; only controlkit reads that from the metadata, so set it in other tools"
        for name, (value, words) in _UNRECORDED.items()
        if checkpoint.config.get(name) == value
    ]


def _write(checkpoint: Checkpoint, reference: Reference) -> Written:
    return Written(tensors=to_original(_alone(checkpoint), PREFIX), notes=_setting_notes(checkpoint))


def _write_bare(checkpoint: Checkpoint, reference: Reference) -> Written:
    return Written(tensors=to_original(_alone(checkpoint)), notes=_setting_notes(checkpoint))


def _write_full(checkpoint: Checkpoint, reference: Reference) -> Written:
    own, decoder = split(checkpoint.tensors)
    checkpoint.notes = [note for note in checkpoint.notes if note != _leftover_note(checkpoint)]
    if not decoder:
        return Written(tensors=write_full(checkpoint), notes=_setting_notes(checkpoint))
    names = original_names(decoder)
    control = to_original(replace(checkpoint, tensors=own), PREFIX)
    renamed = {f"{UNET_PREFIX}{names[name]}": value for name, value in decoder.items()}
    notes = (
        ()
        if checkpoint.leftover
        else (
            "the file contains the control and the decoder; the original code loads it over Stable Diffusion with"
            " strict=False, as ControlNet 1.1's files",
        )
    )
    tensors = {**checkpoint.leftover, **control, **renamed}
    return Written(tensors=tensors, notes=[*_setting_notes(checkpoint), *notes])


def _write_difference(checkpoint: Checkpoint, reference: Reference) -> Written:
    return _with_setting_notes(difference.write(_alone(checkpoint), reference), checkpoint)


def _write_control_lora(checkpoint: Checkpoint, reference: Reference) -> Written:
    return _with_setting_notes(control_lora.write(_alone(checkpoint), reference), checkpoint)


def _with_setting_notes(written: Written, checkpoint: Checkpoint) -> Written:
    return replace(written, notes=[*written.notes, *_setting_notes(checkpoint)])


FORMATS = (
    FileFormat(name="original", description=ORIGINAL_DESCRIPTION, detect=_detect_original, read=_read, write=_write),
    FileFormat(name="bare", description=BARE_DESCRIPTION, detect=_detect_bare, read=_read, write=_write_bare),
    FileFormat(name="full", description=FULL_DESCRIPTION, detect=_detect_full, read=_read_full, write=_write_full),
    FileFormat(
        name="difference",
        description="a ControlNet as its difference from the base's UNet",
        detect=_detect_difference,
        read=difference.read,
        write=_write_difference,
        needs_base=True,
    ),
    FileFormat(
        name="control-lora",
        description="Stability AI's Control-LoRA: low-rank changes of the base's UNet",
        detect=_detect_control_lora,
        read=control_lora.read,
        write=_write_control_lora,
        needs_base=True,
    ),
)
