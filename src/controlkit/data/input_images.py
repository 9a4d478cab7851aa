"""List the images to make pairs from: folders, globs, tar shards, tables, COCO annotations."""

from __future__ import annotations

import glob
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from controlkit.conditions import registry
from controlkit.data.readers.archives import captions_and_metadata, image_of
from controlkit.data.readers.coco import coco_images, object_parameters
from controlkit.data.readers.columns import ANY_COLUMNS, CAPTION_COLUMNS, Columns
from controlkit.data.readers.folders import has_twins
from controlkit.data.readers.image_tables import (
    is_hub_dataset,
    is_saved_dataset,
    read_hub_dataset,
    read_parquet,
    read_saved_dataset,
)
from controlkit.data.readers.json_lines import METADATA, read_metadata
from controlkit.data.readers.listing import Listing, problems_error
from controlkit.data.readers.recognise import MANIFEST
from controlkit.data.sources import (
    CAPTION_SUFFIXES,
    TarMember,
    caption_beside,
    caption_files,
    is_image_name,
    is_unread_image,
    samples,
    unread_note,
    upright_size,
    walk,
)
from controlkit.errors import UserError
from controlkit.files import file_state, sha256_of, valid_text

STATE = Path(".controlkit") / "pairs"
"""State for later runs, below a folder of pairs."""
CONDITION_IMAGES = Path(".controlkit") / "condition"
"""Mark of a folder that `controlkit condition` wrote."""


@dataclass(frozen=True, kw_only=True)
class InputImage:
    """One image to make a pair from, not read yet."""

    key: str
    """Stem of its files, the same in every run of the same images: its path below the input without the suffix."""
    name: str
    """Its path below the input."""
    source: Path | TarMember
    prompt: str | None = None
    """Its caption if known; None: look for a .txt or .caption file beside it."""
    has_default_prompt: bool = False
    """Whether `prompt` stands for a missing caption: from a template or a captioner."""
    objects: Mapping[str, Mapping[str, Any]] | None = None
    """Condition -> parameters with annotated objects."""
    tile: tuple[int, int, int] | None = None
    """Left, top and side of the square of the upright image that it stands for; None: all of it."""

    @property
    def sidecars(self) -> list[Path]:
        """Possible caption files, which need not exist."""
        if not isinstance(self.source, Path) or self.prompt is not None:
            return []
        return [file for suffix in CAPTION_SUFFIXES for file in caption_files(self.source, suffix)]

    def caption(self) -> str:
        """The caption, empty if there is none.

        Raises:
            UserError: its file is not text, or the caption is not valid text.
        """
        if self.prompt is not None:
            return valid_text(self.prompt, "its caption")
        return caption_beside(self.source) if isinstance(self.source, Path) else ""

    def stamp(self) -> str:
        """Hash of path, size and times of the image and caption files, and of the annotations; reads no file.

        Equal stamps mean an unchanged image. The time of the last change of the inode also tells files apart that were
        exchanged, or written again under their former modification time.
        """
        member = (self.source.start, self.source.length) if isinstance(self.source, TarMember) else ()
        states = [file_state(path) for path in (self._file, *self.sidecars)]
        return sha256_of(json.dumps([str(self._file), member, states, self.prompt, self.objects, self.tile]))[:24]

    def former_stamp(self) -> str:
        """`stamp` as it was recorded before it contained the path and the time of the inode."""
        member = (self.source.start, self.source.length) if isinstance(self.source, TarMember) else ()
        beside = [path for path in self.sidecars if path.suffix in CAPTION_SUFFIXES]
        first, *others = [_former_state(path) for path in beside] or [None]
        about: list[object] = [_former_state(self._file), member, first, self.prompt, self.objects]
        about += [*filter(None, others), *([self.tile] if self.tile else [])]
        return sha256_of(repr(about))[:24]

    def content(self, digest: str, caption: str) -> str:
        """Hash of everything that its pair is made from, wherever the files are.

        Args:
            digest: SHA-256 of the image's bytes.
            caption: its caption.
        """
        return sha256_of(digest, self.name, caption, json.dumps([self.objects, self.tile]))[:24]

    @property
    def _file(self) -> Path:
        return self.source if isinstance(self.source, Path) else self.source.path

    def to_json(self) -> dict[str, Any]:
        """Serialise for another process."""
        source = {"path": str(self.source)} if isinstance(self.source, Path) else asdict(self.source)
        return {**vars(self), "source": {**source, "path": str(source["path"])}}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> InputImage:
        """Inverse of `to_json`."""
        where = dict(values["source"])
        path = Path(where.pop("path"))
        tile = tuple(values["tile"]) if values.get("tile") else None
        return cls(**{**values, "tile": tile, "source": TarMember(path=path, **where) if where else path})


