"""CtrLoRA's two kinds of files: the base control, and an adapter that names the base control it needs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from controlkit.bases.base import Base
from controlkit.checkpoints.files import control_metadata, read_metadata, read_tensors, short, write_tensors
from controlkit.controls.base_control import BaseControl, build_base_control
from controlkit.controls.ctrlora import CtrLoRA
from controlkit.errors import UserError

BASE_KIND = "ctrlora-base"
"""`control.kind` of a base control's file; an adapter's is `ctrlora`."""


def save_base_control(
    path: str | Path,
    control: BaseControl,
    base: Base,
    *,
    made: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float16,
) -> Path:
    """Write the shared network, without adapters."""
    metadata = control_metadata(
        path,
        base,
        kind=BASE_KIND,
        architecture="ctrlora-base",
        config=control.config(),
        condition=control.condition,
        made=made,
    )
    metadata["control.fingerprint"] = control.fingerprint()
    return write_tensors(path, control.base_state_dict(), metadata, dtype)


def save_adapter(
    path: str | Path,
    control: CtrLoRA,
    base: Base,
    base_control: str,
    *,
    made: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float16,
) -> Path:
    """Write one adapter.

    Args:
        base_control: what the file of its base control is called, without `.safetensors`; where it is looked for
            first. What counts is its fingerprint.
    """
    metadata = control_metadata(
        path,
        base,
        kind=CtrLoRA.kind,
        architecture="ctrlora",
        config=control.config(),
        condition=control.condition,
        made=made,
    )
    metadata["control.rank"] = str(control.base_control.adapters[control.adapter].rank)
    metadata["control.base_control"] = base_control
    metadata["control.base_control_fingerprint"] = control.base_control.fingerprint()
    return write_tensors(path, control.base_control.adapter_state_dict(control.adapter), metadata, dtype)


def build_base(path: Path, metadata: dict[str, str], tensors: dict[str, Tensor]) -> BaseControl:
    """The base control of a file that was read.

    Raises:
        UserError: the file does not hold what its metadata announces.
    """
    try:
        control = build_base_control(json.loads(metadata["control.config"]), tensors)
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{path} does not hold the base control that its metadata announces: {short(error)}") from error
    control.condition = metadata.get("control.condition") or None
    return control.requires_grad_(False)


def build_adapter(
    path: Path,
    metadata: dict[str, str],
    tensors: dict[str, Tensor],
    shared: dict[str, BaseControl],
    elsewhere: Iterable[Path],
) -> CtrLoRA:
    """The adapter of a file that was read, on its base control.

    Args:
        shared: fingerprint -> base controls that are loaded; the adapter's own is added.
        elsewhere: files that may be its base control, besides the one of the name it gives beside it.

    Raises:
        UserError: its base control is not to be found, or the adapter does not fit it.
    """
    wanted = metadata.get("control.base_control_fingerprint", "")
    if wanted not in shared:
        shared[wanted] = _find_base(path, metadata, wanted, elsewhere)
    base_control = shared[wanted]
    name = path.stem
    while name in base_control.adapters:
        name += "'"
    try:
        base_control.load_adapter(name, tensors, rank=int(metadata["control.rank"]))
    except (KeyError, ValueError) as error:
        raise UserError(f"{path} cannot be used: {short(error)}") from error
    return CtrLoRA(base_control, name, metadata.get("control.condition") or None)


def _find_base(path: Path, metadata: dict[str, str], wanted: str, elsewhere: Iterable[Path]) -> BaseControl:
    name = metadata.get("control.base_control", "base")
    for candidate in (path.with_name(f"{name}.safetensors"), *elsewhere):
        if candidate.is_file() and read_metadata(candidate).get("control.fingerprint") == wanted:
            found, tensors = read_tensors(candidate)
            return build_base(candidate, found, tensors)
    raise UserError(
        f"{path} is an adapter of the base control {name!r} ({wanted}), which is neither beside it nor ships;"
        f" put {name}.safetensors into {path.parent}"
    )
