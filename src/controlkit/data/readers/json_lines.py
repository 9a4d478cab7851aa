"""Layouts with one entry per pair: pairs.jsonl, ControlNet's prompt.json, and tables of image names (JSON lines, JSON
arrays, CSV, Parquet)."""

from __future__ import annotations

import ast
import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from controlkit.data.readers.columns import (
    ANY_COLUMNS,
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    Columns,
    all_of,
    captions_in,
    captions_of,
    first_of,
)
from controlkit.data.readers.image_tables import is_parquet
from controlkit.data.readers.listing import Listing, Record
from controlkit.data.sources import is_image_name
from controlkit.errors import Code, UserError
from controlkit.files import decode_text, valid_text

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
"""Tables of a `datasets` image folder."""
_HEAD = 1 << 20
_LONGEST = 80


def read_manifest(path: Path, condition: str | None = None, columns: Columns = ANY_COLUMNS) -> Listing:
    """`pairs.jsonl`, written by `controlkit pairs`; the key of the image is `picture` or `image`."""
    columns.reject(path, "the manifest of controlkit pairs")

    def record(where: str, entry: Mapping[str, Any]) -> Record:
        listed = _value(entry, "conditions")
        if not isinstance(listed, Mapping):
            raise UserError(f"'conditions' is {_shown(listed)}; expected an object of file names", "bad-data")
        conditions = {valid_text(str(name), "the condition"): _file(path.parent, listed, name) for name in listed}
        image = _file(path.parent, entry, "picture" if "picture" in entry else "image")
        captions = captions_of(_value(entry, "prompt"))
        return Record(where=where, image=image, conditions=conditions, captions=captions, metadata=entry)

    return _listing(path, list(_entries(path)), record, "image, conditions and prompt")


def read_prompt_json(path: Path, condition: str | None = None, columns: Columns = ANY_COLUMNS) -> Listing:
    """`prompt.json` of lllyasviel/ControlNet and xyfJASON/ctrlora: source, target, prompt."""
    lines = list(_entries(path))
    known = _names(lines)
    columns.check(path, known)
    # `source` and `target` identify the layout; captions may have any common name.
    default = "prompt" if "prompt" in known else first_of(CAPTION_COLUMNS, known) or "prompt"
    image, condition_image = columns.image or "target", columns.conditioning_image or "source"
    caption = columns.caption or default

    def record(where: str, entry: Mapping[str, Any]) -> Record:
        source, target = _file(path.parent, entry, condition_image), _file(path.parent, entry, image)
        captions = captions_of(_value(entry, caption))
        return Record(where=where, image=target, conditions={condition_image: source}, captions=captions)

    return _listing(path, lines, record, f"{condition_image}, {image} and {caption}")


def read_metadata(path: Path, condition: str | None = None, columns: Columns = ANY_COLUMNS) -> Listing:
    """A table of image names in JSON lines, a JSON array, CSV or Parquet: `metadata.jsonl` of a `datasets` image folder
    (`file_name`, `text`), `train.jsonl` with `image`, `conditioning_image`, `text`, and the like.

    Columns not named in `columns` are found by common names (`columns.py`); all other columns with image file names are
    condition images (`conditioning_image`, `canny_file_name`, ...).

    Raises:
        UserError: a named column is missing.
    """
    as_csv = path.suffix == ".csv"
    lines = list(_entries(path))
    known = _names(lines)
    columns.check(path, known)

    def record(where: str, entry: Mapping[str, Any]) -> Record:
        for name in columns.named.values():
            _value(entry, name)
        image = columns.image or _image_column(entry)
        value = entry[columns.caption] if columns.caption else captions_in(entry)
        named = [columns.conditioning_image] if columns.conditioning_image else _condition_columns(entry, image)
        return Record(
            where=where,
            image=_file(path.parent, entry, image),
            conditions={name: _file(path.parent, entry, name) for name in named if name != columns.caption},
            captions=captions_of(_listed(value) if as_csv else value),
        )

    notes = columns.caption_notes(path, known)
    return _listing(path, lines, record, "file_name, text and a conditioning image", notes)


def lists_images(path: Path, columns: Columns = ANY_COLUMNS) -> bool:
    """Whether the first entry of a table (`read_metadata`) has an image and a condition image, or a column of
    `columns`."""
    try:
        first = first_entry(path)
    except UserError:
        return False
    if not isinstance(first, Mapping):
        return False
    if any(name in first for name in columns.named.values()):
        return True
    image = first_of(IMAGE_COLUMNS, first)
    return image is not None and _names_image(first[image]) and bool(_condition_columns(first, image))


def first_entry(path: Path) -> Any:
    """The first entry of a table in JSON lines, a JSON array, CSV or Parquet; None if it cannot be parsed.

    Raises:
        UserError: it is a CSV or Parquet file and cannot be read.
    """
    if is_parquet(path):
        return next(_entries(path), ("", None))[1]
    if path.suffix == ".csv":
        return next(_csv_rows(_text(path)), ("", None, False))[1]
    try:
        with path.open("rb") as stream:
            text = stream.read(_HEAD).decode("utf-8-sig", "ignore").lstrip()
        if not text.startswith("["):
            text = text.split("\n")[0]
        start = len(text) - len(text.removeprefix("[").lstrip())
        return json.JSONDecoder().raw_decode(text, start)[0]
    except (OSError, ValueError, RecursionError):
        return None


