"""Single-file models in the original format, loaded with diffusers' own conversion.

diffusers would look the configuration up on the hub; here it is written from what the families know, so no network is
needed. A diffusers folder `MODEL` (with a `model_index.json`) beside `MODEL.safetensors` is used instead if it exists:
its configurations and tokenizers, and the weights of components that the file lacks.
"""

from __future__ import annotations

import json
import pickle  # noqa: TID251, for the name of the error that torch raises
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from controlkit.bases.base import Base
from controlkit.bases.component import Component, Configurations
from controlkit.bases.families import check_configurations, configurations_in, family_of_file
from controlkit.bases.folders import defaults_of, load_network, load_tokenizer
from controlkit.bases.scaled_weights import scaled_in, unscaled
from controlkit.bases.weight_files import torch_load_error, weight_files
from controlkit.errors import UserError


@dataclass(frozen=True, kw_only=True)
class SingleFile:
    """A single-file model without its weights."""

    path: Path
    family: type[Base]
    kind: str
    """Name of the known model that it matches."""
    configurations: Configurations
    """Component -> configuration."""
    companion: Path | None
    """The diffusers folder beside the file, if there is one."""
    beside: tuple[str, ...]
    """Networks that the file lacks and whose weights are in `companion`."""
    is_denoiser: bool
    """Whether the file holds the denoiser alone."""
    left_out: tuple[str, ...]
    """Optional components that are not available."""
    notes: tuple[str, ...]
    """Notes for the user."""


def read_single_file(path: Path, parts: Configurations | None = None) -> SingleFile:
    """Identify a single file by the names and shapes of its tensors, without loading weights.

    Args:
        parts: configurations of its components; default: those that the family knows.

    Raises:
        UserError: it is missing, damaged, or not a complete model.
    """
    if not path.is_file():
        raise UserError(f"there is no base at {path}", "missing-file")
    shapes, metadata = _read_shapes(path)
    family, kind = family_of_file(shapes, str(path))
    folder = path.with_suffix("")
    companion = folder if (folder / "model_index.json").is_file() else None
    notes: list[str] = []
    in_file, file_notes = family.configurations_of_file(parts or family.known[kind], shapes, metadata)
    configurations, beside = in_file, list[str]()
    is_denoiser = {name for name in in_file if name != "scheduler"} == {family.denoiser_component().name}
    if (scale := scaled_in(shapes)) is not None and not is_denoiser:
        raise UserError(
            f"{path} is a whole model with scaled float8 weights ({scale}), which are read of controls, and of files of"
            " a transformer alone; use the float16 file of the model",
            "unsupported",
        )
    lacking = [part for part in family.components if part.is_network and part.name not in in_file]
    if companion is not None:
        configurations = configurations_in(companion)
        beside = [part.name for part in lacking if weight_files(companion / part.name) is not None]
        _check_settings(path, family, shapes, companion, configurations)
    else:
        notes += [f"{path} {note}" for note in file_notes]
    if needed := [part.name for part in lacking if not part.optional and part.name not in beside]:
        raise UserError(
            f"{path} holds {' and '.join(name for name in in_file if name != 'scheduler')} of {kind} alone; put"
            f" {', '.join(needed)}, the tokenizers and model_index.json into a diffusers folder {folder}",
            "missing-file",
        )
    optional = [component for component in family.components if component.optional]
    missing = [part.name for part in optional if not _is_available(part, family, configurations, companion)]
    if missing:
        notes.append(
            f"{path} lacks {' and '.join(missing)}, so only the other text encoders read the prompt; to add them, put"
            f" them into a diffusers folder {folder} (weights that the file has are not needed there)"
        )
    return SingleFile(
        path=path,
        family=family,
        kind=kind,
        configurations=configurations,
        companion=companion,
        beside=tuple(beside),
        is_denoiser=is_denoiser,
        left_out=tuple(component.name for component in optional) if missing else (),
        notes=tuple(notes),
    )


def _check_settings(
    path: Path, family: type[Base], shapes: dict[str, tuple[int, ...]], folder: Path, configurations: Configurations
) -> None:
    """Check that the folder beside a file is of its model.

    Raises:
        UserError: the configuration of the denoiser says otherwise than the file.
    """
    component = family.denoiser_component()
    said = configurations.get(component.name, {})
    for name, value in family.settings_of_file(shapes).items():
        if said.get(name, value) != value:
            raise UserError(
                f"{folder / component.config_file} says {name} {said[name]}, but in {path} it is {value}; use the"
                " folder of the model that the file was made from",
                "contradiction",
            )


def load_single_file(path: Path, dtype: torch.dtype, parts: Configurations | None = None) -> Base:
    """Load the base in a `.safetensors` or `.ckpt` file of the original format.

    Args:
        parts: as in `read_single_file`.

    Raises:
        UserError: it is damaged, contains more than tensors, is not a complete model, or lacks weights.
    """
    file = read_single_file(path, parts)
    check_configurations(file.configurations, str(path))
    for note in file.notes:
        print(note, file=sys.stderr)
    with _config_folder(file) as folder:
        pipeline = _load_pipeline(file, folder, dtype)
    components = {component.name: getattr(pipeline, component.name) for component in file.family.components}
    for component in file.family.components:
        if component.is_network and components[component.name] is not None:
            _check_complete(path, component.name, components[component.name])
    scheduler = components.pop("scheduler")
    if file.companion is not None:
        components |= {"defaults": defaults_of(file.companion), **file.family.settings_in(file.companion)}
    base = file.family(name=str(path), scheduler_config=dict(scheduler.config), **components)
    return base.to(dtype=dtype)


