"""Convert a control file from one format to another (`controlkit convert`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from controlkit import conditions
from controlkit.bases.families import KNOWN_BASES, known_by_shape
from controlkit.bases.folders import SINGLE_FILES, base_folder
from controlkit.bases.identity import hash_of_halves
from controlkit.bases.load import base_path, load_base
from controlkit.bases.meta import meta_base
from controlkit.controls.control import Control
from controlkit.controls.file_format import Checkpoint, FileFormat, Reference, Written, listed
from controlkit.controls.inputs import words_of_inputs
from controlkit.controls.registry import find, registry, role_of
from controlkit.errors import UserError, nearest
from controlkit.files import check_overwrite, files_of, read_json, write_json
from controlkit.formats.companions import (
    FINGERPRINT,
    check_companion,
    find_companion,
    fingerprint_of,
    read_companion,
    renew_fingerprint,
)
from controlkit.formats.detect import Detected, detect, known
from controlkit.formats.load import denoiser_reference, find_control, reference_to, shipped_controls
from controlkit.formats.metadata import converted_metadata, write_tensors
from controlkit.formats.native import formats_of

_OF_MODELS = (
    *("config.json", "adapter_config.json", "model_index.json", "unet"),
    *("adapter_model*", "diffusion_pytorch_model*", "*.index*.json", "*.fp16.*", "*.bf16.*", "*.bin"),
)
"""Names by which readers of a folder detect its model and find its weights."""

_SUBTRACTED, _SUBTRACTED_FINGERPRINT = "control.difference_from", "control.difference_from_fingerprint"
"""Metadata of a difference: the base that was subtracted, which need not be the one that the control was trained on."""

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""Name -> dtype of a file's tensors."""


@dataclass(frozen=True)
class Converted:
    """Result of a conversion."""

    path: Path
    source: Path
    kind: str
    from_format: str
    to_format: str
    checkpoint: Checkpoint = field(repr=False)
    notes: tuple[str, ...]
    dtypes: Mapping[str, int]
    """Dtype -> number of tensors in the file."""
    parameters: int
    """Number of elements of the tensors in the file."""

    @property
    def from_layout(self) -> str:
        """Former name of `from_format`."""
        return self.from_format

    @property
    def to_layout(self) -> str:
        """Former name of `to_format`."""
        return self.to_format

    @property
    def content(self) -> Checkpoint:
        """Former name of `checkpoint`."""
        return self.checkpoint

    def to_json(self) -> dict[str, Any]:
        """JSON values for reports."""
        return {
            "path": str(self.path),
            "layout": self.to_format,
            "from": {"path": str(self.source), "layout": self.from_format},
            "kind": self.kind,
            "condition": self.checkpoint.condition,
            "tensors": sum(self.dtypes.values()),
            "parameters": self.parameters,
            "dtypes": dict(self.dtypes),
            "notes": list(self.notes),
        }