def _image_column(entry: Mapping[str, Any]) -> str:
    return first_of(("file_name", *IMAGE_COLUMNS), entry) or "file_name"


def _condition_columns(entry: Mapping[str, Any], image: str) -> list[str]:
    excluded = {image, *all_of(CAPTION_COLUMNS, entry)}
    return [name for name, value in entry.items() if name not in excluded and _names_image(value)]


Line = tuple[str, Any]
"""Where an entry is, and the entry, or the exception that parsing it raised."""


class _Missing(UserError):
    """An entry lacks a key."""


def _value(entry: Mapping[str, Any], name: str) -> Any:
    if name not in entry:
        raise _Missing(f"there is no {name!r}", "bad-data")
    return entry[name]


def _file(folder: Path, entry: Mapping[str, Any], name: str) -> Path:
    value = _value(entry, name)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{name!r} is {_shown(value)}; expected the name of a file", "bad-data")
    return folder / valid_text(value, "the name")


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _listing(
    path: Path,
    lines: list[Line],
    record: Callable[[str, Mapping[str, Any]], Record],
    expected: str,
    notes: list[str] | None = None,
) -> Listing:
    records: list[Record] = []
    problems: list[str] = []
    for where, entry in lines:
        try:
            if isinstance(entry, UserError):
                raise entry
            if isinstance(entry, Exception):
                raise UserError(f"not an object with {expected} ({entry})", "bad-data")
            if not isinstance(entry, Mapping):
                raise UserError(f"expected an object with {expected}, not {_shown(entry)}", "bad-data")
            records.append(record(where, entry))
        except _Missing as error:
            problems.append(f"{where}: {error}; expected {expected}")
        except UserError as error:
            problems.append(f"{where}: {error}")
    return Listing(origin=path, records=records, problems=problems, notes=notes or [], folder=path.parent)


def _names(lines: list[Line]) -> list[str]:
    """All columns, in order of first occurrence."""
    entries = (entry for _, entry in lines if isinstance(entry, Mapping))
    return list(dict.fromkeys(name for entry in entries for name in entry))


def _listed(value: Any) -> Any:
    """Parse a list in a CSV cell, in JSON or Python syntax; other cells are returned unchanged."""
    if not isinstance(value, str) or not (value.startswith("[") and value.endswith("]")):
        return value
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(found, list) and found and all(isinstance(text, str) for text in found):
            return found
    return value


def _entries(path: Path) -> Iterator[Line]:
    """The entries of a table.

    Raises:
        UserError: the file cannot be read, or is a damaged JSON array.
    """
    if is_parquet(path):
        return _parquet_rows(path)
    text = _text(path)
    if path.suffix == ".csv":
        return _csv_lines(text)
    if text.lstrip().startswith("["):
        try:
            found = json.loads(text)
        except RecursionError as error:
            raise UserError(f"{path} is nested too deeply for a table", "damaged-file") from error
        except json.JSONDecodeError as error:
            if _is_json(text.lstrip().split("\n")[0]):
                return _json_lines(text)
            raise UserError(f"{path} is not a valid JSON array: {error}", "damaged-file") from error
        return ((f"entry {number}", entry) for number, entry in enumerate(found, 1))
    return _json_lines(text)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _parquet_rows(path: Path) -> Iterator[Line]:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise UserError("Parquet needs pyarrow: pip install 'controlkit[parquet]'", "missing-package") from error
    try:
        rows = parquet.read_table(path).to_pylist()
    except (arrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a Parquet file, or damaged ({error})", "damaged-file") from error
    return ((f"row {number}", row) for number, row in enumerate(rows))


def _json_lines(text: str) -> Iterator[Line]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:  # a ValueError also for a number of too many digits
                yield f"line {number}", ValueError(str(error))


def _csv_lines(text: str) -> Iterator[Line]:
    for where, row, surplus in _csv_rows(text):
        if surplus:
            yield where, UserError("more cells than columns; put texts that contain commas in quotes", "bad-data")
        else:
            yield where, row


def _csv_rows(text: str) -> Iterator[tuple[str, Any, bool]]:
    """Where each row is, the row (or the exception that parsing it raised), and whether text was left over after the
    last column."""
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        for row in reader:
            surplus = any(map(str.strip, row.pop(None, None) or ()))
            yield f"line {reader.line_num}", {str(name): value for name, value in row.items()}, surplus
    except csv.Error as error:  # a stray quote swallows the rest up to a limit, after which the reader cannot continue
        yield f"line {reader.line_num + 1}", ValueError(str(error)), False


def _names_image(value: Any) -> bool:
    return isinstance(value, str) and is_image_name(value) and "://" not in value


def _text(path: Path) -> str:
    try:
        return decode_text(path.read_bytes())
    except (OSError, UnicodeDecodeError) as error:
        code: Code = "unreadable-file" if isinstance(error, OSError) else "damaged-file"
        raise UserError(f"cannot read {path} as UTF-8 text ({error})", code) from error
