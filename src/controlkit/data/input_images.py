"""Images from which pairs are made: folders, globs, tar shards, COCO annotations."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from controlkit.data.readers.archives import image_of, texts_of
from controlkit.data.readers.coco import coco_images, object_parameters
from controlkit.data.sources import CAPTION_SUFFIXES, TarMember, caption_beside, is_image_name, samples
from controlkit.errors import UserError
from controlkit.files import sha256_of, valid_text

STATE = Path(".controlkit") / "pairs"
"""Where, below a folder of pairs, is kept what a later run needs to know."""


@dataclass(frozen=True, kw_only=True)
class InputImage:
    """One image to make a pair of, not read yet."""

    key: str
    """Names its files, the same in every run: its path below the input without the ending."""
    name: str
    """Its path below the input."""
    source: Path | TarMember
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
            return valid_text(self.prompt, "its caption")
        return caption_beside(self.source) if isinstance(self.source, Path) else ""

    def stamp(self) -> str:
        """Changes when the image, its caption or its annotations do; nothing is read for it."""
        place = self.source if isinstance(self.source, Path) else self.source.path
        member = (self.source.start, self.source.length) if isinstance(self.source, TarMember) else ()
        first, *others = [_state(path) for path in self.sidecars] or [None]
        about = [_state(place), member, first, self.prompt, self.objects, *filter(None, others)]
        return sha256_of(repr(about))[:24]

    def to_json(self) -> dict[str, Any]:
        """Plain values, for another process."""
        source = {"path": str(self.source)} if isinstance(self.source, Path) else asdict(self.source)
        return {**vars(self), "source": {**source, "path": str(source["path"])}}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> InputImage:
        """What `to_json` gave."""
        where = dict(values["source"])
        path = Path(where.pop("path"))
        return cls(**{**values, "source": TarMember(path=path, **where) if where else path})


def list_images(
    inputs: Sequence[str | Path], images: str | Path | None = None, without: str | Path | None = None
) -> list[InputImage]:
    """Every image below the inputs, by key.

    Args:
        inputs: folders (searched to their depths; pairs that were made below them are left out), images, globs, tar
            files, COCO annotation files. A folder in which tar shards lie and no images is read as these shards.
        images: the folder of the images that COCO annotations list, if it is not near them.
        without: a folder that is left out, because it is where results go.

    Raises:
        UserError: an input is not there, or there is no image at all.
    """
    files: list[Path] = []
    annotations: list[Path] = []
    roots: list[str] = []
    for given in inputs:
        found, root = _found(str(given))
        if not found or not all(path.exists() for path in found):
            raise UserError(
                f"there are no images at {given}; give a folder, a glob in quotes, tar files or COCO annotations"
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
            f"all images of {', '.join(map(str, inputs))} lie in {without}, where results go; give --out another folder"
        )
    if not listed:
        raise UserError(f"there are no images in {', '.join(map(str, inputs))}")
    return sorted(_with_unique_keys(listed), key=lambda image: image.key)


def _found(given: str) -> tuple[list[Path], str]:
    """The paths that an input means, and the folder below which they are named."""
    path = Path(given)
    if path.exists() or not re.search(r"[*?\[]", given):
        return [path], os.path.abspath(path if path.is_dir() else path.parent)
    before = re.split(r"[*?\[]", given)[0]
    names = sorted(name for name in glob.glob(given, recursive=True) if not name.lower().endswith(CAPTION_SUFFIXES))
    return [Path(name) for name in names], os.path.abspath(os.path.dirname(before))


def _from_files(files: Iterable[Path], root: Path) -> Iterator[InputImage]:
    for path in files:
        if path.name.lower().endswith((".tar", ".tar.gz", ".tgz")):
            yield from _from_tar(path)
            continue
        # A name that is not UTF-8 cannot be written into a manifest: its image is skipped, under a name that can.
        name = path.relative_to(root).as_posix().encode("utf-8", "backslashreplace").decode()
        yield InputImage(key=_key(name), name=name, source=path)


def _from_tar(path: Path) -> Iterator[InputImage]:
    for key, parts in samples(path).items():
        image = image_of(parts)
        if image is None:
            if any(is_image_name(f"x.{part}") for part in parts):
                listed = ", ".join(sorted(parts))
                raise UserError(f"{path}: no image of {key} is called KEY.jpg or KEY.png among {listed}")
            continue
        try:
            captions, _ = texts_of(parts)
        except (ValueError, RecursionError, UserError) as error:
            raise UserError(f"{path}: the text of {key} cannot be read ({error})") from error
        yield InputImage(key=_key(f"{key}.x"), name=image.name, source=image, prompt=captions[0])


def _from_coco(annotations: Sequence[Path], images: Path | None) -> Iterator[InputImage]:
    for image in coco_images(annotations, images):
        name = image.path.name
        objects = object_parameters(image) or None
        yield InputImage(
            key=_key(name),
            name=name,
            source=Path(os.path.abspath(image.path)),
            prompt=image.caption or "",
            objects=objects,
        )


def _walk(folder: Path) -> list[Path]:
    """Images below `folder`, or its tar shards if it has no images; hidden folders and pairs made are left out."""
    images: list[Path] = []
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
        images += [Path(place, name) for name in sorted(names) if is_image_name(name)]
        shards += [Path(place, name) for name in sorted(names) if name.endswith(".tar") and not name.startswith(".")]
    return images or shards


def _key(name: str) -> str:
    """`a/apple` of `a/apple.jpg`; no dots, at which tar shards part key and ending, nor what no file of Windows has."""
    key = re.sub(r"[.\\\s:*?\"<>|]+", "_", name.rpartition(".")[0])
    return "/".join(filter(None, key.split("/"))) or "_"  # of an absolute path, which a list may hold, no root


def _with_unique_keys(images: Sequence[InputImage]) -> Iterator[InputImage]:
    taken: set[str] = set()
    for image in sorted(images, key=lambda image: (image.name, str(image.source))):
        key, number = image.key, 2
        # Some file systems do not tell capital letters from small ones.
        if key.casefold() in taken:
            key = f"{image.key}_{image.name.rpartition('.')[2].lower()}"
        while key.casefold() in taken:
            key, number = f"{image.key}_{number}", number + 1
        taken.add(key.casefold())
        yield image if key == image.key else replace(image, key=key)


def _state(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns
