"""From one layout of a control's file to another: what `controlkit convert` does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from controlkit import conditions
from controlkit.bases.known import KNOWN_BASES, known_by_shape
from controlkit.bases.load import SINGLE_FILES, base_folder, base_path, load_base
from controlkit.checkpoints.content import CONTROLNET, CTRLORA, CTRLORA_BASE, KINDS, Content, Options
from controlkit.checkpoints.controls import find_control, shipped_controls
from controlkit.checkpoints.ctrlora import find_base_control, fingerprint_of, read_base_control, transferred_from
from controlkit.checkpoints.layouts import LAYOUTS, read_content
from controlkit.checkpoints.layouts.layout import Layout
from controlkit.checkpoints.recognise import known, recognise
from controlkit.errors import UserError, nearest
from controlkit.files import files_of, read_json, refuse_replacing

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""Name -> dtype that a file may have."""

_POOLS = "global_pool_conditions"


@dataclass(frozen=True)
class Converted:
    """A file that was written, and what there is to say about it."""

    path: Path
    source: Path
    kind: str
    from_layout: str
    to_layout: str
    content: Content = field(repr=False)
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
        pooled: the ControlNet takes the mean of its residuals over the picture, as ControlNet 1.1's shuffle does; its
            original file does not say so. Where a file says nothing, the condition `shuffle` implies it.
        force: replace a file that is there already, or write into a folder that has files.

    Raises:
        UserError: the source is no control or is damaged, the layout cannot carry it, something that it needs is
            missing, or the path cannot be written or would be written over.
    """
    if to not in LAYOUTS:
        raise UserError(f"there is no layout called {to!r}{nearest(to, list(LAYOUTS))}")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}")
    if rank is not None and rank < 1:
        raise UserError(f"--rank {rank}: expected a whole number above 0")
    layout = LAYOUTS[to]
    target = _check_target(Path(out), layout)
    path = find_control(source)
    if target.exists() and target.samefile(path):
        raise UserError(f"{out} is the control itself; write the other layout somewhere else")
    if rank is not None and to != "control-lora":
        raise UserError(f"--rank {rank} is of a Control-LoRA that is written (--to control-lora), not of {to}")
    found = known(recognise(path))
    _check_carries(path, found.kind or "", layout)
    options = replace(options_for(base), rank=rank)
    content = read_content(found, options)
    if base_control is not None and content.kind != CTRLORA:
        raise UserError(f"--base-control is for an adapter of CtrLoRA; {path} is {KINDS[content.kind]}")
    if condition is not None:
        content.metadata["control.condition"] = conditions.find(condition).name
    _settle_pooling(path, content, pooled)
    read = [*files_of(path), *_files_of_base(base)]
    if content.kind == CTRLORA:
        read += _settle_base_control(path, content, layout, base_control, options)
    refuse_replacing(layout.written(target), read, force=force)
    if layout.folder and target.is_dir() and any(target.iterdir()) and not force:
        raise UserError(f"the folder {out} has files in it; give a new one, or --force to write among them")
    if dtype is not None:
        _cast(content, DTYPES[dtype])
    if content.kind == CTRLORA_BASE and (dtype is not None or "control.fingerprint" not in content.metadata):
        content.metadata["control.fingerprint"] = fingerprint_of(content)
    assert layout.writes is not None
    told = layout.writes(content, target, options)
    notes = (*dict.fromkeys((*content.notes, *told)),)
    return Converted(target, path, content.kind, found.layout or "", to, content, notes)


def options_for(base: str | None) -> Options:
    """A base's UNet: its settings at once, its weights when a layout asks for them.

    Raises:
        UserError: there is no such base.
    """
    if base is None:
        return Options()
    if known_by_shape(base):
        return Options(unet_config=KNOWN_BASES[base]["unet"])

    if Path(base).suffix in SINGLE_FILES and not Path(base).is_dir():
        unet = load_base(base).unet
        return Options(unet_config=dict(unet.config), unet=unet.state_dict)

    def weights() -> Mapping[str, Tensor]:
        return load_base(base).unet.state_dict()

    return Options(unet_config=read_json(base_folder(base) / "unet" / "config.json"), unet=weights)


def _files_of_base(base: str | None) -> list[Path]:
    if base is None or known_by_shape(base):
        return []
    return files_of(base_path(base))


def _check_target(out: Path, layout: Layout) -> Path:
    if layout.writes is None:
        raise UserError(f"the layout {layout.name} is read, not written")
    if layout.folder:
        if out.is_file():
            raise UserError(f"{out} is a file; the layout {layout.name} is a folder")
        return out
    if out.is_dir():
        raise UserError(f"{out} is a folder; the layout {layout.name} is one file, so give its name")
    if out.suffix != ".safetensors":
        raise UserError(f"{out} must end in .safetensors: files are written as that alone, never as pickles")
    return out


def _check_carries(path: Path, kind: str, layout: Layout) -> None:
    if kind in layout.kinds:
        return
    able = [other.name for other in LAYOUTS.values() if other.writes is not None and kind in other.kinds]
    reason = ""
    if kind in (CTRLORA, CTRLORA_BASE):
        reason = (
            "; CtrLoRA is conditioned on the latent of the condition image and never sees the noise, so it is no"
            " plain ControlNet"
        )
    raise UserError(
        f"{path} is {KINDS[kind]}, which the layout {layout.name} cannot carry; it can be written as"
        f" {', '.join(able) or 'nothing else'}{reason}"
    )


def _settle_pooling(path: Path, content: Content, pooled: bool) -> None:
    """Write down that a ControlNet pools its residuals, which no tensor of it tells."""
    if pooled and content.kind != CONTROLNET:
        raise UserError(f"--pooled is for a ControlNet; {path} is {KINDS[content.kind]}")
    silent = content.kind == CONTROLNET and _POOLS not in content.config
    if not pooled and content.condition == "shuffle" and silent:
        content.notes.append("it is written as one that pools its residuals, as ControlNet 1.1's shuffle does")
        pooled = True
    if pooled:
        content.config[_POOLS] = True


def _settle_base_control(
    path: Path, content: Content, layout: Layout, base_control: str | Path | None, options: Options
) -> list[Path]:
    """Find an adapter's base control, if it was named or merging needs it, and write down which it is; its files."""
    if base_control is not None:
        file = find_control(base_control)
    elif layout.name == "merged" and content.base_control is None:
        file = find_base_control(path, content, shipped_controls().values())
    else:
        return []
    content.base_control = read_base_control(file, options)
    fingerprint = fingerprint_of(content.base_control)
    said = content.metadata.get("control.base_control_fingerprint", fingerprint)
    if said not in (fingerprint, *transferred_from(content.base_control.metadata)):
        raise UserError(f"{path} was made on another base control ({said}) than {file} ({fingerprint})")
    content.metadata["control.base_control"] = file.stem
    content.metadata["control.base_control_fingerprint"] = fingerprint
    return files_of(file)


def _cast(content: Content, dtype: torch.dtype) -> None:
    for tensors in (content.tensors, content.leftover):
        for name, value in tensors.items():
            if value.is_floating_point():
                tensors[name] = value.to(dtype)
    if content.base_control is not None:
        _cast(content.base_control, dtype)
