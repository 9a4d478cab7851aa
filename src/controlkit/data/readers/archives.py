"""Pairs in tar shards (webdataset's naming) and in parquet files."""

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
"""Of what is unpacked of a parquet file."""
_IMAGES = ("target", "image", "picture")
_NOTES = ".notes.json"
"""Member of a shard of ours with what there was to tell of where its images come from. It has no key: no sample."""
_MAGIC = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpg", b"RIFF": "webp", b"BM": "bmp", b"GIF8": "gif", b"II*": "tif"}


def read_tars(paths: Sequence[Path], origin: Path) -> Listing:
    """`KEY.jpg`, `KEY.NAME.png` for each condition, the caption in `KEY.txt`, `KEY.caption` or `KEY.json`.

    Nothing is unpacked. A key may occur once in all shards.
    """
    records: list[Record] = []
    problems: list[str] = []
    seen: dict[str, Path] = {}
    for path in paths:
        for key, parts in samples(path, problems).items():
            where = f"{path.name}:{key}"
            if key in seen:
                problems.append(f"{where}: the key occurs in {seen[key].name} too")
                continue
            seen[key] = path
            image = image_of(parts)
            if image is None:
                problems.append(f"{where}: there is no image (KEY.jpg, KEY.png) among {', '.join(sorted(parts))}")
                continue
            try:
                captions, made = texts_of(parts)
            except UserError as error:
                problems.append(f"{where}: {error}")
                continue
            except (ValueError, RecursionError) as error:
                problems.append(f"{where}: its text cannot be read ({error})")
                continue
            conditions = {
                name.rpartition(".")[0]: part
                for name, part in sorted(parts.items())
                if part is not image and is_image_name(f"x.{name}")
            }
            records.append(Record(where=where, image=image, conditions=conditions, captions=captions, metadata=made))
    return Listing(origin=origin, records=records, problems=problems)


def image_of(parts: Mapping[str, TarMember]) -> TarMember | None:
    """The image of a key: the one image without a second name, or the one called target, image or image."""
    images = sorted(name for name in parts if is_image_name(f"x.{name}"))
    plain = [name for name in images if "." not in name]
    named = [name for name in images if name.partition(".")[0] in _IMAGES]
    for found in (plain, named):
        if len(found) == 1:
            return parts[found[0]]
    return None


