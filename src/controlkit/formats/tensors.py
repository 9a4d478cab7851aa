"""Files of tensors in any container: safetensors, or a file of `torch.save`, read as data and never as a program."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from controlkit.bases.weight_files import unsafe_pickle_error
from controlkit.controls.file_format import TensorFile, on_one_line
from controlkit.errors import UserError

_LARGEST_HEADER = 100_000_000
"""Bytes of a safetensors header at the most, as safetensors itself has it."""

_NOT_FILES_OF_TENSORS = (
    (
        b"version https://git-lfs",
        "is a pointer of Git LFS, a few lines in the place of the file; download the file itself",
    ),
    (b"<!doctype html", "is a web page, not a file of tensors; download the file itself"),
    (b"<html", "is a web page, not a file of tensors; download the file itself"),
    (b"\x89png", "is an image, not a file of tensors"),
    (b"\xff\xd8\xff", "is an image, not a file of tensors"),
    (b"gguf", "is a GGUF file, which no control uses"),
)


def read_tensor_file(path: str | Path) -> TensorFile:
    """Read a file of tensors; its first bytes say what it is, its name nothing.

    A dictionary that wraps the weights under `state_dict`, as Lightning's do, is unwrapped.

    Raises:
        UserError: it is empty, torn, no file of tensors, or a pickle that holds more than tensors.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            head = stream.read(64)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if size == 0:
        raise UserError(f"{path} is empty (0 bytes)")
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _LARGEST_HEADER:
        return _read_safetensors(path)
    for start, says in _NOT_FILES_OF_TENSORS:
        if head.lower().lstrip().startswith(start):
            raise UserError(f"{path} {says}")
    if head[:2] == b"PK" or head[:1] == b"\x80":
        return _read_torch(path)
    raise UserError(f"{path} is not a whole safetensors file, nor one of torch.save")


def unscaled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights in float8 with a scale of their own (`X.scale_weight`, as ComfyUI writes them) => float32; others stay.

    The marks of such a file (`scaled_fp8`), and scales of what goes into a layer, are no part of the weights.
    """
    scaled = {name.removesuffix(".scale_weight") for name in tensors if name.endswith(".scale_weight")}
    if not scaled and "scaled_fp8" not in tensors:
        return tensors
    made: dict[str, Tensor] = {}
    for name, value in tensors.items():
        layer, _, last = name.rpartition(".")
        if last in ("scale_weight", "scale_input") or name == "scaled_fp8":
            continue
        made[name] = (
            value.float() * tensors[f"{layer}.scale_weight"].float()
            if (last == "weight" and layer in scaled)
            else value
        )
    return made


def _read_safetensors(path: Path) -> TensorFile:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return TensorFile(path, unscaled(tensors), file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a whole safetensors file ({on_one_line(error)})") from error


def _read_torch(path: Path) -> TensorFile:
    """A file of torch.save, by torch's own reader of nothing but tensors and plain containers."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on protocols of pickle; what is refused is said in a sentence
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # the reader's own error class lives in a module that is never imported here
        raise UserError(unsafe_pickle_error(path, error)) from error
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, Mapping):
        raise UserError(f"{path} holds a {type(loaded).__name__}, not named tensors")
    entries: dict[str, Any] = {str(name): value for name, value in loaded.items()}
    tensors = {name: value.detach() for name, value in entries.items() if isinstance(value, Tensor)}
    return TensorFile(path, tensors, others=tuple(name for name in entries if name not in tensors))
