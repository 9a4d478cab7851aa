"""The models of a server: name -> path, listed once at its start.

Clients send names, and one that is not listed is refused, so no text from a client becomes a path.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from controlkit.errors import UserError, nearest

_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


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


@dataclass(frozen=True, kw_only=True)
class Catalogue:
    """Name of each model -> its path (or hub id)."""

    bases: Mapping[str, str]
    """The first is the default."""
    controls: Mapping[str, ControlEntry] = field(default_factory=dict)
    loras: Mapping[str, str] = field(default_factory=dict)
    vaes: Mapping[str, str] = field(default_factory=dict)
    embeddings: Mapping[str, str] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    """`NAME: REASON` for each file of `--controls` that is not listed."""

    @property
    def base(self) -> str:
        """Name of the default base."""
        return next(iter(self.bases))

    def find(self, kind: str, name: str) -> str:
        """The listed name that matches `name`, ignoring case, a file suffix and a hash in brackets (which A1111 adds).

        Args:
            kind: `bases`, `controls`, `loras`, `vaes` or `embeddings`.

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
        raise UserError(f"there is no {kind[:-1]} {name!r} on this server{nearest(name, list(known))}", "unknown-name")

    def without_paths(self, text: str) -> str:
        """`text` with names in place of the server's paths."""
        controls = {name: entry.path for name, entry in self.controls.items()}
        for listed in (self.bases, controls, self.loras, self.vaes, self.embeddings):
            for name, path in sorted(listed.items(), key=lambda each: -len(each[1])):
                text = text.replace(path, name) if os.sep in path else text
        return text


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
    """List the models in files and folders.

    Args:
        bases: `nano`, hub ids, diffusers folders, files, and folders of the last two.
        controls: files, diffusers folders, and folders of these, also nested. With `nano` in `bases`, its shipped
            controls are listed, too.
        loras: files, and folders of them, also nested.
        vaes: as `loras`.
        embeddings: as `loras`.

    Raises:
        UserError: one does not exist, or there is no base.
    """
    from controlkit.formats.load import shipped_controls

    named_bases = {name: path for each in bases for name, path in _bases_in(each).items()}
    if not named_bases:
        raise UserError(f"there is no base in {', '.join(bases)}; give --base nano, a model or a folder", "empty-data")
    files = {name: path for each in controls for name, path in _files_in(each, "--controls").items()}
    if "nano" in named_bases:
        files = {**{name: str(path) for name, path in shipped_controls().items()}, **files}
    listed, skipped = {}, []
    for name, path in files.items():
        try:
            entry = _entry(path)
        except UserError as error:
            skipped.append(f"{name}: {error}")
            continue
        if entry is not None:
            listed[name] = entry
    return Catalogue(
        bases=named_bases,
        controls=listed,
        loras={name: path for each in loras for name, path in _files_in(each, "--loras").items()},
        vaes={name: path for each in vaes for name, path in _files_in(each, "--vaes").items()},
        embeddings={name: path for each in embeddings for name, path in _files_in(each, "--embeddings").items()},
        skipped=tuple(skipped),
    )


def _entry(path: str) -> ControlEntry | None:
    """The entry of a control; None for one that only other controls use, such as a base control."""
    from controlkit.controls.registry import registry
    from controlkit.formats.load import control_class, recorded_condition

    kind = control_class(path)
    if kind.kind in {each.companion for each in registry().values()}:
        return None
    return ControlEntry(
        path=path,
        kind=kind.kind,
        condition=recorded_condition(path),
        images=tuple(each.name for each in kind.inputs if each.kind == "image"),
        values=tuple(each.name for each in kind.inputs if each.kind == "value"),
    )


def _bases_in(name: str) -> dict[str, str]:
    path = Path(name)
    if not path.is_dir():
        return {path.stem if path.is_file() else name: name}
    if (path / "model_index.json").is_file():
        return {path.name: name}
    folders = {each.name: str(each) for each in sorted(path.iterdir()) if (each / "model_index.json").is_file()}
    return {**folders, **_files_below(path, inside=False)}


def _files_in(name: str, option: str) -> dict[str, str]:
    path = Path(name)
    if path.is_file() or (path / "config.json").is_file():
        return {path.stem: str(path)}
    if not path.is_dir():
        raise UserError(f"{option} {name}: there is no such file or folder", "missing-file")
    folders = {each.parent.relative_to(path).as_posix(): str(each.parent) for each in sorted(path.rglob("config.json"))}
    files = _files_below(path, inside=True)
    return {**folders, **{name: file for name, file in files.items() if str(Path(file).parent) not in folders.values()}}


def _files_below(folder: Path, *, inside: bool) -> dict[str, str]:
    """Name without suffix -> path of the weight files in a folder.

    Args:
        inside: whether to include nested folders.
    """
    found = folder.rglob("*") if inside else folder.iterdir()
    files = sorted(path for path in found if path.suffix.lower() in _SUFFIXES and path.is_file())
    return {path.relative_to(folder).with_suffix("").as_posix(): str(path) for path in files}
