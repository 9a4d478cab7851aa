"""Layouts with a line for each pair: our manifest, the reference's prompt.json, metadata of image folders."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from controlkit.data.readers.listing import Listing, Record
from controlkit.data.sources import is_picture_name
from controlkit.errors import UserError
from controlkit.files import decode_text

PROMPT_COLUMNS = ("text", "prompt", "caption")
PICTURE_COLUMNS = ("image", "target", "picture", "jpg", "file_name", "image_file_name")


def read_manifest(path: Path, condition: str | None = None) -> Listing:
    """`pairs.jsonl`, as `controlkit pairs` writes it."""

    def record(where: str, entry: Mapping[str, Any]) -> Record:
        conditions = {str(name): path.parent / file for name, file in entry["conditions"].items()}
        picture, prompt = path.parent / entry["picture"], str(entry["prompt"] or "")
        return Record(where=where, picture=picture, conditions=conditions, prompt=prompt, made=entry)

    return _listing(path, _json_lines(path), record, "picture, conditions and prompt")


def read_prompt_json(path: Path, condition: str | None = None) -> Listing:
    """`prompt.json` of lllyasviel/ControlNet and xyfJASON/ctrlora: source, target, prompt."""

    def record(where: str, entry: Mapping[str, Any]) -> Record:
        source, target = path.parent / entry["source"], path.parent / entry["target"]
        return Record(where=where, picture=target, conditions={"source": source}, prompt=str(entry["prompt"] or ""))

    return _listing(path, _json_lines(path), record, "source, target and prompt")


def read_metadata(path: Path, condition: str | None = None) -> Listing:
    """`metadata.jsonl` or `metadata.csv` of an image folder of `datasets`: file_name, a text column, and columns with
    the names of condition images (`conditioning_image`, `canny_file_name`, ...)."""

    def record(where: str, entry: Mapping[str, Any]) -> Record:
        used = next((name for name in ("file_name", *PICTURE_COLUMNS) if name in entry), "file_name")
        conditions = {
            name: path.parent / value
            for name, value in entry.items()
            if name != used and isinstance(value, str) and _is_file_name(value) and name not in PROMPT_COLUMNS
        }
        prompt = next((str(entry[name] or "") for name in PROMPT_COLUMNS if name in entry), "")
        return Record(where=where, picture=path.parent / entry[used], conditions=conditions, prompt=prompt)

    lines = _csv_lines(path) if path.suffix == ".csv" else _json_lines(path)
    return _listing(path, lines, record, "file_name, a text and a conditioning image")


Lines = Iterator[tuple[str, Mapping[str, Any] | Exception]]


def _listing(path: Path, lines: Lines, record: Callable[[str, Mapping[str, Any]], Record], wanted: str) -> Listing:
    records: list[Record] = []
    problems: list[str] = []
    for where, entry in lines:
        try:
            if isinstance(entry, Exception):
                raise entry
            records.append(record(where, entry))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            problems.append(f"{where}: not an object with {wanted} ({error!r})")
    return Listing(origin=path, records=records, problems=problems)


def _json_lines(path: Path) -> Lines:
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                yield f"line {number}", ValueError(str(error))


def _csv_lines(path: Path) -> Lines:
    reader = csv.DictReader(io.StringIO(_text(path), newline=""))
    try:
        for row in reader:
            yield f"line {reader.line_num}", {str(name): value for name, value in row.items() if name is not None}
    except csv.Error as error:  # a stray quote swallows what follows, up to a limit; the reader cannot go on
        yield f"line {reader.line_num + 1}", ValueError(str(error))


def _is_file_name(value: str) -> bool:
    return is_picture_name(value) and "://" not in value


def _text(path: Path) -> str:
    try:
        return decode_text(path.read_bytes())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} as UTF-8 text ({error})") from error
