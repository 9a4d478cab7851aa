"""safetensors files with metadata that says what they are.

Metadata (strings, as safetensors wants): the fields of modelspec 1.0.1 that other tools show, and ours under
`control.*`: `kind`, `config`, `condition`, `base` and `base_fingerprint`, `hint_range`, and how it was `made`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from controlkit.bases.base import Base
from controlkit.errors import UserError
from controlkit.files import write_atomically


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: dict[str, str], dtype: torch.dtype = torch.float16
) -> Path:
    """Write `tensors` in `dtype` with `metadata`, whole or not at all."""
    path = Path(path)
    plain = {name: value.detach().to("cpu", dtype).contiguous() for name, value in tensors.items()}
    write_atomically(path, lambda temporary: save_file(plain, temporary, metadata))
    return path


def control_metadata(
    path: str | Path,
    base: Base,
    *,
    kind: str,
    architecture: str,
    config: dict[str, Any],
    condition: str | None,
    made: dict[str, Any] | None,
) -> dict[str, str]:
    """The metadata of a control's file; see the module's docstring."""
    model = base.name if base.name == "nano" else "stable-diffusion-v1"
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{model}/{architecture}",
        "modelspec.implementation": "controlkit",
        "modelspec.title": Path(path).stem,
        "modelspec.resolution": f"{base.size}x{base.size}",
        "modelspec.prediction_type": base.prediction_type,
        "control.kind": kind,
        "control.config": json.dumps(config),
        "control.condition": condition or "",
        "control.base": base.name,
        "control.base_fingerprint": base.fingerprint,
        "control.hint_range": "[0, 1]",
        "control.made": json.dumps(made or {}),
    }


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a safetensors file.

    Raises:
        UserError: it is not a whole safetensors file.
    """
    return _read(Path(path), tensors=False)[0]


def read_tensors(path: str | Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file; floating-point ones as float32.

    Raises:
        UserError: it is not a whole safetensors file.
    """
    metadata, tensors = _read(Path(path), tensors=True)
    return metadata, {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}


def short(error: Exception) -> str:
    """An error's words on one line."""
    return " ".join(str(error).split())[:300]


def _read(path: Path, *, tensors: bool) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        if path.stat().st_size == 0:
            raise UserError(f"{path} is empty (0 bytes)")
        with safe_open(path, framework="pt") as file:
            names = file.keys() if tensors else []
            return file.metadata() or {}, {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a whole safetensors file ({short(error)})") from error