def texts_of(parts: Mapping[str, TarMember]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The captions of a key, one empty one if there is none, and what its JSON file says.

    Raises:
        ValueError: they are not UTF-8 or not JSON.
        UserError: the JSON file's caption is neither text nor a list of texts.
    """
    made: dict[str, Any] = {}
    if "json" in parts:
        value = json.loads(decode_text(parts["json"].read_bytes()))
        made = value if isinstance(value, dict) else {}
    for name in ("txt", "caption"):
        if name in parts:
            text = decode_text(parts[name].read_bytes()).strip()
            if text:
                return (text,), made
    return captions_of(captions_in(made)), made


def read_parquet(paths: Sequence[Path], origin: Path, columns: Columns = ANY_COLUMNS) -> Listing:
    """Parquet files of `datasets`: columns of images (`{bytes, path}` or plain bytes) and a text column.

    A row cannot be read without its neighbours, so the images are copied once into a tar shard in `.controlkit` beside
    the files, and read from there.

    Raises:
        UserError: pyarrow is missing, a file is torn, it has no column of images, or a named column is not there.
    """
    home = paths[0].parent / ".controlkit"
    files = [f"{path.resolve()} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in paths]
    unpacked = home / f"parquet-{sha256_of(_VERSION, repr(columns), *files)[:16]}.tar"
    if not unpacked.is_file():
        write_tar(unpacked, _rows(paths, columns))
        # What earlier versions unpacked of the same files, which lacks captions of other names and lists of them.
        (home / f"parquet-{sha256_of(*files)[:16]}.tar").unlink(missing_ok=True)
    listing = read_tars([unpacked], origin)
    shard = f"{unpacked.name}:"
    records = [replace(record, where=_row(record.where.removeprefix(shard))) for record in listing.records]
    problems = [_row(text.removeprefix(shard)) for text in listing.problems]
    told = next((piece for piece in members(unpacked) if piece.name == _NOTES), None)
    return Listing(
        origin=origin, records=records, problems=problems, notes=json.loads(told.read_bytes()) if told else []
    )


def _row(text: str) -> str:
    """`row 7: ...` of `000000007: ...`."""
    number, colon, rest = text.partition(":")
    return f"row {int(number)}{colon}{rest}" if number.isdecimal() else text


def _rows(paths: Sequence[Path], chosen: Columns) -> Iterator[tuple[str, bytes]]:
    """Members of the tar shard, the images of a row and its text; at the end, what there is to tell."""
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise UserError("reading parquet needs pyarrow: pip install 'controlkit[parquet]'") from error
    number = 0
    notes: list[str] = []
    linked = _Linked()
    for path in paths:
        try:
            file = parquet.ParquetFile(path)
            known = list(file.schema_arrow.names)
            images = [field.name for field in file.schema_arrow if _holds_images(arrow, field.type)]
            image, given, texts = _columns_of(path, known, images, chosen)
            notes += chosen.caption_notes(path if len(paths) == 1 else path.parent, known)
            names = _middle_names(given)
            for batch in file.iter_batches(batch_size=16, columns=[image, *given, *texts]):
                for row in batch.to_pylist():
                    for name in (image, *given):
                        data = linked.bytes_of(row[name], path.parent)
                        if data is not None:
                            middle = "" if name == image else f"{names[name]}."
                            yield f"{number:09d}.{middle}{_kind(data)}", data
                    yield _text_member(number, row[chosen.caption] if chosen.caption else captions_in(row))
                    number += 1
        except (arrow.ArrowException, OSError) as error:
            raise UserError(f"{path} is not a parquet file, or a torn one ({error})") from error
    if linked.outside:
        notes.append(outside_note(paths[0].parent, len(linked.outside), linked.count, linked.outside[0]))
    if notes:
        yield _NOTES, json.dumps(list(dict.fromkeys(notes))).encode()


def _columns_of(
    path: Path, known: Sequence[str], images: Sequence[str], chosen: Columns
) -> tuple[str, list[str], list[str]]:
    """The columns of images, of condition images, and of captions.

    Raises:
        UserError: there is none of images, or a named one is not there or holds no images.
    """
    chosen.check(path, known)
    for name in (chosen.image, chosen.conditioning_image):
        if name is not None and name not in images:
            raise UserError(f"the column {name!r} of {path} holds no images; those with images: {', '.join(images)}")
    image = chosen.image or first_of(IMAGE_COLUMNS, images)
    if image is None:
        raise UserError(
            f"{path} has no column of images called {', '.join(IMAGE_COLUMNS[:4])}; name it with --image-column (its"
            f" columns are {', '.join(known)})"
        )
    given = [chosen.conditioning_image] if chosen.conditioning_image else [name for name in images if name != image]
    texts = [chosen.caption] if chosen.caption else all_of(CAPTION_COLUMNS, known)
    return image, given, [name for name in texts if name not in images]


def _middle_names(given: Sequence[str]) -> dict[str, str]:
    """What columns of condition images are called in the shard: short, unless two of them would be one then."""
    short = {name: short_name(name).lower() for name in given}
    return {name: own if list(short.values()).count(own) == 1 else name for name, own in short.items()}


def _text_member(number: int, value: Any) -> tuple[str, bytes]:
    """The member with a row's caption; whatever is no plain text goes through JSON, where it is read or refused."""
    if value is None or isinstance(value, str):
        return f"{number:09d}.txt", (value or "").encode()
    return f"{number:09d}.json", json.dumps({CAPTION_COLUMNS[0]: value}, default=repr).encode()


def _holds_images(arrow: Any, kind: Any) -> bool:
    binary = arrow.types.is_binary(kind) or arrow.types.is_large_binary(kind)
    return binary or (arrow.types.is_struct(kind) and "bytes" in {field.name for field in kind})


@dataclass
class _Linked:
    """Images that a parquet file names and does not hold."""

    count: int = 0
    outside: list[Path] = field(default_factory=list)
    """Those outside of its folder."""

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
    """The extension for an image's bytes; `png` for what is no image, which is found out when it is read."""
    return next((kind for magic, kind in _MAGIC.items() if data.startswith(magic)), "png")


def write_tar(path: str | Path, files: Iterable[tuple[str, bytes]]) -> None:
    """Write `(name, bytes)` in the order given, atomically; no time, owner or machine gets into the file, and no name
    that leads out of the folder where it is unpacked."""

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
