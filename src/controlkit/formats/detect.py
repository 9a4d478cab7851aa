"""Detect what a file or folder is: from its metadata, then from names and shapes, never from its file name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from controlkit.bases.scaled_weights import unscaled
from controlkit.bases.weight_files import weight_files
from controlkit.controls.control import Control
from controlkit.controls.file_format import FileFormat, TensorFile
from controlkit.controls.registry import registry
from controlkit.errors import UserError
from controlkit.files import read_json
from controlkit.formats.foreign import CLASSES, identify, unsupported_control
from controlkit.formats.native import DIFFUSERS, NATIVE
from controlkit.formats.tensors import read_tensor_file


@dataclass(frozen=True)
class Detected:
    """What is at a path."""

    path: Path
    control: type[Control] | None
    """Its system; None if it is not a supported control."""
    format: FileFormat | None
    """Its format; None if it is not supported."""
    description: str
    """In a few words."""
    file: TensorFile

    @property
    def kind(self) -> str | None:
        """Kind of the system (`control.kind`)."""
        return None if self.control is None else self.control.kind

    @property
    def format_name(self) -> str | None:
        """Name of the format."""
        return None if self.format is None else self.format.name


def detect(path: str | Path, kind: str | None = None) -> Detected:
    """Detect what a file or folder is. Tensors are memory-mapped, not copied.

    Args:
        kind: of the control to look for in a file that may contain several; None is the first.

    Raises:
        UserError: it cannot be read: empty, truncated, not a file of tensors, a pickle of more than tensors, or a
            folder without a model.
    """
    path = Path(path)
    if path.is_dir():
        return _detect_folder(path)
    file = read_tensor_file(path)
    control, file_format, description = _classify(file, kind)
    return Detected(path, control, file_format, description, file)


def known(detected: Detected) -> Detected:
    """`detected`, if it is a supported control.

    Raises:
        UserError: it is something else.
    """
    if detected.control is None or detected.format is None:
        raise UserError(
            f"{detected.path} is not a supported control; it appears to be {detected.description}", "wrong-kind"
        )
    return detected


def _classify(file: TensorFile, wanted: str | None) -> tuple[type[Control] | None, FileFormat | None, str]:
    """System, format and description. Names determine the format; metadata decides between systems with the same
    names."""
    systems = registry()
    kind = file.metadata.get("control.kind")
    if wanted is not None and kind is None:
        systems = {name: system for name, system in systems.items() if name == wanted}
    if kind is not None and kind not in systems:
        return None, None, f"a control of kind {kind!r}, unknown to this version"
    if (description := unsupported_control(file.tensors)) is not None:
        return None, None, description
    candidates = [systems[kind]] if kind is not None else list(systems.values())
    for control, file_format, words in _matches(candidates, file):
        return control, file_format, words
    if kind is None:
        for control in candidates:
            if control.is_native(file.tensors):
                return control, NATIVE, f"{control.title} with its own names"
        return None, None, identify(file.tensors, file.others)
    control = systems[kind]
    return (
        control,
        NATIVE,
        f"{control.title} with diffusers' names" if control.is_native(file.tensors) else control.title,
    )


def _matches(controls: list[type[Control]], file: TensorFile) -> Iterator[tuple[type[Control], FileFormat, str]]:
    for control in controls:
        for one in control.formats:
            if one.detect is not None and not one.files and (words := one.detect(file)) is not None:
                yield control, one, words


def _detect_folder(path: Path) -> Detected:
    no_tensors = TensorFile(path, {})
    systems = registry()
    for control in systems.values():
        for one in control.formats:
            if one.files and one.detect is not None and (path / one.files[0]).is_file():
                config = _read_config(path / one.files[0])
                if one.of_config is not None and not one.of_config(config):
                    continue
                file = replace(_weights(path, Path(one.files[-1]).stem), config=config)
                if (words := one.detect(file)) is not None:
                    return Detected(path, control, one, words, file)
    if (path / "adapter_config.json").is_file():
        return Detected(path, None, None, "a PEFT adapter of another network", no_tensors)
    if (path / "model_index.json").is_file() or (path / "unet").is_dir():
        return Detected(path, None, None, "a base (diffusers folder), not a control", no_tensors)
    if not (path / "config.json").is_file():
        weights = next(path.glob("*.safetensors"), None)
        hint = f"; {weights.name} in it may be a control: pass that file" if weights else ""
        raise UserError(
            f"the folder {path} is neither diffusers' nor PEFT's folder of a control: it has no config.json{hint}",
            "wrong-kind",
        )
    config = _read_config(path / "config.json")
    name = str(config.get("_class_name", "model of no class"))
    system = next((one for one in systems.values() if one.diffusers_class == name), None)
    if system is None:
        return Detected(path, None, None, CLASSES.get(name, f"a {name}"), replace(no_tensors, config=config))
    file = replace(_weights(path, "diffusion_pytorch_model"), config=config)
    return Detected(path, system, DIFFUSERS, f"{system.title} as diffusers' folder ({name})", file)


def _weights(folder: Path, stem: str) -> TensorFile:
    """The weights of a folder, single or sharded, of any precision."""
    weights = weight_files(folder, stem)
    if weights is None:
        raise UserError(f"{folder} has a config but no weights: {stem}.safetensors is missing", "missing-file")
    if len(weights.files) == 1:
        return replace(read_tensor_file(weights.files[0]), path=folder)
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for shard in weights.files:
        part = read_tensor_file(shard, scaled=True)
        if twice := sorted(tensors.keys() & part.tensors.keys()):
            raise UserError(f"{twice[0]} is in {shard} and in another shard of {folder}", "damaged-file")
        tensors |= part.tensors
        metadata = {**part.metadata, **metadata}
    return TensorFile(folder, unscaled(tensors), metadata)


def _read_config(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path} is not the config of a network: expected a JSON object", "damaged-file")
    return value
