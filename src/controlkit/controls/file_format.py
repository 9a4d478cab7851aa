"""File formats of controls as data: how a file is recognised, and names in and out.

Each system lists the formats of other tools that hold one (`Control.formats`). Reading turns named tensors into a
`Checkpoint` under the system's own names, writing turns one into named tensors; neither opens a file, which is the work
of `controlkit.formats`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from controlkit.errors import UserError

if TYPE_CHECKING:
    from controlkit.controls.control import Control

CONFIG_ERRORS = (KeyError, ValueError, TypeError, AttributeError, IndexError, RuntimeError, ZeroDivisionError)
"""What building a network raises where a config is not one of such a network."""


@dataclass(frozen=True)
class TensorFile:
    """What a file holds. The tensors are mapped from it where its container allows, so reading costs no memory."""

    path: Path
    tensors: dict[str, Tensor]
    """Under the names of the file, in its dtypes."""
    metadata: dict[str, str] = field(default_factory=dict)
    """Of safetensors; others have none."""
    others: tuple[str, ...] = ()
    """Names of entries that are no tensors."""
    config: dict[str, Any] = field(default_factory=dict)
    """Of a folder, its JSON."""


@dataclass
class Checkpoint:
    """One control, or part of one, as tensors under its system's own names: what is read from and written to files."""

    kind: str
    config: dict[str, Any]
    """From which the system rebuilds the network."""
    tensors: dict[str, Tensor]
    """In the dtypes of the file."""
    metadata: dict[str, str] = field(default_factory=dict)
    """Of the file, all of it."""
    leftover: dict[str, Tensor] = field(default_factory=dict)
    """Tensors of the file that are no part of the control, under the file's names; few formats have a place for
    them."""
    notes: list[str] = field(default_factory=list)
    """Sentences on what was found or left out."""
    companion: Checkpoint | None = None
    """The control that this one is nothing without, if the same file holds it or it was given."""
    path: Path | None = None
    """Of the file or folder that it was read from."""

    @property
    def condition(self) -> str | None:
        """Name of the condition that it was trained on, if the file says it."""
        return self.metadata.get("control.condition") or None

    @property
    def parameters(self) -> int:
        """Numbers in all of its tensors."""
        return sum(value.numel() for value in self.tensors.values())

    def float_tensors(self) -> dict[str, Tensor]:
        """Its tensors; floating-point ones as float32."""
        return as_float32(self.tensors)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What reading or writing a format may need besides the file."""

    unet_config: Mapping[str, Any] | None = None
    """Of the base's UNet: settings that shapes do not tell."""
    unet: Callable[[], Mapping[str, Tensor]] | None = None
    """The weights of the base's UNet under diffusers' names, for files that hold only what differs from it."""
    rank: int | None = None
    """Of a low-rank format that is written."""

    @cached_property
    def unet_weights(self) -> Mapping[str, Tensor] | None:
        """The weights that `unet` gives, read once."""
        return None if self.unet is None else self.unet()


@dataclass(frozen=True, kw_only=True)
class Written:
    """What a format makes of a checkpoint."""

    tensors: Mapping[str, Tensor]
    """Under the format's names."""
    checkpoint: Checkpoint | None = None
    """Whose metadata the file gets; None is the one that was given."""
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Of a folder: name of each JSON file -> what is in it."""
    notes: Sequence[str] = ()
    """On what had no place."""


@dataclass(frozen=True, kw_only=True)
class FileFormat:
    """One way in which a tool keeps controls of one system."""

    name: str
    """Shared by systems whose files come from the same tool."""
    says: str
    """In a few words, for lists and errors."""
    detect: Callable[[TensorFile], str | None] | None = None
    """What a file is if it is of this format, in words such as "a ControlNet under the names of the original code", or
    None. A format without it is only written."""
    read: Callable[[type[Control], TensorFile, Reference, str], Checkpoint] | None = None
    """The system, the file, what it may need, and what `detect` said. Raises `UserError` where names, shapes or what it
    needs do not fit."""
    write: Callable[[Checkpoint, Reference], Written] | None = None
    """Raises `UserError` where it cannot."""
    files: tuple[str, ...] = ()
    """Names of the files of its folder, the one with the tensors last; none if it is one file."""
    needs_base: bool = False
    """Whether it holds only what differs from a base, so that without one nothing is known but its own tensors."""
    needs_companion: bool = False
    """Whether writing it needs the companion's weights."""


