"""Pairs in tar shards (webdataset's naming) and in parquet files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from controlkit.data.readers.lines import PICTURE_COLUMNS, PROMPT_COLUMNS
from controlkit.data.readers.listing import Listing, Record, short_name
from controlkit.data.shards import write_tar
from controlkit.data.sources import Piece, is_picture_name, samples
from controlkit.errors import UserError
from controlkit.files import decode_text, sha256_of

_PICTURES = ("target", "image", "picture")
_MAGIC = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpg", b"RIFF": "webp", b"BM": "bmp", b"GIF8": "gif", b"II*": "tif"}


def read_tars(paths: Sequence[Path], origin: Path) -> Listing:
    """`KEY.jpg`, `KEY.NAME.png` for each condition, `KEY.txt` or `KEY.json` (prompt, text or caption).

    Nothing is unpacked. A key may occur once in all shards.
    """
    records: list[Record] = []
    problems: list[str] = []
    seen: dict[str, Path] = {}
    for path in paths:
        for key, parts in samples(path).items():
            where = f"{path.name}:{key}"
            if key in seen:
                problems.append(f"{where}: the key occurs in {seen[key].name} too")
                continue
            seen[key] = path
            picture = picture_of(parts)
            if picture is None:
                problems.append(f"{where}: there is no picture (KEY.jpg, KEY.png) among {', '.join(sorted(parts))}")
                continue
            try:
                prompt, made = texts_of(parts)
            except (ValueError, UserError) as error:
                problems.append(f"{where}: its text cannot be read ({error})")
                continue
            conditions = {
                name.rpartition(".")[0]: part
                for name, part in sorted(parts.items())
                if part is not picture and is_picture_name(f"x.{name}")
            }
            records.append(Record(where=where, picture=picture, conditions=conditions, prompt=prompt or "", made=made))
    return Listing(origin=origin, records=records, problems=problems)


def picture_of(parts: Mapping[str, Piece]) -> Piece | None:
    """The picture of a key: the one image without a second name, or the one called target, image or picture."""
    images = sorted(name for name in parts if is_picture_name(f"x.{name}"))
    plain = [name for name in images if "." not in name]
    named = [name for name in images if name.partition(".")[0] in _PICTURES]
    for found in (plain, named):
        if len(found) == 1:
            return parts[found[0]]
    return None


def texts_of(parts: Mapping[str, Piece]) -> tuple[str | None, dict[str, Any]]:
    """The prompt of a key, None if there is none, and what its JSON file says.

    Raises:
        ValueError: they are not UTF-8 or not JSON.
    """
    made: dict[str, Any] = {}
    if "json" in parts:
        value = json.loads(decode_text(parts["json"].read_bytes()))
        made = value if isinstance(value, dict) else {}
    for name in ("txt", "caption"):
        if name in parts:
            return decode_text(parts[name].read_bytes()).strip(), made
    for name in PROMPT_COLUMNS:
        if isinstance(made.get(name), str):
            return made[name], made
    return None, made


def read_parquet(paths: Sequence[Path], origin: Path) -> Listing:
    """Parquet files of `datasets`: columns of images (`{bytes, path}` or plain bytes) and a text column.

    A row cannot be read without its neighbours, so the images are copied once into a tar shard in `.controlkit` beside
    the files, and read from there.

    Raises:
        UserError: pyarrow is missing, a file is torn, or it has no column of pictures.
    """
    home = paths[0].parent
    stamp = sha256_of(*(f"{path.resolve()} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in paths))
    unpacked = home / ".controlkit" / f"parquet-{stamp[:16]}.tar"
    if not unpacked.is_file():
        write_tar(unpacked, _rows(paths))
    listing = read_tars([unpacked], origin)
    records = [Record(**{**vars(r), "where": f"row {int(r.where.rpartition(':')[2])}"}) for r in listing.records]
    return Listing(origin=origin, records=records, problems=listing.problems)


def _rows(paths: Sequence[Path]) -> Iterator[tuple[str, bytes]]:
    """Members of the tar shard, the images of a row and its text."""
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise UserError("reading parquet needs pyarrow: pip install 'controlkit[parquet]'") from error
    number = 0
    for path in paths:
        try:
            file = parquet.ParquetFile(path)
            columns = [field.name for field in file.schema_arrow if _holds_images(arrow, field.type)]
            text = next((name for name in PROMPT_COLUMNS if name in file.schema_arrow.names), None)
            picture = next((name for name in PICTURE_COLUMNS if name in columns), None)
            if picture is None:
                raise UserError(
                    f"{path} has no column of pictures called {', '.join(PICTURE_COLUMNS[:4])}; see docs/pairs.md"
                )
            for batch in file.iter_batches(batch_size=16, columns=[*columns, *([text] if text else [])]):
                for row in batch.to_pylist():
                    for name in columns:
                        data = _bytes_of(row[name], path.parent)
                        if data is not None:
                            middle = "" if name == picture else f"{short_name(name)}."
                            yield f"{number:09d}.{middle}{_kind(data)}", data
                    yield f"{number:09d}.txt", str((row[text] if text else None) or "").encode()
                    number += 1
        except (arrow.ArrowException, OSError) as error:
            raise UserError(f"{path} is not a parquet file, or a torn one ({error})") from error


def _holds_images(arrow: Any, kind: Any) -> bool:
    binary = arrow.types.is_binary(kind) or arrow.types.is_large_binary(kind)
    return binary or (arrow.types.is_struct(kind) and "bytes" in {field.name for field in kind})


def _bytes_of(value: Any, folder: Path) -> bytes | None:
    if isinstance(value, Mapping):
        data, path = value.get("bytes"), value.get("path")
        if data is None and path:
            file = folder / path
            return file.read_bytes() if file.is_file() else b""
        return data
    return value


def _kind(data: bytes) -> str:
    """The extension for an image's bytes; `png` for what is no image, which is found out when it is read."""
    return next((kind for magic, kind in _MAGIC.items() if data.startswith(magic)), "png")
