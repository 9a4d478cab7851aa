"""Segments: immutable files of many rows of one shape, looked up by digest and checked on first read.

A segment is a safetensors file: `digest` `uint8 [N, 16]` and `crc32` `uint32 [N]` are its index, every other tensor
`[N, ...]` is one part of the rows. Rows are read through a memory map.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import secrets
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from controlkit.files import write_atomically

try:
    import fcntl
except ImportError:  # Windows, where a mapped file cannot be removed anyway
    fcntl = None  # type: ignore[assignment]

SUFFIX = ".safetensors"
DIGEST = 16
"""Bytes of a row's digest."""
_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "U8": 1, "BOOL": 1}
"""safetensors dtype -> bytes per element."""
_INDEX = {"digest": "U8", "crc32": "U32"}
_LONGEST_HEADER = 1 << 20
_ABANDONED = 3600.0
"""Age in seconds from which a temporary file belongs to a killed process; writing one takes seconds."""


class SegmentError(Exception):
    """A file that is not a complete segment."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One tensor of every row."""

    dtype: str
    """safetensors dtype: F32, BF16, ..."""
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes per row."""
        return _BYTES[self.dtype] * math.prod(self.shape)


Rows = Mapping[str, np.ndarray]
"""Name of a part -> its rows as bytes `uint8 [N, nbytes]`."""


def digests_of(texts: Sequence[str]) -> np.ndarray:
    """Hex hashes => digests `S16 [N]`, which numpy sorts and searches as bytes."""
    return np.frombuffer(b"".join(bytes.fromhex(text[: 2 * DIGEST]) for text in texts), f"S{DIGEST}")


class Segment:
    """One segment: index in memory, rows through a memory map after `map()`.

    Raises:
        SegmentError: the file is truncated, or not a segment.
        OSError: it cannot be read, or has been removed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as stream:
            self._begin, entries = _header(stream)
            count = entries["digest"][1][0]
            self.parts = {
                name: Part(dtype=kind, shape=tuple(shape[1:]))
                for name, (kind, shape, _) in sorted(entries.items())
                if name not in _INDEX
            }
            self._starts = {name: start for name, (_, _, start) in entries.items()}
            self.digests = np.frombuffer(self._read(stream, "digest", DIGEST * count), f"S{DIGEST}")
            self._checks = np.frombuffer(self._read(stream, "crc32", 4 * count), "<u4")
        self._verified = np.zeros(count, bool)
        self._views: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.digests)

    def map(self) -> None:
        """Map the file, mark it as used, and keep others from removing it as long as the map lives.

        Raises:
            OSError: it has been removed.
        """
        if self._views or not len(self):
            return
        with self.path.open("rb") as stream:
            if fcntl is not None:
                # The map duplicates this descriptor, so the lock lasts as long as the map and ends with the process.
                # On file systems without locks, mapped data still survives unlink.
                with contextlib.suppress(OSError):
                    fcntl.flock(stream.fileno(), fcntl.LOCK_SH)
            everything = np.frombuffer(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        for name, part in self.parts.items():
            first = self._begin + self._starts[name]
            self._views[name] = everything[first : first + len(self) * part.nbytes].reshape(len(self), part.nbytes)
        with contextlib.suppress(OSError):  # a shared cache may be read-only
            os.utime(self.path)

    @property
    def mapped(self) -> bool:
        """Whether rows can be read."""
        return bool(self._views)

    def unmap(self) -> None:
        """Let others remove the file; rows cannot be read until it is mapped again."""
        self._views = {}

    def row(self, number: int) -> dict[str, np.ndarray] | None:
        """One row as views of the map, by part; None if it is damaged.

        A row is checked once, on first read: the CRC is cheaper than a disk read, but dearer than a copy in memory.
        """
        row = {name: view[number] for name, view in self._views.items()}
        if not self._verified[number]:
            if _check(self.digests[number : number + 1].tobytes(), row) != self._checks[number]:
                return None
            self._verified[number] = True
        return row

    def _read(self, stream: IO[bytes], name: str, length: int) -> bytes:
        stream.seek(self._begin + self._starts[name])
        return stream.read(length)


def intact_rows(segment: Segment) -> Iterator[tuple[bytes, dict[str, np.ndarray]]]:
    """Digest and copy of every undamaged row; the segment is mapped meanwhile."""
    segment.map()
    for number, digest in enumerate(segment.digests.tolist()):
        row = segment.row(number)
        if row is not None:
            yield digest, {name: part.copy() for name, part in row.items()}
    row = None  # the last view would keep the map and its lock alive
    segment.unmap()


def write_segment(folder: Path, digests: np.ndarray, parts: Mapping[str, Part], rows: Rows) -> Path:
    """Write rows atomically as a new segment; later names sort after earlier ones.

    Args:
        digests: `S16 [N]`.

    Raises:
        UserError: the folder is not writable, or the disk is full.
    """
    count = len(digests)
    bytes_of = {name: np.ascontiguousarray(rows[name]).reshape(count, part.nbytes) for name, part in parts.items()}
    raw = digests.tobytes()
    keys = [raw[first : first + DIGEST] for first in range(0, len(raw), DIGEST)]
    names = sorted(parts)
    checks = [_check(key, {name: bytes_of[name][number] for name in names}) for number, key in enumerate(keys)]
    tensors: list[tuple[str, str, list[int], Any]] = [
        ("digest", "U8", [count, DIGEST], raw),
        ("crc32", "U32", [count], np.array(checks, "<u4").data),
        *((name, part.dtype, [count, *part.shape], bytes_of[name].data) for name, part in parts.items()),
    ]
    tensors.sort(key=lambda tensor: (-_BYTES[tensor[1]], tensor[0]))  # keeps every tensor aligned
    header: dict[str, Any] = {}
    end = 0
    for name, dtype, shape, _ in tensors:
        start, end = end, end + _BYTES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps({**header, "__metadata__": {"check": _check_of_header(header)}}).encode()
    text += b" " * (-len(text) % 8)

    def write(temporary: Path) -> None:
        with temporary.open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for _, _, _, data in tensors:
                stream.write(data)

    path = folder / f"{time.time_ns():020d}-{secrets.token_hex(4)}{SUFFIX}"
    write_atomically(path, write)
    return path


def segment_paths(folder: Path) -> list[Path]:
    """Segments in a folder, newest first; removes temporary files of killed processes."""
    found = []
    for path in folder.glob(f"*{SUFFIX}"):
        if not path.name.startswith("."):
            found.append(path)
            continue
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _ABANDONED:
                path.unlink()
    return sorted(found, reverse=True)


def remove_unused(path: Path) -> bool:
    """Remove a segment unless a process has it mapped; returns whether it is gone."""
    try:
        with path.open("rb") as stream:
            if fcntl is not None:
                fcntl.flock(stream.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
        if fcntl is None:
            path.unlink()
    except FileNotFoundError:
        return True
    except OSError:  # locked, mapped (Windows), or in a folder without write permission
        return False
    return True


def in_use(path: Path) -> bool:
    """Whether a process has a segment mapped; always False without file locks."""
    try:
        with path.open("rb") as stream:
            if fcntl is not None:
                fcntl.flock(stream.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    return False


def _check(digest: bytes, row: Mapping[str, np.ndarray]) -> int:
    """CRC-32 of a row and its digest, so that a damaged index is detected as well."""
    value = zlib.crc32(digest)
    for name in sorted(row):
        value = zlib.crc32(row[name].data, value)
    return value


def _check_of_header(tensors: Mapping[str, Any]) -> str:
    """CRC-32 of the header, which may stay valid JSON after a flipped bit."""
    return f"{zlib.crc32(json.dumps(tensors).encode()):08x}"


def _header(stream: IO[bytes]) -> tuple[int, dict[str, tuple[str, list[int], int]]]:
    """Offset of the data, and name -> (dtype, shape, offset); the file size must match."""
    size = os.fstat(stream.fileno()).st_size
    try:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= min(_LONGEST_HEADER, size - 8):
            raise SegmentError("no header")
        entries = {}
        end = 0
        described = json.loads(stream.read(length))
        if described.pop("__metadata__")["check"] != _check_of_header(described):
            raise SegmentError("damaged header")
        count = described["crc32"]["shape"][0]
        for name, entry in sorted(described.items(), key=lambda item: item[1]["data_offsets"][0]):
            dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
            if start != end or stop - start != _BYTES[dtype] * math.prod(shape) or shape[0] != count or min(shape) < 0:
                raise SegmentError(f"{name} does not fit")
            entries[name] = (dtype, shape, start)
            end = stop
        has_index = entries["digest"][:2] == ("U8", [count, DIGEST]) and entries["crc32"][:2] == ("U32", [count])
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise SegmentError(f"unreadable header ({error})") from error
    if not has_index or 8 + length + end != size:
        raise SegmentError("truncated")
    return 8 + length, entries