def renaming(*, name: str, says: str, title: str, prefixes: Mapping[str, str]) -> FileFormat:
    """A format whose names differ from the system's own by how they begin, and by nothing else.

    A file is of it if every name begins with one of its prefixes, and each of these occurs. What its metadata does not
    say of the config, `Control.config_of` has to tell.

    Args:
        title: of what such a file holds: `a ControlNet`.
        prefixes: how the system's own names begin -> how those of the file do.
    """

    def detect(file: TensorFile) -> str | None:
        begun = [next((theirs for theirs in prefixes.values() if key.startswith(theirs)), None) for key in file.tensors]
        return f"{title} under {says}" if set(begun) == set(prefixes.values()) else None

    def read(kind: type[Control], file: TensorFile, reference: Reference, words: str) -> Checkpoint:
        back = {theirs: own for own, theirs in prefixes.items()}
        tensors = {_renamed(key, back): value for key, value in file.tensors.items()}
        try:
            config = announced_config(file.metadata) or kind.config_of(tensors, reference.unet_config)
            expected = kind.shapes(config)
        except CONFIG_ERRORS as error:
            raise UserError(f"{file.path} looks like {words}, but {on_one_line(error)}") from error
        check_names(file.path, words, expected, tensors, file.others)
        return Checkpoint(kind.kind, config, tensors, dict(file.metadata), path=file.path)

    def write(checkpoint: Checkpoint, reference: Reference) -> Written:
        return Written(tensors={_renamed(key, prefixes): value for key, value in checkpoint.tensors.items()})

    return FileFormat(name=name, says=says, detect=detect, read=read, write=write)


def _renamed(name: str, prefixes: Mapping[str, str]) -> str:
    found = next(before for before in prefixes if name.startswith(before))
    return prefixes[found] + name.removeprefix(found)


def as_float32(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors; floating-point ones as float32."""
    return {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}


def on_one_line(error: Exception) -> str:
    """An error's words on one line."""
    return " ".join(str(error).split())[:300]


def some(names: Collection[str], most: int = 3) -> str:
    """`a, b, c and 5 more`."""
    first = sorted(names)[:most]
    rest = len(names) - len(first)
    return ", ".join(first) + (f" and {rest} more" if rest else "")


def check_names(
    path: Path,
    what: str,
    expected: Mapping[str, Sequence[int]],
    given: Mapping[str, Tensor],
    others: Sequence[str] = (),
) -> None:
    """Hold a file to exactly the names and shapes that it should have.

    Args:
        what: it is taken for, as in "a ControlNet".
        others: names of entries of the file that are no tensors.

    Raises:
        UserError: says which are missing, which are not known, or which have another shape.
    """
    problems = []
    if missing := set(expected) - set(given):
        problems.append(f"{len(missing)} of its {len(expected)} tensors are missing: {some(missing)}")
    if unknown := (set(given) | set(others)) - set(expected):
        problems.append(f"{len(unknown)} tensors do not belong to it: {some(unknown)}")
    wrong = [
        f"{name} has the shape {tuple(given[name].shape)}, not {tuple(shape)}"
        for name, shape in sorted(expected.items())
        if name in given and tuple(given[name].shape) != tuple(shape)
    ]
    if wrong:
        problems.append(wrong[0] + (f", and {len(wrong) - 1} more shapes are wrong" if len(wrong) > 1 else ""))
    if problems:
        raise UserError(f"{path} looks like {what}, but {'; '.join(problems)}")


def announced_config(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The config that a file of ours carries in its metadata; foreign files have none."""
    try:
        config = json.loads(metadata.get("control.config", "null"))
    except (ValueError, RecursionError):
        return None
    return config if isinstance(config, dict) else None