def convert(
    source: str | Path,
    out: str | Path,
    to: str,
    *,
    base: str | None = None,
    base_control: str | Path | None = None,
    dtype: str | None = None,
    rank: int | None = None,
    condition: str | None = None,
    kind: str | None = None,
    pooled: bool = False,
    decoder: bool = False,
    force: bool = False,
) -> Converted:
    """Read a control in any format and write it in another. Tensors keep their dtype, files their metadata.

    Its inputs (the source, a base control, a base) are never overwritten.

    Args:
        source: file, folder, or the name of a shipped control.
        out: file to write, or folder for formats that are folders.
        to: name of a format (`format_names`).
        base: nano, a diffusers folder, a single file, a hub id, or a well-known base (`sd15`), of which only the
            settings are available; for files that depend on their base. The control must fit it.
        base_control: file of an adapter's base control; by default it is searched next to the adapter.
        dtype: of the floating-point tensors in the output; their values must be in its range.
        rank: of a low-rank format.
        condition: name of the control's condition, written into the metadata; one of its own if it has several.
        kind: system of the control to read, for a file that contains several.
        pooled: the ControlNet averages its residuals over the image, as ControlNet 1.1's shuffle does, which its
            original file does not record. Implied by the condition `shuffle` if the file has no such entry.
        decoder: keep the decoder of the Stable Diffusion in the file, which was trained along with the control; it then
            replaces that of the base.
        force: replace an existing file, or write into a folder that is not empty. A folder with other files of a model
            is refused all the same, as readers would load those.

    Raises:
        UserError: the source is not a control or is damaged, the format cannot hold it, something that it needs is
            missing, or the output path cannot be written.
    """
    names = format_names()
    if to not in names:
        raise UserError(f"there is no format {to!r}{nearest(to, names)}", "unknown-name")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}", "unknown-name")
    if rank is not None and rank < 1:
        raise UserError(f"--rank {rank}: expected an integer above 0", "out-of-range")
    target = Path(out)
    _check_target(target, to)
    path = find_control(source)
    if target.exists() and target.samefile(path):
        raise UserError(f"{out} is the control itself; choose another path for the output", "would-overwrite")
    detected = _detected(path, kind)
    system, source_format = detected.control, detected.format
    assert system is not None and source_format is not None and source_format.read is not None
    format_ = _writable(path, system, to)
    if rank is not None and not (format_.needs_base and to == "control-lora"):
        raise UserError(f"--rank {rank} applies to --to control-lora only, not to {to}", "contradiction")
    reference = replace(reference_for(base), rank=rank, kind=kind)
    checkpoint = source_format.read(system, detected.file, reference, detected.description)
    flags = [name for name, used in (("pooled", pooled), ("decoder", decoder)) if used]
    _check_flags(path, system, base_control is not None, flags)
    if base is not None:
        check_base(system, checkpoint, base)
        _settle_base(checkpoint, source_format, base, reference)
    if condition is not None:
        checkpoint.metadata["control.condition"] = _checked_condition(path, system, checkpoint, condition)
    system.settle_checkpoint(checkpoint, flags)
    inputs = [*files_of(path), *_files_of_base(base)]
    if system.companion is not None:
        inputs += _settle_companion(path, checkpoint, format_, base_control, reference)
    _check_outputs(target, format_, inputs, force=force)
    if is_companion(system):
        checkpoint.metadata[FINGERPRINT] = fingerprint_of(checkpoint)
    output = _output(checkpoint, format_, reference, base, dtype)
    _write(target, format_, checkpoint, output)
    notes = (*dict.fromkeys((*checkpoint.notes, *output.notes)),)
    dtypes = Counter(str(value.dtype).removeprefix("torch.") for value in output.tensors.values())
    written = output.checkpoint or checkpoint
    return Converted(
        path=target,
        source=path,
        kind=written.kind,
        from_format=detected.format_name or "",
        to_format=to,
        checkpoint=checkpoint,
        notes=notes,
        dtypes=dtypes,
        parameters=sum(value.numel() for value in output.tensors.values()),
    )


def _detected(path: Path, kind: str | None) -> Detected:
    """The control at `path`, which must be of the system `kind` if that is given."""
    if kind is None:
        return known(detect(path))
    title = find(kind).title
    detected = detect(path, kind)
    if detected.kind != kind:
        raise UserError(f"{path} contains no control of the kind {kind} ({title})", "wrong-kind")
    return known(detected)


def format_names() -> list[str]:
    """Names of all formats of all systems."""
    return list(dict.fromkeys(name for kind in registry().values() for name in formats_of(kind)))


def _check_flags(path: Path, kind: type[Control], companion: bool, flags: Sequence[str]) -> None:
    if companion and kind.companion is None:
        able = _titles(other for other in registry().values() if other.companion)
        raise UserError(f"--base-control is for {able}; {path} is {kind.title}", "contradiction")
    for flag in flags:
        if flag not in kind.convert_flags:
            able = _titles(other for other in registry().values() if flag in other.convert_flags)
            raise UserError(f"--{flag} is for {able}; {path} is {kind.title}", "contradiction")


def check_base(kind: type[Control], checkpoint: Checkpoint, base: str) -> None:
    """Check that the control of a checkpoint fits a base, from configurations alone.

    Raises:
        UserError: there is no such base, or it does not fit.
    """
    on_meta = meta_base(base)
    with torch.device("meta"):
        control = kind.from_config(checkpoint.config)
    if (reason := control.incompatibility(on_meta)) is not None:
        raise UserError(
            f"{checkpoint.path} does not fit the base {base}: {reason}; pass the base that it was made for as --base",
            "incompatible",
        )


def _checked_condition(path: Path, kind: type[Control], checkpoint: Checkpoint, condition: str) -> str:
    """The name of a condition that the control of a checkpoint may record.

    Raises:
        UserError: there is no such condition, or the control cannot be of it.
    """
    name = conditions.find(condition).name
    known = kind.conditions_in(checkpoint.config)
    if known and name not in known:
        message = f"--condition {condition}: {path} has no condition {name!r}{nearest(name, known)}"
        raise UserError(message, "unknown-name")
    kind = kind.class_of(checkpoint.config)
    if not any(entry.kind == "image" and entry.condition is None for entry in kind.inputs):
        raise UserError(
            f"--condition {condition} has no effect on {path}: the inputs of {kind.title} are {words_of_inputs(kind)};"
            " remove it",
            "contradiction",
        )
    return name


def _titles(kinds: Iterable[type[Control]]) -> str:
    return " or ".join(kind.title for kind in kinds)


