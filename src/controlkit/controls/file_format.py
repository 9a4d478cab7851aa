"""File formats of controls as data: detection, and key mapping in both directions.

Each system lists the formats of other tools that contain it (`Control.formats`). Reading maps named tensors to a
`Checkpoint` with the system's own names, writing maps it back; neither opens a file, which `controlkit.formats` does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from controlkit.errors import UserError

if TYPE_CHECKING:
    from controlkit.controls.control import Control

CONFIG_ERRORS = (KeyError, ValueError, TypeError, AttributeError, IndexError, RuntimeError, ZeroDivisionError)
"""Errors of building a network from an invalid config."""


@dataclass(frozen=True)
class TensorFile:
    """Content of a file. Tensors are memory-mapped where the container allows it."""

    path: Path
    tensors: dict[str, Tensor]
    """With the names and dtypes of the file."""
    metadata: dict[str, str] = field(default_factory=dict)
    """Of safetensors; other containers have none."""
    others: tuple[str, ...] = ()
    """Names of entries that are not tensors."""
    config: dict[str, Any] = field(default_factory=dict)
    """JSON config of a folder."""


@dataclass
class Checkpoint:
    """A control, or part of one, as tensors with its system's own names: what is read from and written to files."""

    kind: str
    config: dict[str, Any]
    """Config from which the system builds the network."""
    tensors: dict[str, Tensor]
    """In the dtypes of the file."""
    metadata: dict[str, str] = field(default_factory=dict)
    """All metadata of the file."""
    leftover: dict[str, Tensor] = field(default_factory=dict)
    """Tensors of the file that do not belong to the control, with the file's names; few formats can store them."""
    notes: list[str] = field(default_factory=list)
    """Notes for the user: what was found or dropped."""
    companion: Checkpoint | None = None
    """The companion, if the same file contains it or it was passed."""
    path: Path | None = None
    """File or folder that it was read from."""

    @property
    def condition(self) -> str | None:
        """Name of the condition that it was trained on, if the file records it."""
        return self.metadata.get("control.condition") or None

    @property
    def parameters(self) -> int:
        """Total number of elements of its tensors."""
        return sum(value.numel() for value in self.tensors.values())

    def float_tensors(self) -> dict[str, Tensor]:
        """Its tensors, floating-point ones as float32."""
        return as_float32(self.tensors)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What reading or writing a format may need besides the file."""

    unet_config: Mapping[str, Any] | None = None
    """Config of the base's UNet, for settings that shapes do not determine."""
    unet: Callable[[], Mapping[str, Tensor]] | None = None
    """Loads the weights of the base's UNet with diffusers' names, for files that contain only a difference from it."""
    transformer_config: Mapping[str, Any] | None = None
    """Config of the base's transformer."""
    transformer: Callable[[], Mapping[str, Tensor]] | None = None
    """Loads the weights of the base's transformer with diffusers' names, for files that share some of them."""
    rank: int | None = None
    """Rank of a low-rank format to write."""
    kind: str | None = None
    """System of the control to read from a file that contains several; None refuses such files."""

    @cached_property
    def unet_weights(self) -> Mapping[str, Tensor] | None:
        """The weights that `unet` loads, cached."""
        return None if self.unet is None else self.unet()

    @cached_property
    def transformer_weights(self) -> Mapping[str, Tensor] | None:
        """The weights that `transformer` loads, cached."""
        return None if self.transformer is None else self.transformer()


@dataclass(frozen=True, kw_only=True)
class Written:
    """Output of `FileFormat.write`."""

    tensors: Mapping[str, Tensor]
    """With the format's names."""
    checkpoint: Checkpoint | None = None
    """Checkpoint whose metadata the file gets; None is the input."""
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Of a folder: name of each JSON file -> content."""
    notes: Sequence[str] = ()
    """Notes for the user: what was lost."""


@dataclass(frozen=True, kw_only=True)
class FileFormat:
    """A tool's file format for controls of one system."""

    name: str
    """Shared by systems whose files come from the same tool."""
    description: str = ""
    """In a few words, for lists and errors."""
    detect: Callable[[TensorFile], str | None] | None = None
    """Describes a file if it is of this format, such as "a ControlNet under the names of the original code"; else None.
    A format without it is only written."""
    read: Callable[[type[Control], TensorFile, Reference, str], Checkpoint] | None = None
    """System, file, reference and the description from `detect` => checkpoint. Raises `UserError` if names, shapes or
    the reference do not fit."""
    write: Callable[[Checkpoint, Reference], Written] | None = None
    """Raises `UserError` if the format cannot hold the checkpoint."""
    files: tuple[str, ...] = ()
    """File names of its folder, the one with the tensors last; empty if it is a single file."""
    of_config: Callable[[Mapping[str, Any]], bool] | None = None
    """Of a folder: whether its JSON config is of this format, which is asked before tensors are read. None: unknown."""
    needs_base: bool = False
    """Whether it contains only the difference from a base, so that nothing else is known without one."""
    needs_companion: bool = False
    """Whether writing it needs the companion's weights."""
    says: InitVar[str] = ""
    """Former name of `description`."""

    def __post_init__(self, says: str) -> None:
        if says:
            object.__setattr__(self, "description", says)


