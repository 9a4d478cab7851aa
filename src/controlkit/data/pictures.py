"""Pictures from which pairs are made: folders, globs, tar shards, COCO annotations."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from controlkit.data.readers.archives import picture_of, texts_of
from controlkit.data.readers.coco import coco_pictures, object_parameters
from controlkit.data.sources import CAPTION_SUFFIXES, Piece, caption_beside, is_picture_name, samples
from controlkit.errors import UserError
from controlkit.files import sha256_of, whole_text

STATE = Path(".controlkit") / "pairs"
"""Where, below a folder of pairs, is kept what a later run needs to know."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One picture to make a pair of, not read yet."""

    key: str
    """Names its files, the same in every run: its path below the input without the ending."""
    name: str
    """Its path below the input."""
    source: Path | Piece
    prompt: str | None = None
    """Its caption where that is known; None: look for a .txt or .caption file beside it."""
    objects: Mapping[str, Mapping[str, Any]] | None = None
    """Parameters for conditions that draw given annotations."""

    @property
    def sidecars(self) -> list[Path]:
        """The files that may hold its caption, which need not exist."""
        if not isinstance(self.source, Path) or self.prompt is not None:
            return []
        return [self.source.with_suffix(suffix) for suffix in CAPTION_SUFFIXES]

    def caption(self) -> str:
        """The caption, empty if there is none.

        Raises:
            UserError: its file cannot be read as text, or it holds half a character.
        """
        if self.prompt is not None:
            return whole_text(self.prompt, "its caption")
        return caption_beside(self.source) if isinstance(self.source, Path) else ""

    def stamp(self) -> str:
        """Changes when the picture, its caption or its annotations do; nothing is read for it."""
        place = self.source if isinstance(self.source, Path) else self.source.path
        member = (self.source.start, self.source.length) if isinstance(self.source, Piece) else ()
        first, *others = [_state(path) for path in self.sidecars] or [None]
        about = [_state(place), member, first, self.prompt, self.objects, *filter(None, others)]
        return sha256_of(repr(about))[:24]

    def to_json(self) -> dict[str, Any]:
        """Plain values, for another process."""
        source = {"path": str(self.source)} if isinstance(self.source, Path) else asdict(self.source)
        return {**vars(self), "source": {**source, "path": str(source["path"])}}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Picture:
        """What `to_json` gave."""
        where = dict(values["source"])
        path = Path(where.pop("path"))
        return cls(**{**values, "source": Piece(path=path, **where) if where else path})


def list_pictures(
    inputs: Sequence[str | Path], images: str | Path | None = None, without: str | Path | None = None
) -> list[Picture]:
    """Every picture below the inputs, by key.

    Args:
        inputs: folders (searched to their depths; pairs that were made below them are left out), pictures, globs, tar
            files, COCO annotation files. A folder in which tar shards lie and no pictures is read as these shards.
        images: the folder of the pictures that COCO annotations list, if it is not near them.
        without: a folder that is left out, because it is where results go.

    Raises:
        UserError: an input is not there, or there is no picture at all.
    """
    files: list[Path] = []
    annotations: list[Path] = []
    roots: list[str] = []
    for given in inputs:
        found, root = _found(str(given))
        if not found or not all(path.exists() for path in found):
            raise UserError(
                f"there are no pictures at {given}; give a folder, a glob in quotes, tar files or COCO annotations"
            )
        annotations += [path for path in found if path.suffix == ".json"]
        files += [path for path in found if path.suffix != ".json" and not path.is_dir()]
        files += [file for path in found if path.is_dir() for file in _walk(path)]
        roots += [root] if any(path.suffix != ".json" for path in found) else []
    left_out = os.path.realpath(without) + os.sep if without is not None else None
    unique = dict.fromkeys(Path(os.path.abspath(path)) for path in files)
    kept = [path for path in unique if left_out is None or not os.path.realpath(path).startswith(left_out)]
    listed = list(_from_coco(annotations, Path(images) if images else None)) if annotations else []
    if kept:
        listed += _from_files(kept, Path(os.path.commonpath(roots)))
    if not listed and unique:
        raise UserError(
            f"all pictures of {', '.join(map(str, inputs))} lie in {without}, where results go;"
            " give --out another folder"
        )
    if not listed:
        raise UserError(f"there are no pictures in {', '.join(map(str, inputs))}")
    return sorted(_with_unique_keys(listed), key=lambda picture: picture.key)