def list_images(
    inputs: str | Path | Sequence[str | Path],
    images: str | Path | None = None,
    without: str | Path | None = None,
    notes: list[str] | None = None,
    columns: Columns = ANY_COLUMNS,
) -> list[InputImage]:
    """Every image below the inputs, sorted by key.

    Args:
        inputs: one or several: folders (searched recursively, without those that `pairs` and `condition` wrote),
            images, globs, tar files, COCO annotation files, Parquet files, folders of `save_to_disk`, datasets of the
            hub (`hf://datasets/OWNER/NAME`). A folder with tar shards or Parquet files and no images stands for these.
        images: the image folder of COCO annotations, if it is not near them.
        without: the output folder, which is skipped.
        notes: list to append notes to: on files that are not read, on captions that are not found.
        columns: column names of Parquet files and datasets.

    Raises:
        UserError: an input does not exist, a folder has both images and shards, a table has entries that cannot be
            read, or there are no images.
    """
    if isinstance(inputs, str | Path):
        inputs = [inputs]
    left_out = os.path.realpath(without) + os.sep if without is not None else None
    notes = [] if notes is None else notes
    files: list[Path] = []
    annotations: list[Path] = []
    roots: list[str] = []
    tables: list[Listing] = []
    for source in inputs:
        if is_hub_dataset(source):
            tables.append(read_hub_dataset(source, str(source), columns))
            continue
        if is_saved_dataset(Path(source)):
            tables.append(read_saved_dataset(Path(source), str(source), columns))
            continue
        found, root = _expand(str(source))
        if not found and Path(source).is_file():
            continue
        if not found or not all(path.exists() for path in found):
            raise UserError(
                f"there are no images at {source}; pass a folder, a glob in quotes, tar files, Parquet files, COCO"
                " annotations, or hf://datasets/OWNER/NAME for a dataset of the hub",
                "missing-file",
            )
        annotations += [path for path in found if path.suffix == ".json"]
        files += [path for path in found if path.suffix != ".json" and not path.is_dir()]
        files += [file for path in found if path.is_dir() for file in _walk(path, left_out, notes)]
        roots += [root] if any(path.suffix != ".json" for path in found) else []
    if images is not None and not annotations:
        raise UserError(
            f"{images} is for the images of COCO annotations (--images-folder), and there are none in"
            f" {', '.join(map(str, inputs))}",
            "contradiction",
        )
    unique = dict.fromkeys(Path(os.path.abspath(path)) for path in files)
    kept = _outside(unique, left_out)
    parquet = [path for path in kept if _is_table(path)]
    kept = [path for path in kept if not _is_table(path)]
    tables += [read_parquet([path], path, columns) for path in parquet]
    if columns.named and not tables:
        raise UserError(
            f"{' and '.join(f'--{option}' for option in columns.named).replace('_', '-')}: pairs are made of columns of"
            f" Parquet files and datasets, and there are none in {', '.join(map(str, inputs))}; columns of finished"
            " pairs are for --check",
            "contradiction",
        )
    listed = [image for table in tables for image in _from_table(table)]
    listed += list(_from_coco(annotations, Path(images) if images else None)) if annotations else []
    if kept:
        listed += _from_files(kept, Path(os.path.commonpath(roots)), notes)
    if not listed and unique:
        raise UserError(
            f"all images of {', '.join(map(str, inputs))} are in the output folder {without}; choose another --out",
            "contradiction",
        )
    if not listed:
        raise UserError(f"there are no images in {', '.join(map(str, inputs))}", "empty-data")
    return sorted(_with_unique_keys(listed), key=lambda image: image.key)


def with_prompts(images: Sequence[InputImage], template: str) -> list[InputImage]:
    """Give the images without a caption a prompt.

    Args:
        template: text in which `{name}` is the stem of the image's file and `{folder}` the name of its folder, with
            spaces for `_` and `-`.

    Raises:
        UserError: the template has other fields.
    """

    def words(text: str) -> str:
        return " ".join(re.split(r"[_\s-]+", text)).strip()

    def prompt(image: InputImage) -> str:
        place = Path(image.source if isinstance(image.source, Path) else f"{image.key}.x")
        try:
            return template.format(name=words(place.stem), folder=words(place.parent.name))
        except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
            raise UserError(
                f"prompt is {template!r}; expected text with no fields but {{name}} and {{folder}}", "unknown-key"
            ) from error

    return [
        image if _has_caption(image) else replace(image, prompt=prompt(image), has_default_prompt=True)
        for image in images
    ]