def _is_available(
    component: Component, family: type[Base], configurations: Configurations, companion: Path | None
) -> bool:
    if component.is_network:
        return component.name in configurations
    if companion is not None:
        return (companion / component.name).is_dir()
    try:
        return family.tokenizer_for(component, configurations) is not None
    except UserError:
        return False


def _load_pipeline(file: SingleFile, folder: Path, dtype: torch.dtype) -> Any:
    """diffusers' pipeline from the file, with the configurations in `folder`."""
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    path, kind = file.path, file.kind
    options: dict[str, Any] = {"config": str(folder), "local_files_only": True, "torch_dtype": dtype}
    for component in file.family.components:
        # diffusers looks for them in the folder, too, but not under the names that transformers gives its files.
        if component.name in file.beside:
            options[component.name] = load_network(component, folder / component.name, dtype)
    try:
        if file.is_denoiser:
            return _parts_of_folder(file, folder, options)
        pipeline = getattr(diffusers, file.family.pipeline)
        return pipeline.from_single_file(str(path), **options, **dict.fromkeys(file.left_out))
    except SingleFileComponentError as error:
        raise UserError(
            f"{path} looks like {kind} but lacks the weights of a component: {' '.join(str(error).split())}",
            "damaged-file",
        ) from error
    except (pickle.UnpicklingError, EOFError) as error:
        raise UserError(f"{path} is damaged, or a pickle of more than tensors: {error}", "damaged-file") from error
    except NotImplementedError as error:
        # torch raises this for a parameter that is still on the meta device.
        raise UserError(
            f"{path} looks like {kind} but lacks some of its weights: it is truncated or another model", "damaged-file"
        ) from error


def _parts_of_folder(file: SingleFile, folder: Path, options: dict[str, Any]) -> SimpleNamespace:
    """As `_load_pipeline`, of a file of the denoiser alone: the other components of `options` and `folder`."""
    denoiser = file.family.denoiser_component()
    settings = {name: options[name] for name in ("config", "local_files_only", "torch_dtype")}
    source: Any = str(file.path)
    if file.path.suffix == ".safetensors":
        tensors = load_file(file.path)
        source = unscaled(tensors, options["torch_dtype"]) if scaled_in(tensors) else source
    parts = {denoiser.name: denoiser.load_class().from_single_file(source, subfolder=denoiser.name, **settings)}
    for component in file.family.components:
        if component.is_tokenizer:
            parts[component.name] = load_tokenizer(component, folder, str(folder))
        elif component.is_scheduler:
            parts[component.name] = component.load_class().from_pretrained(folder / component.name)
    return SimpleNamespace(**{**options, **parts})


@contextmanager
def _config_folder(file: SingleFile) -> Iterator[Path]:
    """A diffusers folder without weights: the file's companion, or a temporary one."""
    if file.companion is not None:
        yield file.companion
        return
    with tempfile.TemporaryDirectory() as folder:
        write_config(Path(folder), file.family, file.configurations, file.left_out)
        yield Path(folder)


def write_config(
    folder: Path, family: type[Base], configurations: Configurations, left_out: Sequence[str] = ()
) -> None:
    """Write the configuration files and tokenizers of a diffusers folder, without weights."""
    components = [component for component in family.components if component.name not in left_out]
    index: dict[str, Any] = {"_class_name": family.pipeline}
    index |= {component.name: [component.library, component.class_name] for component in components}
    index |= {**{name: [None, None] for name in left_out}, **family.index_entries}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    for component in components:
        if component.is_tokenizer:
            family.tokenizer_for(component, configurations).save_pretrained(folder / component.name)
            continue
        config: dict[str, Any] = {"_class_name": component.class_name, **configurations[component.name]}
        if component.library == "transformers":
            config |= {
                "model_type": component.load_class().config_class.model_type,
                "architectures": [component.class_name],
            }
        (folder / component.config_file).parent.mkdir()
        (folder / component.config_file).write_text(json.dumps(config), encoding="utf-8")


def _read_shapes(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Names and shapes of the tensors of a file, and its metadata, without loading the tensors."""
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty (0 bytes)", "damaged-file")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
                return {name: tuple(file.get_slice(name).get_shape()) for name in names}, file.metadata() or {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="meta", weights_only=True)
    except SafetensorError as error:
        raise UserError(f"{path} is not a complete safetensors file ({error})", "damaged-file") from error
    except Exception as error:  # torch raises pickle's errors, of a module that is not imported here
        raise torch_load_error(path, error) from error
    content = content.get("state_dict", content) if isinstance(content, dict) else {}
    pairs = content.items() if isinstance(content, dict) else ()
    return {str(name): tuple(value.shape) for name, value in pairs if isinstance(value, torch.Tensor)}, {}


def _check_complete(path: Path, name: str, network: nn.Module) -> None:
    missing = [key for key, value in network.named_parameters() if value.is_meta]
    if missing:
        raise UserError(f"{path} lacks {len(missing)} weights of its {name}, such as {missing[0]}", "damaged-file")
