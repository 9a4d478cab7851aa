"""The formats of every system: controlkit's, and diffusers' folder if diffusers has the same network.

controlkit's is one safetensors file with the system's own names and metadata. Files of other tools with the same names
are read too; missing metadata is inferred from shapes.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable
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
    check_names,
    declared_config,
    on_one_line,
)
from controlkit.controls.registry import find
from controlkit.errors import UserError

_CONFIG, _WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"


def _read(kind: type[Control], file: TensorFile, reference: Reference, description: str) -> Checkpoint:
    """A file with the system's own names."""
    is_declared = "control.kind" in file.metadata
    declared = f"the {kind.kind} that its metadata declares"
    try:
        config = _declared_config(kind, file) if is_declared else kind.config_of(file.tensors, reference.unet_config)
        expected = kind.shapes(config)
    except CONFIG_ERRORS as error:
        problem = (
            f"is not {declared}: {on_one_line(error)}"
            if is_declared
            else f"looks like {description}, but {on_one_line(error)}"
        )
        raise UserError(f"{file.path} {problem}", "damaged-file") from error
    try:
        check_names(file.path, kind.title if is_declared else description, expected, file.tensors, file.others)
    except UserError as error:
        if not is_declared:
            raise
        message = str(error).partition(" looks ")[2]
        raise UserError(f"{file.path} is not {declared}: it looks {message}", error.code) from error
    return Checkpoint(kind.kind, config, dict(file.tensors), dict(file.metadata), path=file.path)


def _declared_config(kind: type[Control], file: TensorFile) -> dict[str, Any]:
    config = declared_config(file.metadata)
    if config is None:
        raise ValueError(f"the config is not a mapping but {file.metadata.get('control.config')!r}")
    if "rank" not in config and "control.rank" in file.metadata:
        config["rank"] = int(file.metadata["control.rank"])
    return config


def _write(checkpoint: Checkpoint, reference: Reference) -> Written:
    require_settings(checkpoint)
    return Written(tensors=checkpoint.tensors)


def _read_diffusers(kind: type[Control], file: TensorFile, reference: Reference, description: str) -> Checkpoint:
    """A diffusers folder, with the system's own names. Settings that diffusers' class lacks are in the metadata."""
    config = {key: value for key, value in file.config.items() if not key.startswith("_")}
    if file.metadata.get("control.kind") == kind.kind:
        known = _settings_of(_diffusers_network(kind))
        declared = declared_config(file.metadata) or {}
        config = {**{key: value for key, value in declared.items() if key not in known}, **config}
    try:
        expected = kind.shapes(config)
    except CONFIG_ERRORS as error:
        what = f"the {kind.diffusers_class} that its config declares"
        raise UserError(f"{file.path} is not {what}: {on_one_line(error)}", "damaged-file") from error
    check_names(file.path, kind.title, expected, file.tensors, file.others)
    return Checkpoint(kind.kind, config, dict(file.tensors), dict(file.metadata), path=file.path)


def _write_diffusers(checkpoint: Checkpoint, reference: Reference) -> Written:
    require_settings(checkpoint)
    kind = find(checkpoint.kind)
    network = _diffusers_network(kind)
    known = _settings_of(network)
    config = {key: value for key, value in checkpoint.config.items() if key in known}
    notes = []
    if other_settings := sorted(set(checkpoint.config) - set(config)):
        _require_shapes(kind, checkpoint, config, other_settings)
        notes.append(
            f"diffusers' {network.__name__} lacks its settings {_values(checkpoint, other_settings)}; only controlkit"
            " reads them, from the metadata of the weights"
        )
    header = {"_class_name": network.__name__, "_diffusers_version": diffusers.__version__}
    return Written(tensors=checkpoint.tensors, configs={_CONFIG: {**header, **config}}, notes=notes)


def _diffusers_network(kind: type[Control]) -> Any:
    """diffusers' class of the system's network."""
    return getattr(diffusers, kind.diffusers_class or "")


def _settings_of(network: Any) -> Collection[str]:
    """Names of the settings of a network of diffusers."""
    return inspect.signature(network.__init__).parameters.keys()


def _values(checkpoint: Checkpoint, names: Iterable[str]) -> str:
    return ", ".join(f"{name} {checkpoint.config[name]}" for name in names)


def _require_shapes(
    kind: type[Control], checkpoint: Checkpoint, config: dict[str, Any], other_settings: list[str]
) -> None:
    """Refuse a network that diffusers' class would build in another shape, as it knows no such settings.

    Args:
        config: what of the checkpoint's config diffusers' class takes.
        other_settings: names of those that it lacks.
    """
    if kind.shapes(config) != kind.shapes(checkpoint.config):
        raise UserError(
            f"{checkpoint.path} cannot be written as diffusers' folder: diffusers' {kind.diffusers_class}"
            f" lacks its settings {_values(checkpoint, other_settings)}; write it as {NATIVE.name}",
            "unsupported",
        )


NATIVE = FileFormat(name="controlkit", description="one safetensors file with metadata", read=_read, write=_write)
DIFFUSERS = FileFormat(
    name="diffusers",
    description="diffusers' folder (config.json and diffusion_pytorch_model.safetensors)",
    read=_read_diffusers,
    write=_write_diffusers,
    files=(_CONFIG, _WEIGHTS),
)


def formats_of(kind: type[Control]) -> dict[str, FileFormat]:
    """Name -> format, of every format of a system."""
    ours = [NATIVE, *([DIFFUSERS] if kind.diffusers_class is not None else [])]
    return {one.name: one for one in (*ours, *kind.formats)}


def require_settings(checkpoint: Checkpoint) -> None:
    """Check that no setting of a checkpoint is missing.

    Raises:
        UserError: one is; the message says how to pass it.
    """
    if (missing := find(checkpoint.kind).missing_setting(checkpoint.config)) is not None:
        raise UserError(
            f"{checkpoint.path} does not record {missing}, and its shapes match no known base; pass the base"
            " that it was made for (--base)",
            "missing-setting",
        )
