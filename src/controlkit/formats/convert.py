"""From one format of a control's file to another: what `controlkit convert` does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from controlkit import conditions
from controlkit.bases.families import KNOWN_BASES, known_by_shape
from controlkit.bases.load import SINGLE_FILES, base_folder, base_path, load_base
from controlkit.controls.control import Control
from controlkit.controls.file_format import Checkpoint, FileFormat, Reference, Written
from controlkit.controls.registry import find, registry
from controlkit.errors import UserError, nearest
from controlkit.files import check_overwrite, files_of, read_json, write_json
from controlkit.formats.companions import check_companion, find_companion, read_companion
from controlkit.formats.detect import detect, known
from controlkit.formats.load import find_control, shipped_controls
from controlkit.formats.metadata import converted_metadata, write_tensors
from controlkit.formats.native import formats_of

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""Name -> dtype that a file may have."""


@dataclass(frozen=True)
class Converted:
    """A file that was written, and what there is to say about it."""

    path: Path
    source: Path
    kind: str
    from_layout: str
    to_layout: str
    content: Checkpoint = field(repr=False)
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values for reports."""
        dtypes = Counter(str(value.dtype).removeprefix("torch.") for value in self.content.tensors.values())
        return {
            "path": str(self.path),
            "layout": self.to_layout,
            "from": {"path": str(self.source), "layout": self.from_layout},
            "kind": self.kind,
            "condition": self.content.condition,
            "tensors": len(self.content.tensors),
            "parameters": self.content.parameters,
            "dtypes": dict(dtypes),
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
    pooled: bool = False,
    force: bool = False,
) -> Converted:
    """Read a control in any layout and write it in another. Tensors keep their dtype, files their metadata.

    What it reads (the source, a base control, a base) is never written over.

    Args:
        source: file, folder, or the name of a control that ships.
        out: file to write, or folder for the layouts that are folders.
        to: name of a layout (`LAYOUTS`).
        base: nano, a diffusers folder, a single file, an id on the hub, or a well-known base (`sd15`), whose settings
            alone are known; for what a file leaves to its base.
        base_control: file of an adapter's base control; looked for beside the adapter if None.
        dtype: of the floating-point tensors that are written.
        rank: of a low-rank layout.
        condition: name of the condition that the control follows, written into the metadata.
        pooled: the ControlNet takes the mean of its residuals over the image, as ControlNet 1.1's shuffle does; its
            original file does not say so. Where a file says nothing, the condition `shuffle` implies it.
        force: replace a file that is there already, or write into a folder that has files.

    Raises:
        UserError: the source is no control or is damaged, the layout cannot carry it, something that it needs is
            missing, or the path cannot be written or would be written over.
    """
    names = format_names()
    if to not in names:
        raise UserError(f"there is no layout called {to!r}{nearest(to, names)}")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}")
    if rank is not None and rank < 1:
        raise UserError(f"--rank {rank}: expected a whole number above 0")
    target = Path(out)
    _check_target(target, to)
    path = find_control(source)
    if target.exists() and target.samefile(path):
        raise UserError(f"{out} is the control itself; write the other layout somewhere else")
    found = known(detect(path))
    kind, read_as = found.control, found.format
    assert kind is not None and read_as is not None and read_as.read is not None
    format_ = _writable(path, kind, to)
    if rank is not None and not (format_.needs_base and to == "control-lora"):
        raise UserError(f"--rank {rank} is of a Control-LoRA that is written (--to control-lora), not of {to}")
    reference = replace(reference_for(base), rank=rank)
    content = read_as.read(kind, found.file, reference, found.says)
    _check_flags(path, kind, base_control is not None, pooled)
    if condition is not None:
        content.metadata["control.condition"] = conditions.find(condition).name
    kind.settle_checkpoint(content, ("pooled",) if pooled else ())
    read = [*files_of(path), *_files_of_base(base)]
    if kind.companion is not None:
        read += _settle_companion(path, content, format_, base_control, reference)
    written = [target / name for name in format_.files] or [target]
    check_overwrite(written, read, force=force)
    if format_.files and target.is_dir() and any(target.iterdir()) and not force:
        raise UserError(f"the folder {out} has files in it; give a new one, or --force to write among them")
    if dtype is not None:
        _cast(content, DTYPES[dtype])
    if is_companion(kind) and (dtype is not None or "control.fingerprint" not in content.metadata):
        content.metadata["control.fingerprint"] = kind.fingerprint_of(content)
    assert format_.write is not None
    made = format_.write(content, reference)
    _write(target, format_, content, made)
    notes = (*dict.fromkeys((*content.notes, *made.notes)),)
    return Converted(target, path, content.kind, found.layout or "", to, content, notes)


def format_names() -> list[str]:
    """Names of every format that some system's files may have."""
    return list(dict.fromkeys(name for kind in registry().values() for name in formats_of(kind)))