def _found(given: str) -> tuple[list[Path], str]:
    """The paths that an input means, and the folder below which they are named."""
    path = Path(given)
    if path.exists() or not re.search(r"[*?\[]", given):
        return [path], os.path.abspath(path if path.is_dir() else path.parent)
    before = re.split(r"[*?\[]", given)[0]
    names = sorted(name for name in glob.glob(given, recursive=True) if not name.lower().endswith(CAPTION_SUFFIXES))
    return [Path(name) for name in names], os.path.abspath(os.path.dirname(before))


def _from_files(files: Iterable[Path], root: Path) -> Iterator[Picture]:
    for path in files:
        if path.name.lower().endswith((".tar", ".tar.gz", ".tgz")):
            yield from _from_tar(path)
            continue
        # A name that is not UTF-8 cannot be written into a manifest: its picture is skipped, under a name that can.
        name = path.relative_to(root).as_posix().encode("utf-8", "backslashreplace").decode()
        yield Picture(key=_key(name), name=name, source=path)


def _from_tar(path: Path) -> Iterator[Picture]:
    for key, parts in samples(path).items():
        picture = picture_of(parts)
        if picture is None:
            if any(is_picture_name(f"x.{part}") for part in parts):
                listed = ", ".join(sorted(parts))
                raise UserError(f"{path}: no picture of {key} is called KEY.jpg or KEY.png among {listed}")
            continue
        try:
            captions, _ = texts_of(parts)
        except (ValueError, RecursionError, UserError) as error:
            raise UserError(f"{path}: the text of {key} cannot be read ({error})") from error
        yield Picture(key=_key(f"{key}.x"), name=picture.name, source=picture, prompt=captions[0])


def _from_coco(annotations: Sequence[Path], images: Path | None) -> Iterator[Picture]:
    for picture in coco_pictures(annotations, images):
        name = picture.path.name
        objects = object_parameters(picture) or None
        yield Picture(
            key=_key(name),
            name=name,
            source=Path(os.path.abspath(picture.path)),
            prompt=picture.caption or "",
            objects=objects,
        )


def _walk(folder: Path) -> list[Path]:
    """Pictures below `folder`, or its tar shards if it has no pictures; hidden folders and pairs made are left out."""
    pictures: list[Path] = []
    shards: list[Path] = []
    seen = {os.path.realpath(folder)}
    for place, folders, names in os.walk(folder, followlinks=True):
        inner = {name: os.path.realpath(os.path.join(place, name)) for name in sorted(folders)}
        folders[:] = [
            name
            for name, real in inner.items()
            if not name.startswith(".") and real not in seen and not os.path.exists(os.path.join(real, STATE))
        ]
        seen |= {inner[name] for name in folders}
        pictures += [Path(place, name) for name in sorted(names) if is_picture_name(name)]
        shards += [Path(place, name) for name in sorted(names) if name.endswith(".tar") and not name.startswith(".")]
    return pictures or shards


def _key(name: str) -> str:
    """`a/apple` of `a/apple.jpg`; no dots, at which tar shards part key and ending, nor what no file of Windows has."""
    key = re.sub(r"[.\\\s:*?\"<>|]+", "_", name.rpartition(".")[0])
    return "/".join(filter(None, key.split("/"))) or "_"  # of an absolute path, which a list may hold, no root


def _with_unique_keys(pictures: Sequence[Picture]) -> Iterator[Picture]:
    taken: set[str] = set()
    for picture in sorted(pictures, key=lambda picture: (picture.name, str(picture.source))):
        key, number = picture.key, 2
        # Some file systems do not tell capital letters from small ones.
        if key.casefold() in taken:
            key = f"{picture.key}_{picture.name.rpartition('.')[2].lower()}"
        while key.casefold() in taken:
            key, number = f"{picture.key}_{number}", number + 1
        taken.add(key.casefold())
        yield picture if key == picture.key else replace(picture, key=key)


def _state(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns
