"""The models of a server: name -> path, listed at its start. The page adds adapters that it trains.

Clients send names, and one that is not listed is refused, so no text from a client becomes a path.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import controlkit
from controlkit.errors import UserError, nearest

if TYPE_CHECKING:
    from controlkit.controls.control import Control

TASK = "task"
"""The plain input that selects one of a control's tasks."""
_DESCRIPTIONS = ("config.json", "adapter_config.json")
"""A folder with one of these is one model, of diffusers or peft."""
_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
_FOLDERS = ("CONTROLKIT_MODELS", "HF_HOME", "HF_HUB_CACHE")
"""Environment variables with folders of models."""


@dataclass(frozen=True, kw_only=True)
class ControlEntry:
    """A listed control."""

    path: str
    """What `load_control` takes."""
    kind: str
    """Its system."""
    condition: str | None
    """The condition that its file records, if any."""
    images: tuple[str, ...]
    """Its inputs that are images."""
    values: tuple[str, ...]
    """Its inputs that are plain values."""
    one_image: bool = True
    """Whether it requires one image and nothing else, but perhaps a task."""
    tasks: tuple[str, ...] = ()
    """The names that its input `task` may have."""
    conditions: Mapping[str, str] = field(default_factory=dict)
    """Input -> its condition, for inputs with one of their own."""
    version: int = 0
    """Time at which its file was written, in nanoseconds, if that was after the start of the server."""

    def condition_of(self, image: str | None = None) -> str | None:
        """The condition of an input, if any.

        Args:
            image: name of the input; None for the first.
        """
        name = image or next(iter(self.images), "")
        return self.conditions.get(name, self.condition)


@dataclass(frozen=True, kw_only=True)
class Catalogue:
    """Name of each model -> its path (or hub id)."""

    bases: Mapping[str, str]
    """The first is the default."""
    controls: Mapping[str, ControlEntry] = field(default_factory=dict)
    base_controls: Mapping[str, str] = field(default_factory=dict)
    """Controls that only others use: no choice for a request, but adapters are trained on them."""
    loras: Mapping[str, str] = field(default_factory=dict)
    vaes: Mapping[str, str] = field(default_factory=dict)
    embeddings: Mapping[str, str] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    """`NAME: REASON` for each file that is not listed: it is no control, or its name is taken."""

    @property
    def base(self) -> str:
        """Name of the default base."""
        return next(iter(self.bases))

    def with_control(self, name: str, path: str | Path) -> Catalogue:
        """A catalogue with one more control, or a new file in place of a listed one.

        Raises:
            UserError: the file is not a control, or one that only others use.
        """
        entry = _entry(str(path), self.base_controls)
        if entry is None:
            raise UserError(f"{name} is a control that only others use", "wrong-kind")
        entry = replace(entry, version=Path(path).stat().st_mtime_ns)
        return replace(self, controls={**self.controls, name: entry})

    def find(self, kind: str, name: str) -> str:
        """The listed name that matches `name`, ignoring case, a file suffix and a hash in brackets (which A1111 adds).

        Args:
            kind: `bases`, `controls`, `base_controls`, `loras`, `vaes` or `embeddings`.

        Raises:
            UserError: no listed name matches.
        """
        known: Mapping[str, Any] = getattr(self, kind)
        if name in known:
            return name
        plain = _plain(name)
        for each in known:
            if _plain(each) == plain:
                return each
        raise UserError(
            f"there is no {kind[:-1].replace('_', ' ')} {name!r} on this server{nearest(name, list(known))}",
            "unknown-name",
        )

    def embeddings_in(self, prompts: str) -> list[str]:
        """Names of the textual inversions whose word is in the prompts, in any case."""
        return [
            name
            for name in self.embeddings
            if re.search(rf"(?<!\w){re.escape(word_of(name))}(?!\w)", prompts, re.IGNORECASE)
        ]

    def without_paths(self, text: str) -> str:
        """`text` with names in place of the server's paths, and of their folders the last part."""
        controls = {name: entry.path for name, entry in self.controls.items()}
        named: dict[str, str] = {}
        for listed in (self.bases, controls, self.loras, self.vaes, self.embeddings, self.base_controls):
            for name, path in listed.items():  # `ADAPTER+BASE` is two
                given = [each for each in (path, *path.split("+")) if os.sep in each]
                named |= {each: name for each in (*given, *(os.path.abspath(each) for each in given))}
        folders = {str(Path(path).parent) for path in named if "+" not in path}
        folders |= {str(Path(controlkit.__file__).parent), str(Path.home()), tempfile.gettempdir()}
        folders |= {os.environ[name] for name in _FOLDERS if os.environ.get(name)}
        named = {**{folder: Path(folder).name for folder in folders if len(Path(folder).parts) > 1}, **named}
        for path in sorted(named, key=len, reverse=True):
            if path in folders:
                text = text.replace(f"{path}{os.sep}", "")
            text = text.replace(path, named[path])
        return text


