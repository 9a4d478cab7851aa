"""Pairs in tar shards (webdataset naming); writing of tar shards."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from controlkit.data.readers.columns import captions_in, captions_of
from controlkit.data.readers.listing import Listing, Record
from controlkit.data.sources import TarMember, inside_name, is_image_name, samples
from controlkit.errors import UserError
from controlkit.files import decode_text, write_atomically

_IMAGES = ("target", "image", "picture")


def read_tars(paths: Sequence[Path], origin: Path | str) -> Listing:
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