def renaming(
    *, name: str, description: str = "", title: str, prefixes: Mapping[str, str], says: str = ""
) -> FileFormat:
    """A format whose names differ from the system's own only by prefixes.

    A file matches if every name starts with one of its prefixes, and each prefix occurs. A config that is missing from
    the metadata comes from `Control.config_of`.

    Args:
        title: of its content: `a ControlNet`.
        prefixes: prefix of the system's own names -> prefix in the file.
        says: former name of `description`.
    """

    description = description or says

    def detect(file: TensorFile) -> str | None:
        found_prefixes = [
            next((prefix for prefix in prefixes.values() if key.startswith(prefix)), None) for key in file.tensors
        ]
        return f"{title} under {description}" if set(found_prefixes) == set(prefixes.values()) else None

    def read(kind: type[Control], file: TensorFile, reference: Reference, description: str) -> Checkpoint:
        own_prefixes = {prefix: own_prefix for own_prefix, prefix in prefixes.items()}
        tensors = {_renamed(key, own_prefixes): value for key, value in file.tensors.items()}
        try:
            config = declared_config(file.metadata) or kind.config_of(tensors, reference.unet_config)
            expected = kind.shapes(config)
        except CONFIG_ERRORS as error:
            raise UserError(
                f"{file.path} looks like {description}, but {on_one_line(error)}", "damaged-file"
            ) from error
        check_names(file.path, description, expected, tensors, file.others)
        return Checkpoint(kind.kind, config, tensors, dict(file.metadata), path=file.path)

    def write(checkpoint: Checkpoint, reference: Reference) -> Written:
        return Written(tensors={_renamed(key, prefixes): value for key, value in checkpoint.tensors.items()})

    return FileFormat(name=name, description=description, detect=detect, read=read, write=write)


def _renamed(name: str, prefixes: Mapping[str, str]) -> str:
    prefix = next(prefix for prefix in prefixes if name.startswith(prefix))
    return prefixes[prefix] + name.removeprefix(prefix)


def as_float32(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, floating-point ones as float32."""
    return {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}


def on_one_line(error: Exception) -> str:
    """An error's message on one line."""
    return " ".join(str(error).split())[:300]


def listed(names: Collection[str], most: int = 3) -> str:
    """`a, b, c and 5 more`."""
    first = sorted(names)[:most]
    rest = len(names) - len(first)
    return ", ".join(first) + (f" and {rest} more" if rest else "")


def check_names(
    path: Path,
    what: str,
    expected: Mapping[str, Sequence[int]],
    tensors: Mapping[str, Tensor],
    others: Sequence[str] = (),
) -> None:
    """Check that a file has exactly the expected names and shapes.

    Args:
        what: the supposed content, as in "a ControlNet".
        others: names of entries that are not tensors.

    Raises:
        UserError: names are missing or unknown, or shapes differ.
    """
    problems = []
    if missing := set(expected) - set(tensors):
        problems.append(f"{len(missing)} of its {len(expected)} tensors are missing: {listed(missing)}")
    if unknown := (set(tensors) | set(others)) - set(expected):
        problems.append(f"{len(unknown)} tensors do not belong to it: {listed(unknown)}")
    mismatched = [
        f"{name} has the shape {tuple(tensors[name].shape)}, not {tuple(shape)}"
        for name, shape in sorted(expected.items())
        if name in tensors and tuple(tensors[name].shape) != tuple(shape)
    ]
    mismatched += [
        f"{name} has the dtype {str(tensors[name].dtype).removeprefix('torch.')}, which is no floating point"
        for name in sorted(expected)
        if name in tensors and not tensors[name].is_floating_point()
    ]
    if mismatched:
        problems.append(
            mismatched[0]
            + (f", and {len(mismatched) - 1} more shapes or dtypes are wrong" if len(mismatched) > 1 else "")
        )
    if problems:
        raise UserError(f"{path} looks like {what}, but {'; '.join(problems)}", "damaged-file")


def declared_config(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The config in a controlkit file's metadata; other files have none."""
    try:
        config = json.loads(metadata.get("control.config", "null"))
    except (ValueError, RecursionError):
        return None
    return config if isinstance(config, dict) else None


def checkpoint_of_names(
    kind: type[Control],
    file: TensorFile,
    tensors: Mapping[str, Tensor],
    reference: Reference,
    *,
    to_own: Callable[[Collection[str]], Mapping[str, str]],
    to_original: Callable[[Collection[str]], Mapping[str, str]],
    others: Sequence[str],
    prefix: str,
) -> Checkpoint:
    """The checkpoint of tensors under the names of the original code; every tensor must be accounted for.

    Args:
        tensors: those of the control, without `prefix`.
        to_own: names of the original code -> names here.
        to_original: names here -> names of the original code.
        others: names of the file that belong to nothing known.

    Raises:
        UserError: a tensor is missing, unknown or of another shape.
    """
    try:
        own = {new: tensors[name] for name, new in to_own(tensors).items()}
        config = declared_config(file.metadata) or kind.config_of(own, reference.unet_config)
        expected = kind.shapes(config)
        names = to_original(expected)
    except CONFIG_ERRORS as error:
        raise UserError(f"{file.path} looks like {kind.title}, but {on_one_line(error)}", "damaged-file") from error
    check_names(
        file.path,
        kind.title,
        {f"{prefix}{names[name]}": shape for name, shape in expected.items()},
        {f"{prefix}{name}": value for name, value in tensors.items()},
        others,
    )
    return Checkpoint(kind.kind, config, {name: own[name] for name in expected}, dict(file.metadata), path=file.path)