def _has_caption(image: InputImage) -> bool:
    try:
        return bool(image.caption())
    except UserError:
        return True  # making the pair reports what is wrong with it


def with_tiles(images: Sequence[InputImage], side: int) -> list[InputImage]:
    """Replace every image that holds at least two squares of `side` pixels by these: a grid, centred in it.

    Only headers are read. Other images stay, also unreadable ones.
    """
    tiles = [tile for image in images for tile in _tiles(image, side)]
    return sorted(_with_unique_keys(tiles), key=lambda image: image.key)  # an image may have the key of a tile


def _tiles(image: InputImage, side: int) -> list[InputImage]:
    size = upright_size(image.source)
    columns, rows = (0, 0) if size is None else (size[0] // side, size[1] // side)
    if size is None or columns * rows < 2:
        return [image]
    left, top = (size[0] - columns * side) // 2, (size[1] - rows * side) // 2
    return [
        replace(
            image,
            key=f"{image.key}_tile_{row}_{column}",
            name=f"{image.name}, tile {row}, {column}",
            tile=(left + column * side, top + row * side, side),
        )
        for row in range(rows)
        for column in range(columns)
    ]


def _expand(source: str) -> tuple[list[Path], str]:
    """The paths of an input, and the folder that their names are relative to."""
    path = Path(source)
    if path.is_file() and source.lower().endswith(CAPTION_SUFFIXES):  # of a glob that the shell expanded
        return [], os.path.abspath(path.parent)
    if path.exists() or not re.search(r"[*?\[]", source):
        return [path], os.path.abspath(path if path.is_dir() else path.parent)
    prefix = re.split(r"[*?\[]", source)[0]
    names = sorted(name for name in glob.glob(source, recursive=True) if not name.lower().endswith(CAPTION_SUFFIXES))
    return [Path(name) for name in names], os.path.abspath(os.path.dirname(prefix))


def _from_files(files: Sequence[Path], root: Path, notes: list[str]) -> Iterator[InputImage]:
    captions, conditions = _listed(files, root, notes)
    for path in files:
        if path in conditions:
            continue
        if path.name.lower().endswith((".tar", ".tar.gz", ".tgz")):
            yield from _from_tar(path)
            continue
        # A name that is not UTF-8 cannot go into a manifest: its image will be skipped and reported under this name.
        name = path.relative_to(root).as_posix().encode("utf-8", "backslashreplace").decode()
        image = InputImage(key=_key(name), name=name, source=path)
        prompt = captions.get(path)
        yield image if prompt is None or _has_caption(image) else replace(image, prompt=prompt)


def _listed(files: Sequence[Path], root: Path, notes: list[str]) -> tuple[dict[Path, str], set[Path]]:
    """From the `metadata` tables of `datasets` image folders: captions by the path of the image, and condition images.

    Raises:
        UserError: a table has entries that cannot be read.
    """
    folders = {folder for path in files for folder in path.parents if folder.is_relative_to(root)}
    paths = [folder / name for folder in sorted(folders) for name in METADATA if (folder / name).is_file()]
    captions: dict[Path, str] = {}
    conditions: set[Path] = set()
    known = set(files)
    for table in map(read_metadata, paths):
        if table.problems:
            raise problems_error(table.origin, table.problems)
        if table.records and not any(record.prompt for record in table.records):
            names = ", ".join(CAPTION_COLUMNS[:3])
            notes.append(f"{table.origin} has no captions in columns called {names} or similar; rename theirs")
        records = [record for record in table.records if isinstance(record.image, Path)]
        own = [Path(os.path.abspath(record.image)) for record in records if isinstance(record.image, Path)]
        used = {source for record in records for source in record.conditions.values() if isinstance(source, Path)}
        conditions |= {Path(os.path.abspath(source)) for source in used} - set(own)
        if lost := [path for path, record in zip(own, records, strict=True) if record.prompt and path not in known]:
            notes.append(
                f"{table.origin} has captions of {len(lost)} images that are not in the input, such as {lost[0]}"
            )
        counted = Counter(own)
        if twice := [path for path in counted if path in captions or counted[path] > 1]:
            notes.append(
                f"{table.origin} lists {len(twice)} images again, such as {twice[0]}; the last caption is used"
            )
        captions |= {path: record.prompt for path, record in zip(own, records, strict=True) if record.prompt}
    if left_out := conditions & known:
        notes.append(f"{len(left_out)} condition images that tables list are left out, such as {min(left_out)}")
    return captions, conditions


def _from_tar(path: Path) -> Iterator[InputImage]:
    for key, parts in samples(path).items():
        image = image_of(parts)
        if image is None:
            if any(is_image_name(f"x.{part}") for part in parts):
                suffixes = ", ".join(sorted(parts))
                raise UserError(f"{path}: {key} has no image KEY.jpg or KEY.png among {suffixes}", "bad-data")
            continue
        try:
            captions, _ = captions_and_metadata(parts)
        except (ValueError, RecursionError, UserError) as error:
            raise UserError(f"{path}: cannot read the caption of {key} ({error})", "bad-data") from error
        yield InputImage(key=_key(f"{key}.x"), name=image.name, source=image, prompt=captions[0])


def _is_table(path: Path) -> bool:
    return path.suffix == ".parquet"


def _from_table(table: Listing) -> Iterator[InputImage]:
    if table.problems:
        raise UserError(f"{table.origin}: {table.problems[0]}", "bad-data")
    for record in table.records:
        assert isinstance(record.image, TarMember)
        key = record.image.name.partition(".")[0]
        yield InputImage(
            key=_key(f"{key}.x"),
            name=f"{Path(table.origin).name}, {record.where}",
            source=record.image,
            prompt=record.prompt,
        )


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


def _walk(folder: Path, left_out: str | None, notes: list[str]) -> list[Path]:
    """Images below `folder`, or its tar shards or Parquet files if it has no images.

    Hidden folders, folders of pairs and of condition images are skipped, and files below `left_out` if there are
    others.

    Raises:
        UserError: it has both, or is itself a folder of pairs.
    """
    files = list(walk(folder, _is_output))
    notes += unread_note(folder, _outside((path for path in files if is_unread_image(path.name)), left_out))
    images = [path for path in files if is_image_name(path.name)]
    shards = [path for path in files if path.name.endswith((".tar", ".parquet")) and not path.name.startswith(".")]
    own_images, own_shards = _outside(images, left_out), _outside(shards, left_out)
    if own_images and (folder / MANIFEST).is_file() and _is_output(str(folder)):
        raise UserError(
            f"{folder} is a folder of pairs, whose condition images would be taken for photos; pass the folder of its"
            " images",
            "wrong-kind",
        )
    conditions = sorted({path.parent.name for path in own_images if path.parent.parent == folder} & set(registry()))
    if conditions and has_twins(folder):
        raise UserError(
            f"{folder} looks like pairs: {folder / conditions[0]} has the name of a condition, and images of the names"
            " that others have; pass the folders of the photos",
            "wrong-kind",
        )
    # A `datasets` image folder has captions in a table.
    beside = [path for path in own_shards if path.name not in METADATA]
    if own_images and beside:
        raise UserError(
            f"{folder} has images, such as {own_images[0]}, and tar shards or Parquet files, such as {beside[0]}; pass"
            " the ones that you mean: a folder with them alone, or a glob in quotes",
            "contradiction",
        )
    return own_images or own_shards or images or shards


def _is_output(folder: str) -> bool:
    return any(os.path.exists(os.path.join(folder, mark)) for mark in (STATE, CONDITION_IMAGES))


def _outside(paths: Iterable[Path], folder: str | None) -> list[Path]:
    """The paths that are not below `folder`, a real path that ends with a separator."""
    return [path for path in paths if folder is None or not os.path.realpath(path).startswith(folder)]


def _key(name: str) -> str:
    """`a/apple` for `a/apple.jpg`: no dots, which separate key and suffix in tar shards, and no characters that are
    illegal in Windows file names."""
    key = re.sub(r"[.\\\s:*?\"<>|]+", "_", name.rpartition(".")[0])
    return "/".join(filter(None, key.split("/"))) or "_"  # lists may have absolute paths: drop the root


def _with_unique_keys(images: Sequence[InputImage]) -> Iterator[InputImage]:
    taken: set[str] = set()
    for image in sorted(images, key=lambda image: (image.name, str(image.source))):
        key, number = image.key, 2
        # Some file systems ignore case.
        if key.casefold() in taken:
            key = f"{image.key}_{image.name.rpartition('.')[2].partition(',')[0].lower()}"
        while key.casefold() in taken:
            key, number = f"{image.key}_{number}", number + 1
        taken.add(key.casefold())
        yield image if key == image.key else replace(image, key=key)


def _former_state(path: Path) -> tuple[int, int] | None:
    state = file_state(path)
    return None if state is None else state[:2]