def word_of(name: str) -> str:
    """The word that stands for a textual inversion: its file's name."""
    return name.rpartition("/")[2]


def _plain(name: str) -> str:
    name = name.strip().lower()
    if name.endswith("]") and "[" in name:
        name = name[: name.rindex("[")].strip()
    for suffix in _SUFFIXES:
        name = name.removesuffix(suffix)
    return name


def list_models(
    *,
    bases: Iterable[str] = ("nano",),
    controls: Iterable[str] = (),
    loras: Iterable[str] = (),
    vaes: Iterable[str] = (),
    embeddings: Iterable[str] = (),
) -> Catalogue:
    """List the models in files and folders. Of equal names the first is listed, and shipped controls last.

    Args:
        bases: `nano`, hub ids, diffusers folders, files, and folders of the last two.
        controls: files, diffusers folders, and folders of these, also nested. With `nano` in `bases`, its shipped
            controls are listed, too.
        loras: files, and folders of them, also nested.
        vaes: as `loras`.
        embeddings: as `loras`.

    Raises:
        UserError: a path does not exist, or there is no base.
    """
    from controlkit.formats.load import shipped_controls

    skipped: list[str] = []
    named_bases = _named((found for each in bases for found in _bases_in(each)), skipped)
    if not named_bases:
        raise UserError(f"there is no base in {', '.join(bases)}; give --base nano, a model or a folder", "empty-data")
    shipped = shipped_controls() if "nano" in named_bases else {}
    own = (found for each in controls for found in _files_in(each, "--controls"))
    files = _named(chain(own, ((name, str(path)) for name, path in shipped.items())), skipped)
    files = {name: files[name] for name in (*shipped, *files)}  # clients choose the first by default
    listed, base_controls = {}, {}
    for name, path in files.items():
        with suppress(UserError):  # said below
            if _is_for_others(path):
                base_controls[name] = path
    for name, path in files.items():
        try:
            entry = _entry(path, base_controls)
        except UserError as error:
            skipped.append(f"{name}: {error}")
            continue
        if entry is not None:
            listed[name] = entry
    inversions = _named((found for each in embeddings for found in _files_in(each, "--embeddings")), skipped)
    return Catalogue(
        bases=named_bases,
        controls=listed,
        base_controls=base_controls,
        loras=_named((found for each in loras for found in _files_in(each, "--loras")), skipped),
        vaes=_named((found for each in vaes for found in _files_in(each, "--vaes")), skipped),
        embeddings=_with_own_words(inversions, skipped),
        skipped=tuple(skipped),
    )


def _named(found: Iterable[tuple[str, str]], skipped: list[str]) -> dict[str, str]:
    """Name -> path of the first model with each name.

    Args:
        found: names and paths.
        skipped: gets a note on each of the others.
    """
    named: dict[str, str] = {}
    for name, path in found:
        if named.setdefault(name, path) != path:
            skipped.append(f"{name}: {path} has the name of {named[name]}, which is offered; rename one of them")
    return named


def _with_own_words(embeddings: Mapping[str, str], skipped: list[str]) -> dict[str, str]:
    """The textual inversions of which no earlier one has the word.

    Args:
        embeddings: name -> path.
        skipped: gets a note on each of the others.
    """
    first: dict[str, str] = {}
    for name in embeddings:
        owner = first.setdefault(word_of(name).lower(), name)
        if owner != name:
            skipped.append(f"{name}: its word {word_of(name)} is that of {owner}, which is offered; rename one of them")
    return {name: embeddings[name] for name in first.values()}


