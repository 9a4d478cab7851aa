"""Metadata of safetensors files.

Strings, as safetensors requires: the fields of modelspec 1.0.1, which other tools show, and controlkit's in
`control.*`: `kind`, `config`, `condition`, `base` and `base_fingerprint`, `hint_range`, and the provenance `made`. The
difference of a control from a base also has `difference_from` and `difference_from_fingerprint`, of that base.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from controlkit.bases.base import Base
from controlkit.bases.folders import NANO
from controlkit.bases.unet import ARCHITECTURES
from controlkit.controls.control import Control
from controlkit.controls.file_format import Checkpoint
from controlkit.controls.registry import find
from controlkit.files import write_atomically
from controlkit.formats.tensors import read_tensor_file


def write_tensors(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    metadata: dict[str, str],
    dtype: torch.dtype | None = torch.float16,
) -> Path:
    """Write `tensors` with `metadata`, atomically; the same content gives the same bytes.

    Args:
        dtype: of every floating-point tensor in the file; None keeps their own.
    """
    path = Path(path)
    stored: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, value in tensors.items():
        target = dtype if dtype is not None and value.is_floating_point() else value.dtype
        tensor = value.detach().to("cpu", target).contiguous()
        # safetensors rejects tensors that share memory, such as tied weights and views of one storage.
        storage = tensor.untyped_storage()
        if storage.data_ptr() in storages or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        stored[name] = tensor

    def write(temporary: Path) -> None:
        save_file(stored, temporary, metadata)
        _sort_metadata(temporary)

    write_atomically(path, write)
    return path


def _sort_metadata(path: Path) -> None:
    """Sort the metadata in the header of a safetensors file, whose library writes them in random order."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:  # the tensors stay where they are
            file.seek(8)
            file.write(text.ljust(length))


def control_metadata(path: str | Path, control: Control, base: Base, made: dict[str, Any] | None) -> dict[str, str]:
    """Metadata of a control's file; see the module's docstring."""
    model = base.name if base.name == NANO else base.architecture
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{model}/{control.architecture or control.kind}",
        "modelspec.implementation": "controlkit",
        "modelspec.title": Path(path).stem,
        "modelspec.resolution": f"{base.size}x{base.size}",
        "modelspec.prediction_type": base.prediction_type,
        "control.kind": control.kind,
        "control.config": json.dumps(control.config()),
        "control.condition": control.condition or "",
        "control.base": base.name,
        "control.base_fingerprint": base.fingerprint,
        "control.hint_range": "[0, 1]",
        "control.made": json.dumps(made or {}),
        **control.file_metadata(),
    }


OF_TENSORS = ("modelspec.hash_sha256",)
"""Metadata that describes the tensors of a file, and so of no file that is made from it."""


def converted_metadata(checkpoint: Checkpoint, title: str) -> dict[str, str]:
    """Metadata for a converted file: that of its source other than `OF_TENSORS`, and controlkit's own."""
    family = ARCHITECTURES.get(checkpoint.config.get("cross_attention_dim", 0), "unknown")
    kind = find(checkpoint.kind)
    metadata = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{family}/{kind.architecture or kind.kind}",
        "modelspec.implementation": "controlkit",
        "modelspec.title": title,
        "control.condition": "",
        "control.hint_range": "[0, 1]",
        **{key: value for key, value in checkpoint.metadata.items() if key not in OF_TENSORS},
        "control.kind": checkpoint.kind,
        "control.config": json.dumps(checkpoint.config),
    }
    if "rank" in checkpoint.config:
        metadata["control.rank"] = str(checkpoint.config["rank"])
    return metadata


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a file of tensors; only safetensors has any.

    Raises:
        UserError: it is not a complete file of tensors.
    """
    return read_tensor_file(path).metadata


def provenance_of(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The provenance of a control (`control.made`); empty if the file has none."""
    try:
        provenance = json.loads(metadata.get("control.made") or "{}")
    except (ValueError, RecursionError):
        return {}
    return provenance if isinstance(provenance, dict) else {}
