"""A whole model in one file, as communities share them, through diffusers' own conversion.

diffusers looks its configuration up on the hub; here it is written from what the families know, so that no network is
needed. A folder beside `MODEL.safetensors` that is called `MODEL` and holds a `model_index.json` is taken instead: a
diffusers folder with configurations and tokenizers, and with the weights of components that the file lacks.
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
from typing import Any

import diffusers
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from controlkit.bases.base import Base
from controlkit.bases.component import Component, Configurations
from controlkit.bases.families import configurations_in, family_of_file
from controlkit.bases.weight_files import unsafe_pickle_error
from controlkit.errors import UserError


@dataclass(frozen=True, kw_only=True)
class SingleFile:
    """What is known of a file without its weights."""

    path: Path
    family: type[Base]
    kind: str
    """Which of the family's known models it is one of."""
    configurations: Configurations
    """Of its components."""
    companion: Path | None
    """The folder beside it with configurations and tokenizers of its own."""
    left_out: tuple[str, ...]
    """Optional components that cannot be had."""
    notes: tuple[str, ...]
    """What a person should know."""


def read_single_file(path: Path, parts: Configurations | None = None) -> SingleFile:
    """What a file is, going by the names and shapes in it; no weight is loaded.

    Args:
        parts: the configurations of its components, if not those that the family knows.

    Raises:
        UserError: it is missing, damaged, or not a whole model.
    """
    if not path.is_file():
        raise UserError(f"there is no base at {path}")
    shapes, metadata = _shapes(path)
    family, kind = family_of_file(shapes, str(path))
    folder = path.with_suffix("")
    companion = folder if (folder / "model_index.json").is_file() else None
    notes: list[str] = []
    if companion is not None:
        configurations: Configurations = configurations_in(companion)
    else:
        configurations, told = family.configurations_of_file(parts or family.known[kind], shapes, metadata)
        notes += [f"{path} {note}" for note in told]
    optional = [one for one in family.components if one.optional]
    lacking = [one.name for one in optional if not _is_there(one, family, configurations, companion)]
    if lacking:
        notes.append(
            f"{path}: there is no {' and no '.join(lacking)}, so prompts are read by the other text encoders alone;"
            f" they can lie in a diffusers folder called {folder}, without the weights that the file has"
        )
    return SingleFile(
        path=path,
        family=family,
        kind=kind,
        configurations=configurations,
        companion=companion,
        left_out=tuple(one.name for one in optional) if lacking else (),
        notes=tuple(notes),
    )


def load_single_file(path: Path, dtype: torch.dtype, parts: Configurations | None = None) -> Base:
    """The base in a `.safetensors` or `.ckpt` file of the original layout.

    Args:
        parts: as `read_single_file` takes them.

    Raises:
        UserError: it is damaged, needs more than plain tensors, is not a whole model, or lacks weights.
    """
    found = read_single_file(path, parts)
    for note in found.notes:
        print(note, file=sys.stderr)
    with _config_folder(found) as folder:
        pipeline = _through_diffusers(found, folder, dtype)
    made = {one.name: getattr(pipeline, one.name) for one in found.family.components}
    for component in found.family.components:
        if component.is_network and made[component.name] is not None:
            _check_whole(path, component.name, made[component.name])
    scheduler = made.pop("scheduler")
    base = found.family(name=str(path), scheduler_config=dict(scheduler.config), **made)
    return base.to(dtype=dtype)


def _is_there(component: Component, family: type[Base], configurations: Configurations, companion: Path | None) -> bool:
    if component.is_network:
        return component.name in configurations
    if companion is not None:
        return (companion / component.name).is_dir()
    try:
        return family.tokenizer_for(component, configurations) is not None
    except UserError:
        return False


def _through_diffusers(found: SingleFile, folder: Path, dtype: torch.dtype) -> Any:
    """The pipeline that diffusers reads of a file, with the configurations in `folder`."""
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    path, kind = found.path, found.kind
    options: dict[str, Any] = {"config": str(folder), "local_files_only": True, "torch_dtype": dtype}
    try:
        pipeline = getattr(diffusers, found.family.pipeline)
        return pipeline.from_single_file(str(path), **options, **dict.fromkeys(found.left_out))
    except SingleFileComponentError as error:
        raise UserError(
            f"{path} looks like {kind}, but lacks weights of a part: {' '.join(str(error).split())}"
        ) from error
    except (pickle.UnpicklingError, EOFError) as error:
        raise UserError(f"{path} is damaged, or needs more than plain tensors to be read: {error}") from error
    except NotImplementedError as error:
        # What torch says when a weight that the configuration asks for was never filled in.
        raise UserError(f"{path} looks like {kind}, but lacks some of its weights: it is cut, or another") from error


@contextmanager
def _config_folder(found: SingleFile) -> Iterator[Path]:
    """A diffusers folder without weights: the file's companion, or one that is written for the length of the block."""
    if found.companion is not None:
        yield found.companion
        return
    with tempfile.TemporaryDirectory() as folder:
        write_config(Path(folder), found.family, found.configurations, found.left_out)
        yield Path(folder)


def write_config(
    folder: Path, family: type[Base], configurations: Configurations, left_out: Sequence[str] = ()
) -> None:
    """The configuration files of a diffusers folder, with tokenizers and without weights."""
    components = [one for one in family.components if one.name not in left_out]
    index: dict[str, Any] = {"_class_name": family.pipeline}
    index |= {one.name: [one.library, one.class_name] for one in components}
    index |= {**{name: [None, None] for name in left_out}, **family.index_entries}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    for one in components:
        if one.is_tokenizer:
            family.tokenizer_for(one, configurations).save_pretrained(folder / one.name)
            continue
        config: dict[str, Any] = {"_class_name": one.class_name, **configurations[one.name]}
        if one.library == "transformers":
            config |= {"model_type": one.load_class().config_class.model_type, "architectures": [one.class_name]}
        (folder / one.config_file).parent.mkdir()
        (folder / one.config_file).write_text(json.dumps(config), encoding="utf-8")


def _shapes(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Names and shapes of the tensors of a file, and its metadata, without loading the tensors."""
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty (0 bytes)")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
                return {name: tuple(file.get_slice(name).get_shape()) for name in names}, file.metadata() or {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            held = torch.load(path, map_location="meta", weights_only=True)
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file ({error})") from error
    except Exception as error:  # the reader's own error class lives in a module that is never imported here
        raise UserError(unsafe_pickle_error(path, error)) from error
    held = held.get("state_dict", held) if isinstance(held, dict) else {}
    pairs = held.items() if isinstance(held, dict) else ()
    return {str(name): tuple(value.shape) for name, value in pairs if isinstance(value, torch.Tensor)}, {}


def _check_whole(path: Path, name: str, network: nn.Module) -> None:
    empty = [key for key, value in network.named_parameters() if value.is_meta]
    if empty:
        raise UserError(f"{path} lacks {len(empty)} weights of its {name}, such as {empty[0]}")
