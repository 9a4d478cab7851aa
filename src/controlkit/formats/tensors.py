"""Read files of tensors in any container: safetensors, or `torch.save` files with `weights_only`."""

from __future__ import annotations

import warnings
import zipfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from controlkit.bases.scaled_weights import unscaled
from controlkit.bases.weight_files import torch_load_error
from controlkit.controls.file_format import TensorFile, listed, on_one_line
from controlkit.errors import UserError

_LARGEST_HEADER = 100_000_000
"""Maximum size of a safetensors header in bytes, as in safetensors itself."""

_OTHER_FILES = (
    (
        b"version https://git-lfs",
        "is a Git LFS pointer, not the file itself; download the file (git lfs pull)",
    ),
    (b"<!doctype html", "is a web page, not a file of tensors; download the file itself"),
    (b"<html", "is a web page, not a file of tensors; download the file itself"),
    (b"\x89png", "is an image, not a file of tensors"),
    (b"\xff\xd8\xff", "is an image, not a file of tensors"),
    (b"gguf", "is a GGUF file, which no control uses"),
)


class _Ignored:
    """In place of settings in a pickle: keeps nothing and runs nothing."""

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _ignored(name: str) -> type[_Ignored]:
    """A class that a pickle finds under this import path."""
    module, _, qualname = name.rpartition(".")
    return type(qualname, (_Ignored,), {"__module__": module, "__qualname__": qualname})


_SETTINGS: list[Any] = [
    *map(
        _ignored,
        (
            "typing.Any",
            *("omegaconf.base.ContainerMetadata", "omegaconf.base.Metadata"),
            *("omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig"),
            *(f"omegaconf.nodes.{kind}Node" for kind in ("Any", "Boolean", "Float", "Integer", "String")),
        ),
    ),
    *(defaultdict, dict, list, int),
]
"""Globals of training settings by OmegaConf, which some files have beside the weights."""


def read_tensor_file(path: str | Path, *, scaled: bool = False) -> TensorFile:
    """Read a file of tensors; its first bytes determine the container, not its name.

    A dictionary that wraps the weights as `state_dict`, as Lightning's do, is unwrapped; or as `model`, among other
    entries that are no tensors, which keep their names in `others`.

    Args:
        scaled: whether float8 weights stay apart from their scales, for `unscaled` of all shards together.

    Raises:
        UserError: it is empty, truncated, not a file of tensors, or a pickle of more than tensors.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            head = stream.read(64)
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}",
            "missing-file" if isinstance(error, FileNotFoundError) else "unreadable-file",
        ) from error
    if size == 0:
        raise UserError(f"{path} is empty (0 bytes)", "damaged-file")
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _LARGEST_HEADER:
        return _read_safetensors(path, scaled=scaled)
    for start, description in _OTHER_FILES:
        if head.lower().lstrip().startswith(start):
            raise UserError(f"{path} {description}", "wrong-kind")
    if head[:2] == b"PK" or head[:1] == b"\x80":
        return _read_torch(path)
    raise UserError(f"{path} is not a complete safetensors file, nor one of torch.save", "damaged-file")


def _read_safetensors(path: Path, *, scaled: bool) -> TensorFile:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a complete safetensors file ({on_one_line(error)})", "damaged-file") from error
    return TensorFile(path, tensors if scaled else unscaled(tensors), metadata)


def _read_torch(path: Path) -> TensorFile:
    """A `torch.save` file, loaded with `weights_only`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; refusals become errors below
            with torch.serialization.safe_globals(_SETTINGS):
                loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises pickle's errors, of a module that is not imported here
        raise torch_load_error(path, error) from error
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, Mapping):
        raise UserError(f"{path} contains a {type(loaded).__name__}, not named tensors", "wrong-kind")
    entries: dict[str, Any] = {str(name): value for name, value in loaded.items()}
    model = entries.get("model")
    if isinstance(model, Mapping) and not any(isinstance(value, Tensor) for value in entries.values()):
        del entries["model"]
        entries = {str(name): value for name, value in model.items()} | entries
    tensors = {name: value.detach() for name, value in entries.items() if isinstance(value, Tensor)}
    if empty := [name for name, value in tensors.items() if value.is_meta]:
        raise UserError(
            f"{path} has no values for {listed(empty)} (saved on the device meta); save the loaded weights",
            "damaged-file",
        )
    return TensorFile(path, tensors, others=tuple(name for name in entries if name not in tensors))
