"""What a file or folder is: by its metadata, then by the names and shapes in it, never by its own name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from controlkit.bases.weight_files import weight_files
from controlkit.controls.control import Control
from controlkit.controls.file_format import FileFormat, TensorFile
from controlkit.controls.registry import registry
from controlkit.errors import UserError
from controlkit.files import read_json
from controlkit.formats.foreign import CLASSES, relative, seems
from controlkit.formats.native import DIFFUSERS, NATIVE
from controlkit.formats.tensors import read_tensor_file


@dataclass(frozen=True)
class Detected:
    """What is at a path, and what it was taken for."""

    path: Path
    control: type[Control] | None
    """Its system; None if it is no control that is read."""
    format: FileFormat | None
    """How it is read; None if it is not."""
    says: str
    """What it seems to be, in a few words."""
    file: TensorFile

    @property
    def kind(self) -> str | None:
        """Of the system, as `control.kind` has it."""
        return None if self.control is None else self.control.kind

    @property
    def layout(self) -> str | None:
        """Name of the format."""
        return None if self.format is None else self.format.name


def detect(path: str | Path) -> Detected:
    """Say what a file or folder is. Tensors are mapped, not copied.

    Raises:
        UserError: it cannot be read at all: empty, torn, no file of tensors, a pickle of more than tensors, or a
            folder without a model.
    """
    path = Path(path)
    if path.is_dir():
        return _detect_folder(path)
    file = read_tensor_file(path)
    control, found, says = _classify(file)
    return Detected(path, control, found, says, file)


def known(detected: Detected) -> Detected:
    """The same, if it is a control that is read.

    Raises:
        UserError: it is something else; the message says what it seems to be.
    """
    if detected.control is None or detected.format is None:
        raise UserError(f"{detected.path} is not a control that can be read; it seems to be {detected.says}")
    return detected


def _classify(file: TensorFile) -> tuple[type[Control] | None, FileFormat | None, str]:
    """System, format and words. The format follows from the names; metadata decides between systems of like names."""
    systems = registry()
    said = file.metadata.get("control.kind")
    if said is not None and said not in systems:
        return None, None, f"a control of kind {said!r}, which this version does not know"
    if (says := relative(file.tensors)) is not None:
        return None, None, says
    candidates = [systems[said]] if said is not None else list(systems.values())
    for control, found, words in _matches(candidates, file):
        return control, found, words
    if said is None:
        for control in candidates:
            if control.is_native(file.tensors):
                return control, NATIVE, f"{control.title} under its own names"
        return None, None, seems(file.tensors, file.others)
    control = systems[said]
    return (
        control,
        NATIVE,
        f"{control.title} under diffusers' names" if control.is_native(file.tensors) else control.title,
    )


def _matches(controls: list[type[Control]], file: TensorFile) -> Iterator[tuple[type[Control], FileFormat, str]]:
    for control in controls:
        for one in control.formats:
            if one.detect is not None and not one.files and (words := one.detect(file)) is not None:
                yield control, one, words


def _detect_folder(path: Path) -> Detected:
    nothing = TensorFile(path, {})
    systems = registry()
    for control in systems.values():
        for one in control.formats:
            if one.files and one.detect is not None and (path / one.files[0]).is_file():
                config = _mapping(path / one.files[0])
                file = replace(_weights(path, Path(one.files[-1]).stem), config=config)
                if (words := one.detect(file)) is not None:
                    return Detected(path, control, one, words, file)
    if (path / "adapter_config.json").is_file():
        return Detected(path, None, None, "a PEFT adapter of another network", nothing)
    if (path / "model_index.json").is_file() or (path / "unet").is_dir():
        return Detected(path, None, None, "diffusers' folder of a whole base, not of a control", nothing)
    if not (path / "config.json").is_file():
        weights = next(path.glob("*.safetensors"), None)
        instead = f"; {weights.name} in it may be a control by itself: give that file" if weights else ""
        raise UserError(f"{path} is not a diffusers folder of a control, nor PEFT's: it has no config.json{instead}")
    config = _mapping(path / "config.json")
    name = str(config.get("_class_name", "model of no class"))
    owner = next((one for one in systems.values() if one.diffusers_class == name), None)
    if owner is None:
        return Detected(path, None, None, CLASSES.get(name, f"a {name}"), replace(nothing, config=config))
    file = replace(_weights(path, "diffusion_pytorch_model"), config=config)
    return Detected(path, owner, DIFFUSERS, f"{owner.title} as diffusers' folder ({name})", file)


def _weights(folder: Path, stem: str) -> TensorFile:
    """The weights of a folder, in one file or in several of an index, of whatever precision."""
    found = weight_files(folder, stem)
    if found is None:
        raise UserError(f"{folder} has a config, but no weights: {stem}.safetensors is missing")
    if len(found.files) == 1:
        return replace(read_tensor_file(found.files[0]), path=folder)
    tensors: dict[str, Tensor] = {}
    for part in found.files:
        tensors |= read_tensor_file(part).tensors
    return TensorFile(folder, tensors)


def _mapping(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path} is not the config of a network: expected a mapping")
    return value
