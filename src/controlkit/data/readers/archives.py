"""Pairs in tar shards (webdataset naming) and in Parquet files; writing of tar shards."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from controlkit.data.readers.listing import Listing, Record, outside_note, short_name
from controlkit.data.sources import TarMember, inside_name, is_image_name, members, samples
from controlkit.errors import UserError
from controlkit.files import decode_text, sha256_of, write_atomically

_VERSION = "2"
"""Version of the tar shards unpacked from Parquet files."""
_IMAGES = ("target", "image", "picture")
_NOTES = ".notes.json"
"""Member of an unpacked shard with notes on the Parquet file. Without a key, it is not a sample."""
_MAGIC = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpg", b"RIFF": "webp", b"BM": "bmp", b"GIF8": "gif", b"II*": "tif"}


def read_tars(paths: Sequence[Path], origin: Path) -> Listing:
    """`KEY.jpg`, `KEY.NAME.png` for each condition, and the caption in `KEY.txt`, `KEY.caption` or `KEY.json`.

    Shards are read in place. Keys must be unique across shards.
    """
    records: list[Record] = []
    problems: list[str] = []
    shard_of: dict[str, Path] = {}
    for path in paths:
        for key, parts in samples(path, problems).items():
            where = f"{path.name}:{key}"
            if key in shard_of:
                problems.append(f"{where}: the key also occurs in {shard_of[key].name}")
                continue
            shard_of[key] = path
            image = image_of(parts)
            if image is None:
                problems.append(f"{where}: there is no image (KEY.jpg, KEY.png) among {', '.join(sorted(parts))}")
                continue
            try:
                captions, metadata = captions_and_metadata(parts)
            except UserError as error:
                problems.append(f"{where}: {error}")
                continue
            except (ValueError, RecursionError) as error:
                problems.append(f"{where}: cannot read its caption ({error})")
                continue
            conditions = {
                name.rpartition(".")[0]: part
                for name, part in sorted(parts.items())
                if part is not image and is_image_name(f"x.{name}")
            }
            records.append(
                Record(where=where, image=image, conditions=conditions, captions=captions, metadata=metadata)
            )
    return Listing(origin=origin, records=records, problems=problems)


def image_of(parts: Mapping[str, TarMember]) -> TarMember | None:
    """The image of a key: the only one without a second extension, or the one named target, image or picture."""
    images = sorted(name for name in parts if is_image_name(f"x.{name}"))
    plain = [name for name in images if "." not in name]
    named = [name for name in images if name.partition(".")[0] in _IMAGES]
    for found in (plain, named):
        if len(found) == 1:
            return parts[found[0]]
    return None


def captions_and_metadata(parts: Mapping[str, TarMember]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The captions of a key (one empty caption if there is none), and its JSON object.

    Raises:
        ValueError: they are not UTF-8 or not JSON.
        UserError: the caption in the JSON file is neither text nor a list of texts.
    """
    metadata: dict[str, Any] = {}
    if "json" in parts:
        value = json.loads(decode_text(parts["json"].read_bytes()))
        metadata = value if isinstance(value, dict) else {}
    for name in ("txt", "caption"):
        if name in parts:
            text = decode_text(parts[name].read_bytes()).strip()
            if text:
                return (text,), metadata
    return captions_of(captions_in(metadata)), metadata


