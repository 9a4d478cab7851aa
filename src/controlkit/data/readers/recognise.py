"""Detect the layout of pairs at a path from its content."""

from __future__ import annotations

import glob
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from controlkit.conditions import find
from controlkit.data.readers.archives import read_tars
from controlkit.data.readers.coco import read_coco
from controlkit.data.readers.columns import ANY_COLUMNS, Columns
from controlkit.data.readers.folders import has_twins, images_in, read_multigen, read_twins
from controlkit.data.readers.image_tables import (
    has_image_cells,
    is_hub_dataset,
    is_parquet,
    is_saved_dataset,
    read_hub_dataset,
    read_parquet,
    read_saved_dataset,
)
from controlkit.data.readers.json_lines import (
    METADATA,
    first_entry,
    lists_images,
    read_manifest,
    read_metadata,
    read_prompt_json,
)
from controlkit.data.readers.listing import Listing, short_name
from controlkit.data.sources import ComputedCondition, Source
from controlkit.errors import UserError

MANIFEST = "pairs.jsonl"
PROMPT_JSON = "prompt.json"
_TABLES = (".jsonl", ".json", ".csv")
_HEAD = 1 << 20

LAYOUTS = f"""{MANIFEST} (controlkit pairs), {PROMPT_JSON} (source, target, prompt), metadata.jsonl,
metadata.csv and other tables of images (datasets), parquet files, folders of save_to_disk, datasets of the hub
(hf://datasets/OWNER/NAME), tar shards, images beside folders of condition images, MultiGen-20M, COCO annotations"""

Reader = Callable[[Path, str | None, Columns], Listing]


def read_listing(path: str | Path, condition: str | None = None, columns: Columns = ANY_COLUMNS) -> Listing:
    """List the pairs of a file, folder or glob in any layout; files are not checked yet.

    `PATH/NAME` is the condition NAME of the pairs at PATH, unless there are pairs at PATH/NAME.

    Args:
        condition: the condition to read, for layouts with one list per condition.
        columns: column names of a table.

    Raises:
        UserError: there is nothing at `path`, the layout is unknown, or a named column is missing.
    """
    if is_hub_dataset(path):
        return read_hub_dataset(path, str(path), columns)
    path = Path(path)
    within = _one_condition(path, columns) if (path.parent / MANIFEST).is_file() else None
    if within is not None:
        return within
    reader = _reader(path, columns)
    if reader is not None:
        return reader(path, condition, columns)
    within = _one_condition(path, columns)
    if within is not None:
        return within
    raise _unknown(path)


def pairs_folder(path: str | Path) -> Path:
    """The folder for files derived from the pairs at `path`."""
    if is_hub_dataset(path):
        return Path()
    path = Path(path)
    while not path.exists() and glob.has_magic(str(path)):
        path = path.parent
    return path if path.is_dir() else path.parent


def _one_condition(path: Path, columns: Columns) -> Listing | None:
    """The condition `path.name` of the pairs at `path.parent`; None if there is none."""
    try:
        outer = None if path.is_file() or path.parent == path else _reader(path.parent, columns)
        listing = outer(path.parent, path.name, columns) if outer is not None else None
    except UserError:
        return None  # errors in the parent folder are irrelevant to `path`
    name = listing.chosen(path.name) if listing is not None else None
    if listing is None or name is None or path.name not in (name, *_names_of(name)):
        return None
    records = []
    for record in listing.records:
        own = _only(record.conditions, name)
        if listing.computes and not own and not isinstance(record.image, ComputedCondition):
            own = {name: ComputedCondition(target=record.image, condition=name)}
        records.append(replace(record, conditions=own))
    return replace(listing, records=records)


def _reader(path: Path, columns: Columns) -> Reader | None:
    if path.is_dir():
        return _folder_reader(path, columns)
    if path.is_file():
        return _file_reader(path, columns)
    found = sorted(Path(name) for name in glob.glob(str(path)))
    return _archive_reader(found)