def is_companion(kind: type[Control]) -> bool:
    """Whether controls of another system depend on this one."""
    return any(other.companion == kind.kind for other in registry().values())


def reference_for(base: str | None) -> Reference:
    """Config of a base's denoiser, and its weights, loaded on demand.

    Raises:
        UserError: there is no such base.
    """
    if base is None:
        return Reference()
    if known_by_shape(base):
        family, configurations = KNOWN_BASES[base]
        component = family.denoiser_component().name
        return denoiser_reference(component, dict(configurations[component]))
    if Path(base).suffix in SINGLE_FILES and not Path(base).is_dir():
        return reference_to(load_base(base))

    def weights() -> Mapping[str, Tensor]:
        return load_base(base).denoiser.state_dict()

    folder = base_folder(base)
    component = "unet" if (folder / "unet").is_dir() else "transformer"
    return denoiser_reference(component, read_json(folder / component / "config.json"), weights)


def _settle_base(checkpoint: Checkpoint, source_format: FileFormat, base: str, reference: Reference) -> None:
    """Record the base to which a difference was added, if it was taken from another: `transfer` would take the wrong
    one. A file that does not record from which it was taken was taken from the control's own."""
    metadata = checkpoint.metadata
    subtracted = metadata.pop(_SUBTRACTED, None), metadata.pop(_SUBTRACTED_FINGERPRINT, None)
    own = metadata.get("control.base", ""), metadata.get("control.base_fingerprint")
    former, recorded = own if None in subtracted else subtracted
    if recorded is None or not source_format.needs_base or reference.unet_weights is None:
        return
    fingerprint = hash_of_halves(reference.unet_weights.values())
    if recorded == fingerprint:
        return
    checkpoint.notes.append(
        f"it is the difference from the base {former} ({recorded}), added to another base {base} ({fingerprint}): the"
        " control is moved to that one by their offset, as `controlkit transfer` does"
    )
    metadata |= {"control.base": base, "control.base_fingerprint": fingerprint}


def _record_subtracted(checkpoint: Checkpoint, base: str, reference: Reference) -> None:
    """Record the base that was subtracted from a control, for `_settle_base`."""
    if reference.unet_weights is not None:
        fingerprint = hash_of_halves(reference.unet_weights.values())
        checkpoint.metadata |= {_SUBTRACTED: base, _SUBTRACTED_FINGERPRINT: fingerprint}


def _files_of_base(base: str | None) -> list[Path]:
    if base is None or known_by_shape(base):
        return []
    return files_of(base_path(base))


def _check_target(out: Path, to: str) -> None:
    """Check that a path suits a format; whether that is a folder does not depend on the system."""
    formats = [formats_of(kind)[to] for kind in registry().values() if to in formats_of(kind)]
    if all(file_format.write is None for file_format in formats):
        raise UserError(f"the format {to} can be read but not written", "unsupported")
    if any(file_format.files for file_format in formats):
        if out.is_file():
            raise UserError(f"{out} is a file; the format {to} is a folder", "wrong-kind")
        return
    if out.is_dir():
        raise UserError(f"{out} is a folder; the format {to} is a single file, so pass a file name", "wrong-kind")
    if out.suffix != ".safetensors":
        raise UserError(f"{out} must end in .safetensors, the only file type that is written", "unsupported")


def _check_outputs(target: Path, format_: FileFormat, inputs: Iterable[Path], *, force: bool) -> None:
    """Check that writing `target` replaces no input, and nothing else without `force`.

    Raises:
        UserError: it would, or other files in the folder would be read in place of the new ones.
    """
    check_overwrite([target / name for name in format_.files] or [target], inputs, force=force)
    if not format_.files or not target.is_dir():
        return
    if any(target.iterdir()) and not force:
        raise UserError(
            f"the folder {target} is not empty; choose another, or pass --force to write into it", "would-overwrite"
        )
    found = {path.name for pattern in _OF_MODELS for path in target.glob(pattern)}
    if others := sorted(found - set(format_.files)):
        raise UserError(
            f"the folder {target} has other files of a model, which would be read in place of the new ones:"
            f" {listed(others)}; delete them, or choose another folder",
            "would-overwrite",
        )


def _writable(path: Path, kind: type[Control], to: str) -> FileFormat:
    formats = formats_of(kind)
    if to in formats and formats[to].write is not None:
        return formats[to]
    able = [file_format.name for file_format in formats.values() if file_format.write is not None]
    reason = f"; {kind.not_elsewhere}" if kind.not_elsewhere else ""
    raise UserError(
        f"{path} is {kind.title}, which the format {to} cannot hold; it can be written as"
        f" {', '.join(able) or 'nothing else'}{reason}",
        "unsupported",
    )