def read_parquet(paths: Sequence[Path], origin: Path, columns: Columns = ANY_COLUMNS) -> Listing:
    """Parquet files of `datasets`: image columns (`{bytes, path}` or plain bytes) and a text column.

    Parquet has no random access to rows, so the images are copied once into a tar shard in `.controlkit` beside the
    files, and read from there.

    Raises:
        UserError: pyarrow is missing, a file is damaged or has no image column, or a named column is missing.
    """
    home = paths[0].parent / ".controlkit"
    files = [f"{path.resolve()} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in paths]
    unpacked = home / f"parquet-{sha256_of(_VERSION, repr(columns), *files)[:16]}.tar"
    if not unpacked.is_file():
        write_tar(unpacked, _rows(paths, columns))
        # Shards of version 1 lack captions under other names and lists of captions.
        (home / f"parquet-{sha256_of(*files)[:16]}.tar").unlink(missing_ok=True)
    listing = read_tars([unpacked], origin)
    shard = f"{unpacked.name}:"
    records = [replace(record, where=_row(record.where.removeprefix(shard))) for record in listing.records]
    problems = [_row(text.removeprefix(shard)) for text in listing.problems]
    notes = next((member.read_bytes() for member in members(unpacked) if member.name == _NOTES), b"[]")
    return Listing(origin=origin, records=records, problems=problems, notes=json.loads(notes))


def _row(text: str) -> str:
    """`row 7: ...` for `000000007: ...`."""
    number, colon, rest = text.partition(":")
    return f"row {int(number)}{colon}{rest}" if number.isdecimal() else text


def _rows(paths: Sequence[Path], chosen: Columns) -> Iterator[tuple[str, bytes]]:
    """Members of the tar shard: images and text of each row, and notes at the end."""
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise UserError("Parquet needs pyarrow: pip install 'controlkit[parquet]'", "missing-package") from error
    number = 0
    notes: list[str] = []
    linked = _Linked()
    for path in paths:
        try:
            file = parquet.ParquetFile(path)
            known = list(file.schema_arrow.names)
            images = [field.name for field in file.schema_arrow if _holds_images(arrow, field.type)]
            image, condition_columns, texts = _columns_of(path, known, images, chosen)
            notes += chosen.caption_notes(path if len(paths) == 1 else path.parent, known)
            names = _middle_names(condition_columns)
            for batch in file.iter_batches(batch_size=16, columns=[image, *condition_columns, *texts]):
                for row in batch.to_pylist():
                    for name in (image, *condition_columns):
                        data = linked.bytes_of(row[name], path.parent)
                        if data is not None:
                            middle = "" if name == image else f"{names[name]}."
                            yield f"{number:09d}.{middle}{_kind(data)}", data
                    yield _text_member(number, row[chosen.caption] if chosen.caption else captions_in(row))
                    number += 1
        except (arrow.ArrowException, OSError) as error:
            raise UserError(f"{path} is not a Parquet file, or damaged ({error})", "damaged-file") from error
    if linked.outside:
        notes.append(outside_note(paths[0].parent, len(linked.outside), linked.count, linked.outside[0]))
    if notes:
        yield _NOTES, json.dumps(list(dict.fromkeys(notes))).encode()


def _columns_of(
    path: Path, known: Sequence[str], images: Sequence[str], chosen: Columns
) -> tuple[str, list[str], list[str]]:
    """The columns of images, condition images and captions.

    Raises:
        UserError: there is no image column, or a named one is missing or has no images.
    """
    chosen.check(path, known)
    for name in (chosen.image, chosen.conditioning_image):
        if name is not None and name not in images:
            raise UserError(
                f"the column {name!r} of {path} has no images; columns with images: {', '.join(images)}", "wrong-type"
            )
    image = chosen.image or first_of(IMAGE_COLUMNS, images)
    if image is None:
        raise UserError(
            f"{path} has no image column named {', '.join(IMAGE_COLUMNS[:4])}; pass --image-column NAME (its columns"
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


def _holds_images(arrow: Any, kind: Any) -> bool:
    binary = arrow.types.is_binary(kind) or arrow.types.is_large_binary(kind)
    return binary or (arrow.types.is_struct(kind) and "bytes" in {field.name for field in kind})


@dataclass
class _Linked:
    """Images that a Parquet file refers to by path."""

    count: int = 0
    outside: list[Path] = field(default_factory=list)
    """Paths outside of its folder."""

    def bytes_of(self, value: Any, folder: Path) -> bytes | None:
        if not isinstance(value, Mapping):
            return value
        data, path = value.get("bytes"), value.get("path")
        if data is not None or not path:
            return data
        file = folder / path
        self.count += 1
        if not os.path.abspath(file).startswith(os.path.join(os.path.abspath(folder), "")):
            self.outside.append(file)
        return file.read_bytes() if file.is_file() else b""


def _kind(data: bytes) -> str:
    """The extension for the bytes of an image; `png` for anything else, which fails when it is read."""
    return next((kind for magic, kind in _MAGIC.items() if data.startswith(magic)), "png")


def write_tar(path: str | Path, files: Iterable[tuple[str, bytes]]) -> None:
    """Write `(name, bytes)` in order, atomically and reproducibly: no time, owner or machine, and only names that stay
    inside the folder where it is unpacked."""

    def write(temporary: Path) -> None:
        with tarfile.open(temporary, mode="w", format=tarfile.PAX_FORMAT) as archive:
            for name, data in files:
                member = tarfile.TarInfo(inside_name(name))
                member.size, member.mtime, member.mode = len(data), 0, 0o644
                archive.addfile(member, io.BytesIO(data))

    write_atomically(path, write)


def shard_name(index: int, count: int) -> str:
    """`pairs-00003-of-00016.tar`."""
    return f"pairs-{index:05d}-of-{count:05d}.tar"