def _folder_reader(folder: Path, columns: Columns) -> Reader | None:
    for name, reader in ((MANIFEST, read_manifest), (PROMPT_JSON, read_prompt_json)):
        if (folder / name).is_file():
            return _at(folder / name, reader)
    if (folder / "json_files").is_dir():
        return _without_columns(read_multigen, "MultiGen-20M")
    if is_saved_dataset(folder):
        return lambda path, condition, columns: read_saved_dataset(folder, path, columns)
    metadata = [folder / name for name in METADATA if (folder / name).is_file()]
    metadata = metadata or sorted(file for name in METADATA for file in folder.glob(f"*/{name}"))
    if metadata:
        return _at(_only_split(folder, metadata), read_metadata)
    for pattern in ("*.tar", "*.parquet", "data/*.parquet", "*/*.parquet"):
        found = sorted(path for path in folder.glob(pattern) if not path.name.startswith("."))
        splits = {path.name.split("-")[0] for path in found} if pattern != "*.tar" else set()
        if len(splits) > 1 and "train" in splits:
            raise UserError(
                f"{folder} has the splits {', '.join(sorted(splits))}; name one: '{found[-1].parent}/train-*'",
                "missing-setting",
            )
        if found:
            return _archive_reader(found)
    tables = _tables(folder, columns)
    if tables:
        return _at(_only_split(folder, tables), _file_reader(tables[0], columns) or read_metadata)
    # The captions of a file of objects are read with it.
    captions = sorted(folder.glob("annotations/captions_*.json"))
    objects = [path.with_name(path.name.replace("captions_", "instances_", 1)) for path in captions]
    annotations = [two if two.is_file() else one for one, two in zip(captions, objects, strict=True)]
    annotations = annotations or sorted(folder.glob("annotations/*.json"))
    if annotations:
        return _at(_only_split(folder, annotations), _without_columns(read_coco, "COCO annotations"))
    return _without_columns(read_twins, "folders of images of the same names") if has_twins(folder) else None


def _tables(folder: Path, columns: Columns) -> list[Path]:
    """Tables with images in a folder or its subfolders; with `columns`, all tables if none has images."""
    for pattern in ("*", "*/*"):
        files = [path for path in folder.glob(pattern) if path.suffix in _TABLES and path.is_file()]
        files = sorted(file for file in files if not any(part.startswith(".") for part in file.parts[-2:]))
        found = [file for file in files if lists_images(file, columns)]
        if found or (files and columns.named):
            return found or files
    return []


def _file_reader(path: Path, columns: Columns) -> Reader | None:
    with path.open("rb") as stream:
        head = stream.read(_HEAD)
    if head[257:262] == b"ustar" or path.suffix == ".tar" or head.startswith(b"PAR1"):
        return _archive_reader([path])
    if path.suffix == ".csv":
        return read_metadata
    entry = first_entry(path)
    if not isinstance(entry, dict):
        # A JSON document of several lines, or with a first line longer than `_HEAD`.
        coco = head.lstrip().startswith(b"{") and b'"images"' in head
        return _without_columns(read_coco, "COCO annotations") if coco else None
    if isinstance(entry.get("conditions"), dict) and "image" in entry:
        return read_manifest
    for keys, reader in (
        ({"picture", "conditions"}, read_manifest),
        ({"source", "target"}, read_prompt_json),
        ({"file_name"}, read_metadata),
        ({"images", "annotations"}, _without_columns(read_coco, "COCO annotations")),
    ):
        if keys <= set(entry):
            return reader
    return read_metadata if columns.named or lists_images(path, columns) else None


def _archive_reader(paths: Sequence[Path]) -> Reader | None:
    if not paths or not all(path.is_file() for path in paths):
        return None
    if all(path.suffix == ".parquet" or is_parquet(path) for path in paths):
        if len(paths) == 1 and not has_image_cells(paths[0]):
            return _at(paths[0], read_metadata)
        return lambda path, condition, columns: read_parquet(paths, path, columns)
    return _without_columns(lambda path, condition: read_tars(paths, path), "tar shards")


def _without_columns(reader: Callable[[Path, str | None], Listing], what: str) -> Reader:
    """A reader that rejects named columns, for layouts without columns."""

    def read(path: Path, condition: str | None, columns: Columns) -> Listing:
        columns.reject(path, what)
        return reader(path, condition)

    return read


def _at(path: Path, reader: Reader) -> Reader:
    return lambda _, condition, columns: reader(path, condition, columns)


def _only_split(folder: Path, files: Sequence[Path]) -> Path:
    if len(files) > 1:
        raise UserError(f"{folder} has several lists; name one: {', '.join(map(str, files))}", "missing-setting")
    return files[0]


def _names_of(name: str) -> tuple[str, ...]:
    try:
        return (short_name(name), *find(name).aliases)
    except UserError:
        return (short_name(name),)


def _only(conditions: Mapping[str, Source], name: str) -> dict[str, Source]:
    return {name: conditions[name]} if name in conditions else {}


def _unknown(path: Path) -> UserError:
    layouts = " ".join(LAYOUTS.split())
    if not path.exists():
        return UserError(f"there are no pairs at {path}; supported layouts: {layouts}", "missing-file")
    if path.is_dir() and images_in(path):
        return UserError(
            f"{path} has images but no condition images; make pairs:"
            f" controlkit pairs {path} --conditions canny --out DIR",
            "empty-data",
        )
    return UserError(f"{path} has no pairs in a supported layout: {layouts}", "wrong-kind")