def _settle_companion(
    path: Path, content: Checkpoint, format_: FileFormat, base_control: str | Path | None, reference: Reference
) -> list[Path]:
    """Read the companion, if it was passed or writing needs it, and record it in the metadata; returns its files."""
    kind = find(content.kind)
    assert kind.companion is not None
    key = f"{kind.companion_key}_fingerprint"
    if base_control is not None:
        file = find_control(base_control)
    elif format_.needs_companion and content.companion is None:
        file = find_companion(path, content, shipped_controls().values())
    else:
        if content.companion is not None and not format_.needs_companion:
            content.notes.append(
                f"its {role_of(find(content.companion.kind))} ({len(content.companion.tensors)} tensors with the"
                " adapter's norms and zero convolutions) is not written; --to merged keeps both"
            )
        return []
    content.companion = read_companion(kind.companion, file, reference)
    companion = find(kind.companion)
    fingerprint = companion.fingerprint_of(content.companion)
    check_companion(path, content, file, content.companion, fingerprint)
    # One that was cast or moved to another base since has another fingerprint than the one trained on.
    if key not in content.metadata:
        content.metadata |= {kind.companion_key: file.stem, key: fingerprint}
    return files_of(file)


def _output(
    checkpoint: Checkpoint, format_: FileFormat, reference: Reference, base: str | None, dtype: str | None
) -> Written:
    """What a format writes of a checkpoint, with the base that it subtracted, if any, in the metadata.

    Raises:
        UserError: the format cannot hold the checkpoint, or finite values exceed the range of `dtype`.
    """
    assert format_.write is not None
    # A difference is small beside the weights and so beside their rounding error: it is computed first, then cast.
    is_computed = format_.needs_base or format_.needs_companion
    if dtype is not None:
        _cast(checkpoint, torch.float32 if is_computed else DTYPES[dtype])
        if is_companion(find(checkpoint.kind)):
            renew_fingerprint(checkpoint)
    output = format_.write(checkpoint, reference)
    if dtype is not None and is_computed:
        output = _cast_output(output, checkpoint.path, DTYPES[dtype])
    if base is not None and format_.needs_base:
        _record_subtracted(output.checkpoint or checkpoint, base, reference)
    return output


def _write(target: Path, format_: FileFormat, source: Checkpoint, output: Written) -> None:
    checkpoint = output.checkpoint or source
    path = target / format_.files[-1] if format_.files else target
    write_tensors(path, output.tensors, converted_metadata(checkpoint, target.stem), None)
    for name, config in output.configs.items():
        write_json(target / name, dict(config))


def _cast(content: Checkpoint, dtype: torch.dtype) -> None:
    """Cast the floating-point tensors of a checkpoint and its companion; tensors that become all zero are noted.

    Raises:
        UserError: finite values exceed the range of `dtype`.
    """
    for tensors in (content.tensors, content.leftover):
        content.notes += _cast_tensors(tensors, dtype, content.path)
    if content.companion is not None:
        _cast(content.companion, dtype)


def _cast_output(output: Written, path: Path | None, dtype: torch.dtype) -> Written:
    """Cast the floating-point tensors of a format's output, as `_cast`; the fingerprint is that of the cast weights."""
    tensors = dict(output.tensors)
    notes = _cast_tensors(tensors, dtype, path)
    if output.checkpoint is not None and FINGERPRINT in output.checkpoint.metadata:
        _cast(output.checkpoint, dtype)
        output.checkpoint.metadata[FINGERPRINT] = find(output.checkpoint.kind).fingerprint_of(output.checkpoint)
    return replace(output, tensors=tensors, notes=(*output.notes, *notes))


def _cast_tensors(tensors: dict[str, Tensor], dtype: torch.dtype, path: Path | None) -> list[str]:
    """Cast the floating-point ones in place; returns notes on those that become all zero.

    Args:
        path: of the control, for errors.

    Raises:
        UserError: finite values exceed the range of `dtype`.
    """
    overflowing, vanished = [], []
    for name, value in tensors.items():
        if not value.is_floating_point():
            continue
        cast = tensors[name] = value.to(dtype)
        value = value.float() if value.itemsize == 1 else value  # torch tests no float8 for finite values
        if bool((cast.isinf() & value.isfinite()).any()):
            overflowing.append(name)
        elif bool(value.any()) and not bool(cast.any()):
            vanished.append(name)
    short = str(dtype).removeprefix("torch.")
    if overflowing:
        raise UserError(
            f"{path} does not fit {short}, whose largest value is {torch.finfo(dtype).max:g}:"
            f" {listed(overflowing)} would become infinite; use --dtype bfloat16 or float32",
            "out-of-range",
        )
    return [f"too small for {short}, now all zero: {listed(vanished)}"] if vanished else []
