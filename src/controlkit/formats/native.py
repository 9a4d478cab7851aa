"""The two formats that every system has: ours, and diffusers' folder where diffusers has the same network.

Ours is one safetensors file under the system's own names, with metadata that says what it is. A file of another tool in
the same names is read too; what the metadata does not say then follows from its shapes.
"""

from __future__ import annotations

import inspect
from typing import Any

import diffusers

from controlkit.controls.control import Control
from controlkit.controls.file_format import (
    CONFIG_ERRORS,
    Checkpoint,
    FileFormat,
    Reference,
    TensorFile,
    Written,
    announced_config,
    check_names,
    on_one_line,
)
from controlkit.controls.registry import find
from controlkit.errors import UserError

_CONFIG, _WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"


def _read(kind: type[Control], file: TensorFile, reference: Reference, says: str) -> Checkpoint:
    """A file under the system's own names."""
    said = "control.kind" in file.metadata
    what = f"the {kind.kind} that its metadata announces"
    try:
        config = _announced(kind, file) if said else kind.config_of(file.tensors, reference.unet_config)
        expected = kind.shapes(config)
    except CONFIG_ERRORS as error:
        reason = (
            f"does not hold {what}: {on_one_line(error)}" if said else f"looks like {says}, but {on_one_line(error)}"
        )
        raise UserError(f"{file.path} {reason}") from error
    try:
        check_names(file.path, kind.title if said else says, expected, file.tensors, file.others)
    except UserError as error:
        if not said:
            raise
        raise UserError(f"{file.path} does not hold {what}: it looks {str(error).partition(' looks ')[2]}") from error
    return Checkpoint(kind.kind, config, dict(file.tensors), dict(file.metadata), path=file.path)


def _announced(kind: type[Control], file: TensorFile) -> dict[str, Any]:
    config = announced_config(file.metadata)
    if config is None:
        raise ValueError(f"the config is not a mapping but {file.metadata.get('control.config')!r}")
    if "rank" not in config and "control.rank" in file.metadata:
        config["rank"] = int(file.metadata["control.rank"])
    return config


def _write(checkpoint: Checkpoint, reference: Reference) -> Written:
    require_settings(checkpoint)
    return Written(tensors=checkpoint.tensors)


def _read_diffusers(kind: type[Control], file: TensorFile, reference: Reference, says: str) -> Checkpoint:
    """A folder of diffusers: the names are the system's own."""
    config = {key: value for key, value in file.config.items() if not key.startswith("_")}
    try:
        expected = kind.shapes(config)
    except CONFIG_ERRORS as error:
        what = f"the {kind.diffusers_class} that its config announces"
        raise UserError(f"{file.path} does not hold {what}: {on_one_line(error)}") from error
    check_names(file.path, kind.title, expected, file.tensors, file.others)
    return Checkpoint(kind.kind, config, dict(file.tensors), dict(file.metadata), path=file.path)


def _write_diffusers(checkpoint: Checkpoint, reference: Reference) -> Written:
    require_settings(checkpoint)
    kind = find(checkpoint.kind)
    network = getattr(diffusers, kind.diffusers_class or "")
    taken = inspect.signature(network.__init__).parameters
    config = {key: value for key, value in checkpoint.config.items() if key in taken}
    if own := sorted(set(checkpoint.config) - set(config)):
        _require_shapes(kind, checkpoint, config, own)
    head = {"_class_name": network.__name__, "_diffusers_version": diffusers.__version__}
    return Written(tensors=checkpoint.tensors, configs={_CONFIG: {**head, **config}})


def _require_shapes(kind: type[Control], checkpoint: Checkpoint, config: dict[str, Any], own: list[str]) -> None:
    """Refuse a network that diffusers' class would build in another shape, as it knows no such settings.

    Args:
        config: what of the checkpoint's config diffusers' class takes.
        own: the names of the other settings.
    """
    if kind.shapes(config) != kind.shapes(checkpoint.config):
        said = ", ".join(f"{name} {checkpoint.config[name]}" for name in own)
        raise UserError(
            f"{checkpoint.path} cannot be written as diffusers' folder: its network differs from those of diffusers'"
            f" {kind.diffusers_class} by a setting that it does not have ({said}); write it as {NATIVE.name}"
        )


NATIVE = FileFormat(name="controlkit", says="one safetensors file with metadata, ours", read=_read, write=_write)
DIFFUSERS = FileFormat(
    name="diffusers",
    says="diffusers' folder (config.json and diffusion_pytorch_model.safetensors)",
    read=_read_diffusers,
    write=_write_diffusers,
    files=(_CONFIG, _WEIGHTS),
)


def formats_of(kind: type[Control]) -> dict[str, FileFormat]:
    """Name -> format, of every format that files of a system may have."""
    ours = [NATIVE, *([DIFFUSERS] if kind.diffusers_class is not None else [])]
    return {one.name: one for one in (*ours, *kind.formats)}


def require_settings(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint with a setting that nothing tells.

    Raises:
        UserError: says how to tell it.
    """
    if (missing := find(checkpoint.kind).missing_setting(checkpoint.config)) is not None:
        raise UserError(
            f"{checkpoint.path} does not say {missing}, and its shapes are of no base that is known; give the base that"
            " it was made for (--base)"
        )