def _is_for_others(path: str) -> bool:
    """Whether only other controls use this one, as adapters do a base control."""
    from controlkit.controls.registry import registry
    from controlkit.formats.load import control_class

    return control_class(path).kind in {each.companion for each in registry().values()}


def _entry(path: str, base_controls: Mapping[str, str]) -> ControlEntry | None:
    """The entry of a control; None for one that only other controls use."""
    from controlkit.controls.inputs import takes_one_image
    from controlkit.formats.load import control_class, recorded_condition

    if _is_for_others(path):
        return None
    kind = control_class(path)
    return ControlEntry(
        path=path if kind.companion is None else _with_companion(path, base_controls),
        kind=kind.kind,
        condition=recorded_condition(path),
        images=tuple(each.name for each in kind.inputs if each.kind == "image"),
        values=tuple(each.name for each in kind.inputs if each.kind == "value"),
        one_image=takes_one_image(kind),
        tasks=_tasks(path, kind),
        conditions={each.name: each.condition for each in kind.inputs if each.condition is not None},
    )


def _tasks(path: str, kind: type[Control]) -> tuple[str, ...]:
    """The tasks of a control that has such an input and several of them."""
    from controlkit.formats.companions import read_checkpoint

    if all(each.name != TASK for each in kind.inputs):
        return ()
    return kind.conditions_in(read_checkpoint(Path(path)).config)


def _with_companion(path: str, base_controls: Mapping[str, str]) -> str:
    """`ADAPTER+BASE` if the base control of an adapter is neither in its folder nor shipped, but listed."""
    from controlkit.formats.companions import find_companion, read_checkpoint
    from controlkit.formats.load import shipped_controls

    own = [Path(each) for each in base_controls.values() if Path(each).is_file()]
    shipped = [*shipped_controls().values()]
    if not set(own) - set(shipped):
        return path
    with suppress(UserError):  # said when it is used
        checkpoint = read_checkpoint(Path(path))
        if checkpoint.companion is None:
            found = find_companion(Path(path), checkpoint, [*shipped, *own])
            is_far = found not in shipped and found.parent != Path(path).parent
            return f"{path}+{found}" if is_far else path
    return path


def _bases_in(name: str) -> list[tuple[str, str]]:
    from controlkit.bases.folders import NANO
    from controlkit.bases.weight_files import HUB_ID

    path = Path(name)
    if path.is_file():
        return [(path.stem, name)]
    if not path.is_dir():
        if name != NANO and (path.suffix.lower() in _SUFFIXES or not HUB_ID.fullmatch(name)):
            raise UserError(
                f"--base {name}: there is no such file or folder, and it is no id of the Hugging Face hub"
                " (OWNER/NAME); correct the path",
                "missing-file",
            )
        return [(name, name)]
    if (path / "model_index.json").is_file():
        return [(path.name, name)]
    folders = [(each.name, str(each)) for each in sorted(path.iterdir()) if (each / "model_index.json").is_file()]
    return [*folders, *_files_below(path, inside=False)]


def _files_in(name: str, option: str) -> list[tuple[str, str]]:
    path = Path(name)
    if path.is_file() or any((path / each).is_file() for each in _DESCRIPTIONS):
        return [(path.stem, str(path))]
    if not path.is_dir():
        raise UserError(f"{option} {name}: there is no such file or folder", "missing-file")
    described = sorted({each.parent for name in _DESCRIPTIONS for each in path.rglob(name)})
    files = _files_below(path, inside=True)
    return [
        *((each.relative_to(path).as_posix(), str(each)) for each in described),
        *((name, file) for name, file in files if Path(file).parent not in described),
    ]


def _files_below(folder: Path, *, inside: bool) -> list[tuple[str, str]]:
    """Name without suffix and path of the weight files in a folder; of equal names, safetensors first.

    Args:
        inside: whether to include nested folders.
    """
    found = folder.rglob("*") if inside else folder.iterdir()
    files = [path for path in found if path.suffix.lower() in _SUFFIXES and path.is_file()]
    files.sort(key=lambda path: (path.with_suffix(""), _SUFFIXES.index(path.suffix.lower())))
    return [(path.relative_to(folder).with_suffix("").as_posix(), str(path)) for path in files]
