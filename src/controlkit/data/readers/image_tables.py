"""Tables with the images in their cells: Parquet files, datasets written by `Dataset.save_to_disk`, and datasets of
the Hugging Face hub."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from controlkit.data.readers.archives import read_tars, write_tar
from controlkit.data.readers.columns import (
    ANY_COLUMNS,
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    Columns,
    all_of,
    captions_in,
    first_of,
)
from controlkit.data.readers.listing import Listing, check_own, outside_note, problems_error, short_name
from controlkit.data.sources import members
from controlkit.errors import UserError, nearest
from controlkit.files import file_state, remove_leftovers, sha256_of, writable_folder

_VERSION = "2"
"""Version of the unpacked tar shards."""
_NOTES = ".notes.json"
"""Member of an unpacked shard with notes on the table. Without a key, it is not a sample."""
_LINKED = ".linked.json"
"""Member with size and time of every file that the table refers to by path."""
_MAGIC = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpg", b"RIFF": "webp", b"BM": "bmp", b"GIF8": "gif", b"II*": "tif"}
_SAVED, _SAVED_SPLITS = "dataset_info.json", "dataset_dict.json"
_HUB = re.compile(r"hf:/{1,2}datasets/([^/]+/[^/]+)(?:/(.+))?")
_ROWS = 16
"""Rows read at once."""


@dataclass(frozen=True, kw_only=True)
class _Table:
    """An Arrow table that is read in batches."""

    name: object
    """For errors: its path or address."""
    group: object
    """For notes: `name`, or the folder of several files."""
    folder: Path
    """What paths in its cells are relative to."""
    schema: Any
    """`pyarrow.Schema`."""
    batches: Callable[[list[str]], Iterable[Any]]
    """Columns -> record batches or tables."""


def read_parquet(paths: Sequence[Path], origin: Path | str, columns: Columns = ANY_COLUMNS) -> Listing:
    """Parquet files with image columns (`{bytes, path}` or plain bytes) and a text column, as `datasets` writes them.

    Parquet has no random access to rows, so the images are copied once into a tar shard in `.controlkit` beside the
    files, and read from there.

    Raises:
        UserError: pyarrow is missing, a file is damaged or has no image column, or a named column is missing.
    """
    files = [f"{path.resolve()} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in paths]
    home = paths[0].parent / ".controlkit"
    # Shards of version 1 lack captions under other names and lists of captions.
    (home / f"parquet-{sha256_of(*files)[:16]}.tar").unlink(missing_ok=True)
    unpacked = home / f"parquet-{sha256_of(_VERSION, repr(columns), *files)[:16]}.tar"
    return _unpacked(unpacked, _parquet_tables(paths), origin, columns)


def is_parquet(path: Path) -> bool:
    """Whether a file is a Parquet file, by its first bytes."""
    with path.open("rb") as stream:
        return stream.read(4) == b"PAR1"


def has_image_cells(path: Path) -> bool:
    """Whether a Parquet file has a column of images, not only of their names.

    Raises:
        UserError: pyarrow is missing, or the file is damaged.
    """
    (table,) = _parquet_tables([path])
    return bool(_image_columns(table.schema))


def is_saved_dataset(folder: Path) -> bool:
    """Whether a folder was written by `save_to_disk` of a `Dataset` or a `DatasetDict`."""
    return any((folder / name).is_file() for name in (_SAVED, _SAVED_SPLITS))


def read_saved_dataset(folder: Path, origin: Path | str, columns: Columns = ANY_COLUMNS) -> Listing:
    """A dataset written by `save_to_disk`, with columns as in `read_parquet`; a folder of splits stands for the only
    one.

    Raises:
        UserError: `datasets` is missing, the folder is damaged or has several splits, or as `read_parquet`.
    """
    library = _datasets()
    try:
        loaded = library.load_from_disk(str(folder))
    except Exception as error:  # of pyarrow, JSON or the file system, by what is damaged
        message = f"{folder} is not a dataset of save_to_disk, or damaged: {_first(error)}"
        raise UserError(message, "damaged-file") from error
    if isinstance(loaded, Mapping):
        loaded, _ = _split(loaded, str(folder), "")
    return _read_dataset(loaded, folder, folder, origin, columns)


def is_hub_dataset(path: str | Path) -> bool:
    """Whether a path is the address of a dataset of the hub, `hf://datasets/OWNER/NAME`."""
    return _HUB.fullmatch(str(path)) is not None


def read_hub_dataset(path: str | Path, origin: Path | str, columns: Columns = ANY_COLUMNS) -> Listing:
    """`hf://datasets/OWNER/NAME[/SPLIT][/CONDITION]`, downloaded by `datasets` into its cache, columns as in
    `read_parquet`.

    Raises:
        UserError: `datasets` is missing, the dataset cannot be loaded, there are several splits and none is named,
            the condition is not a column, or as `read_parquet`.
    """
    found = _HUB.fullmatch(str(path))
    assert found is not None
    repository, rest = found[1], found[2] or ""
    library = _datasets()
    try:
        splits = library.load_dataset(repository)
    except Exception as error:  # of the hub, the network, or the format of the files
        offline = " (HF_HUB_OFFLINE is set)" if library.config.HF_HUB_OFFLINE else ""
        raise UserError(f"cannot load the dataset {repository}{offline}: {_first(error)}", "download-failed") from error
    address = f"hf://datasets/{repository}"
    dataset, condition = _split(splits, address, rest)
    home = Path(dataset.cache_files[0]["filename"]).parent
    listing = _read_dataset(dataset, home, address, origin, columns)
    if not condition:
        return listing
    chosen = listing.chosen(condition)
    if chosen is None or condition not in (chosen, short_name(chosen)):
        raise UserError(
            f"{address} has neither a split nor a condition {condition!r}; splits: {', '.join(splits)}; conditions:"
            f" {', '.join(listing.conditions) or 'none'}{nearest(condition, listing.conditions)}",
            "unknown-name",
        )
    records = [
        replace(record, conditions={chosen: record.conditions[chosen]} if chosen in record.conditions else {})
        for record in listing.records
    ]
    return replace(listing, records=records)


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        message = "saved datasets and those of the hub need datasets: pip install 'controlkit[datasets]'"
        raise UserError(message, "missing-package") from error
    return datasets


def _first(error: Exception) -> str:
    return str(error).split("\n")[0] or type(error).__name__


def _split(splits: Mapping[str, Any], name: str, rest: str) -> tuple[Any, str]:
    """The split that `rest` starts with, or the only one, and what is left of `rest`."""
    first, _, others = rest.partition("/")
    if first in splits:
        return splits[first], others
    if len(splits) == 1:
        return next(iter(splits.values())), rest
    raise UserError(
        f"{name} has the splits {', '.join(splits)}; name one: {name}/{next(iter(splits), 'train')}", "missing-setting"
    )


def _read_dataset(dataset: Any, home: Path, name: object, origin: Path | str, columns: Columns) -> Listing:
    def batches(names: list[str]) -> Iterable[Any]:
        return dataset.select_columns(names).with_format("arrow").iter(batch_size=_ROWS)

    table = _Table(name=name, group=name, folder=home, schema=dataset.features.arrow_schema, batches=batches)
    unpacked = home / ".controlkit" / f"dataset-{sha256_of(_VERSION, repr(columns), dataset._fingerprint)[:16]}.tar"
    return _unpacked(unpacked, [table], origin, columns)


def _parquet_tables(paths: Sequence[Path]) -> Iterator[_Table]:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise UserError("Parquet needs pyarrow: pip install 'controlkit[parquet]'", "missing-package") from error
    for path in paths:
        try:
            file = parquet.ParquetFile(path)
        except (arrow.ArrowException, OSError) as error:
            raise UserError(f"{path} is not a Parquet file, or damaged ({error})", "damaged-file") from error

        def batches(names: list[str], file: Any = file) -> Iterable[Any]:
            return file.iter_batches(batch_size=_ROWS, columns=names)

        group = path if len(paths) == 1 else path.parent
        yield _Table(name=path, group=group, folder=path.parent, schema=file.schema_arrow, batches=batches)


def _unpacked(shard: Path, tables: Iterable[_Table], origin: Path | str, columns: Columns) -> Listing:
    """The listing of a shard, which is written first if it does not exist or files that it was made from changed."""
    if not _is_fresh(shard):
        # Processes of one run read their pairs at the same time: the first unpacks them.
        with FileLock(writable_folder(shard.parent, "copy the table to a writable folder") / f"{shard.name}.lock"):
            if not _is_fresh(shard):
                remove_leftovers(shard)
                write_tar(shard, _members(tables, origin, columns))
    listing = read_tars([shard], origin)
    start = f"{shard.name}:"
    records = [replace(record, where=_row(record.where.removeprefix(start))) for record in listing.records]
    problems = [_row(text.removeprefix(start)) for text in listing.problems]
    return Listing(origin=origin, records=records, problems=problems, notes=_hidden(shard, _NOTES) or [])


def _is_fresh(shard: Path) -> bool:
    """Whether a shard exists, and the files that were copied into it are unchanged; False for earlier versions."""
    if not shard.is_file():
        return False
    linked = _hidden(shard, _LINKED)
    return linked is not None and all(list(file_state(Path(path)) or ()) == state for path, state in linked.items())


def _hidden(shard: Path, name: str) -> Any:
    """The value in a JSON member of a shard that is not a sample; None if there is none."""
    found = next((member.read_bytes() for member in members(shard) if member.name == name), b"null")
    return json.loads(found)


def _row(text: str) -> str:
    """`row 7: ...` for `000000007: ...`."""
    number, colon, rest = text.partition(":")
    return f"row {int(number)}{colon}{rest}" if number.isdecimal() else text


def _members(tables: Iterable[_Table], origin: object, chosen: Columns) -> Iterator[tuple[str, bytes]]:
    """Members of the tar shard: images and text of each row, and notes at the end.

    Raises:
        UserError: files that the tables refer to are missing.
    """
    import pyarrow as arrow

    number = 0
    notes: list[str] = []
    linked = _Linked()
    for table in tables:
        known = list(table.schema.names)
        image, condition_columns, texts = _columns_of(table.name, known, _image_columns(table.schema), chosen)
        notes += chosen.caption_notes(table.group, known)
        names = _middle_names(condition_columns)
        try:
            for batch in table.batches([image, *condition_columns, *texts]):
                for row in batch.to_pylist():
                    for name in (image, *condition_columns):
                        data = linked.bytes_of(row[name], table.folder, f"row {number}")
                        if data is not None:
                            middle = "" if name == image else f"{names[name]}."
                            yield f"{number:09d}.{middle}{_kind(data)}", data
                    yield _text_member(number, row[chosen.caption] if chosen.caption else captions_in(row))
                    number += 1
        except (arrow.ArrowException, OSError) as error:
            raise UserError(f"{table.name} is damaged ({error})", "damaged-file") from error
    if linked.problems:
        raise problems_error(origin, linked.problems, "add the files, or remove these rows")
    yield _LINKED, json.dumps(linked.states).encode()
    if linked.outside:
        notes.append(outside_note(table.folder, len(linked.outside), linked.count, linked.outside[0]))
    if notes:
        yield _NOTES, json.dumps(list(dict.fromkeys(notes))).encode()


def _image_columns(schema: Any) -> list[str]:
    """Columns with images: binary, or structs with `bytes` and `path`."""
    import pyarrow.types as types

    def holds_images(kind: Any) -> bool:
        binary = types.is_binary(kind) or types.is_large_binary(kind)
        return binary or (types.is_struct(kind) and "bytes" in {field.name for field in kind})

    return [field.name for field in schema if holds_images(field.type)]


def _columns_of(
    origin: object, known: Sequence[str], images: Sequence[str], chosen: Columns
) -> tuple[str, list[str], list[str]]:
    """The columns of images, condition images and captions.

    Raises:
        UserError: there is no image column, or a named one is missing or has no images.
    """
    chosen.check(origin, known)
    for name in (chosen.image, chosen.conditioning_image):
        if name is not None and name not in images:
            raise UserError(
                f"the column {name!r} of {origin} has no images; columns with images: {', '.join(images)}", "wrong-type"
            )
    image = chosen.image or first_of(IMAGE_COLUMNS, images)
    if image is None:
        raise UserError(
            f"{origin} has no image column named {', '.join(IMAGE_COLUMNS[:4])}; pass --image-column NAME (its columns"
            f" are {', '.join(known)})",
            "missing-setting",
        )
    others = [name for name in images if name != image]
    texts = [chosen.caption] if chosen.caption else all_of(CAPTION_COLUMNS, known)
    condition_columns = [chosen.conditioning_image] if chosen.conditioning_image else others
    return image, condition_columns, [name for name in texts if name not in images]


def _middle_names(columns: Sequence[str]) -> dict[str, str]:
    """Column -> name of its condition in the shard: the short name where it is unique."""
    short = {name: short_name(name).lower() for name in columns}
    return {name: label if list(short.values()).count(label) == 1 else name for name, label in short.items()}


def _text_member(number: int, value: Any) -> tuple[str, bytes]:
    """The member with the caption of a row; other values than text go through JSON, to be parsed or rejected later."""
    if value is None or isinstance(value, str):
        return f"{number:09d}.txt", (value or "").encode()
    return f"{number:09d}.json", json.dumps({CAPTION_COLUMNS[0]: value}, default=repr).encode()


@dataclass
class _Linked:
    """Images that a table refers to by path."""

    count: int = 0
    outside: list[Path] = field(default_factory=list)
    """Paths outside of its folder."""
    states: dict[str, list[int]] = field(default_factory=dict)
    """Absolute path -> `file_state`; empty if there is no file."""
    problems: list[str] = field(default_factory=list)

    def bytes_of(self, value: Any, folder: Path, where: str) -> bytes | None:
        if not isinstance(value, Mapping):
            return value
        data, path = value.get("bytes"), value.get("path")
        if data is not None or not path:
            return data
        file = folder / path
        self.count += 1
        inside = os.path.abspath(file).startswith(os.path.join(os.path.abspath(folder), ""))
        check_own(inside)
        if not inside:
            self.outside.append(file)
        self.states[os.path.abspath(file)] = list(file_state(file) or ())
        try:
            return file.read_bytes()
        except OSError as error:
            missing = isinstance(error, FileNotFoundError)
            reason = f"there is no {path}" if missing else f"cannot read {path}: {error.strerror or error}"
            self.problems.append(f"{where}: {reason}")
            return None


def _kind(data: bytes) -> str:
    """The extension for the bytes of an image; `png` for anything else, which fails when it is read."""
    return next((kind for magic, kind in _MAGIC.items() if data.startswith(magic)), "png")