def _check_flags(path: Path, kind: type[Control], companion: bool, pooled: bool) -> None:
    if companion and kind.companion is None:
        raise UserError(f"--base-control is for {_titles(lambda one: bool(one.companion))}; {path} is {kind.title}")
    if pooled and "pooled" not in kind.convert_flags:
        raise UserError(f"--pooled is for {_titles(lambda one: 'pooled' in one.convert_flags)}; {path} is {kind.title}")


def _titles(test: Callable[[type[Control]], bool]) -> str:
    """What to call the systems that a test holds for."""
    return " or ".join(kind.title for kind in registry().values() if test(kind))


def is_companion(kind: type[Control]) -> bool:
    """Whether controls of another system need one of this system."""
    return any(other.companion == kind.kind for other in registry().values())


def reference_for(base: str | None) -> Reference:
    """A base's UNet: its settings at once, its weights when a layout asks for them.

    Raises:
        UserError: there is no such base.
    """
    if base is None:
        return Reference()
    if known_by_shape(base):
        _, configurations = KNOWN_BASES[base]
        if "unet" not in configurations:
            raise UserError(f"{base} has no UNet, which every control that is converted here was made for")
        return Reference(unet_config=dict(configurations["unet"]))

    if Path(base).suffix in SINGLE_FILES and not Path(base).is_dir():
        unet = load_base(base).unet
        return Reference(unet_config=dict(unet.config), unet=unet.state_dict)

    def weights() -> Mapping[str, Tensor]:
        return load_base(base).unet.state_dict()

    return Reference(unet_config=read_json(base_folder(base) / "unet" / "config.json"), unet=weights)


def _files_of_base(base: str | None) -> list[Path]:
    if base is None or known_by_shape(base):
        return []
    return files_of(base_path(base))


def _check_target(out: Path, to: str) -> None:
    """Refuse a path that no file of this format can have; whether it is a folder does not depend on the system."""
    formats = [formats_of(kind)[to] for kind in registry().values() if to in formats_of(kind)]
    if all(one.write is None for one in formats):
        raise UserError(f"the layout {to} is read, not written")
    if any(one.files for one in formats):
        if out.is_file():
            raise UserError(f"{out} is a file; the layout {to} is a folder")
        return
    if out.is_dir():
        raise UserError(f"{out} is a folder; the layout {to} is one file, so give its name")
    if out.suffix != ".safetensors":
        raise UserError(f"{out} must end in .safetensors: files are written as that alone, never as pickles")


def _writable(path: Path, kind: type[Control], to: str) -> FileFormat:
    formats = formats_of(kind)
    if to in formats and formats[to].write is not None:
        return formats[to]
    able = [one.name for one in formats.values() if one.write is not None]
    reason = f"; {kind.not_elsewhere}" if kind.not_elsewhere else ""
    raise UserError(
        f"{path} is {kind.title}, which the layout {to} cannot carry; it can be written as"
        f" {', '.join(able) or 'nothing else'}{reason}"
    )


def _settle_companion(
    path: Path, content: Checkpoint, format_: FileFormat, named: str | Path | None, reference: Reference
) -> list[Path]:
    """Find the companion, if it was named or writing needs it, and write down which it is; its files."""
    kind = find(content.kind)
    assert kind.companion is not None
    if named is not None:
        file = find_control(named)
    elif format_.needs_companion and content.companion is None:
        file = find_companion(path, content, shipped_controls().values())
    else:
        return []
    content.companion = read_companion(kind.companion, file, reference)
    companion = find(kind.companion)
    fingerprint = companion.fingerprint_of(content.companion)
    check_companion(path, content, file, content.companion, fingerprint)
    content.metadata[kind.companion_key] = file.stem
    content.metadata[f"{kind.companion_key}_fingerprint"] = fingerprint
    return files_of(file)


def _write(target: Path, format_: FileFormat, content: Checkpoint, made: Written) -> None:
    own = made.checkpoint or content
    path = target / format_.files[-1] if format_.files else target
    write_tensors(path, made.tensors, converted_metadata(own, target.stem), None)
    for name, config in made.configs.items():
        write_json(target / name, dict(config))


def _cast(content: Checkpoint, dtype: torch.dtype) -> None:
    for tensors in (content.tensors, content.leftover):
        for name, value in tensors.items():
            if value.is_floating_point():
                tensors[name] = value.to(dtype)
    if content.companion is not None:
        _cast(content.companion, dtype)
