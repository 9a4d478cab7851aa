"""Looking at the cache: what it holds, whether that is whole, and removing it."""

from __future__ import annotations

import contextlib
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from controlkit.data.cache import cache_folder, cache_limit, is_spec, store_folders
from controlkit.data.segments import (
    DIGEST,
    Segment,
    SegmentError,
    intact_rows,
    remove_unused,
    segment_paths,
    write_segment,
)
from controlkit.errors import UserError, nearest
from controlkit.files import read_json


@dataclass(frozen=True, kw_only=True)
class StoreFacts:
    """One store: rows of one kind that one network made of one transform."""

    kind: str
    model: str
    """Hash of the networks."""
    made_by: str
    """Which base had them when the store was made."""
    transform: str
    shape: str
    """Of a row, each part with its type."""
    rows: int
    """Different rows."""
    bytes: int
    segments: int
    created: str
    last_used: float | None
    """Seconds since 1970; None if there is no segment."""
    folder: str


@dataclass(frozen=True, kw_only=True)
class CacheReport:
    """The whole cache."""

    folder: str
    limit: int
    """In bytes."""
    bytes: int
    stores: tuple[StoreFacts, ...]
    removed: int = 0
    """Segments that were removed since that was asked for."""
    in_use: int = 0
    """Segments that stay since a running process holds them."""
    verified: int | None = None
    """Rows that were read; None if that was not asked for."""
    damaged: tuple[str, ...] = ()
    """What was damaged, in words; it is removed, and made again when it is needed."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def manage_cache(*, clear: bool | str = False, verify: bool = False) -> CacheReport:
    """What the cache holds, after clearing or verifying it.

    Args:
        clear: remove everything, or one kind (`latents`, ...); what a running process holds stays.
        verify: read every row, and remove those that are damaged.

    Raises:
        UserError: there is no such kind, or the limit is no number.
    """
    root, limit = cache_folder(), cache_limit()
    stores = [_facts(folder) for folder in store_folders(root)]
    if isinstance(clear, str) and clear not in {store.kind for store in stores}:
        kinds = sorted({store.kind for store in stores})
        raise UserError(f"the cache {root} has no rows of kind {clear!r}{nearest(clear, kinds)}")
    removed, held = 0, 0
    for store in stores:
        if clear is True or clear == store.kind:
            counts = _clear(Path(store.folder))
            removed, held = removed + counts[0], held + counts[1]
    verified: int | None = None
    damaged: list[str] = []
    if verify:
        verified = 0
        for folder in store_folders(root):
            for path in segment_paths(folder):
                rows, problem = _verify(path)
                verified += rows
                damaged += [problem] if problem else []
    if clear or verify:
        stores = [_facts(folder) for folder in store_folders(root)]
    return CacheReport(
        folder=str(root),
        limit=limit,
        bytes=sum(store.bytes for store in stores),
        stores=tuple(stores),
        removed=removed,
        in_use=held,
        verified=verified,
        damaged=tuple(damaged),
    )


def _facts(folder: Path) -> StoreFacts:
    path = folder / "spec.json"
    spec: dict[str, Any] = read_json(path) if is_spec(path) else {}
    digests, size, count, used = [], 0, 0, 0.0
    for path in segment_paths(folder):
        with contextlib.suppress(OSError):
            facts = path.stat()
            size, count, used = size + facts.st_size, count + 1, max(used, facts.st_mtime)
            with contextlib.suppress(SegmentError):
                digests.append(Segment(path).digests)
    parts = spec.get("parts", {})
    shapes = [f"{part['dtype']} {' x '.join(map(str, part['shape']))}" for part in parts.values()]
    return StoreFacts(
        kind=str(spec.get("kind", "?")),
        model=str(spec.get("model", "?")),
        made_by=str(spec.get("made by", "")),
        transform=str(spec.get("transform", "?")),
        shape=", ".join(shapes),
        rows=len(np.unique(np.concatenate(digests))) if digests else 0,
        bytes=size,
        segments=count,
        created=str(spec.get("created", "")),
        last_used=used or None,
        folder=str(folder),
    )


def _clear(folder: Path) -> tuple[int, int]:
    """Remove what is not in use: (segments removed, segments left)."""
    gone = [remove_unused(path) for path in segment_paths(folder)]
    if all(gone):
        shutil.rmtree(folder, ignore_errors=True)
    return sum(gone), len(gone) - sum(gone)


def _verify(path: Path) -> tuple[int, str | None]:
    """Read a segment: its rows, and what was wrong, once that is removed."""
    try:
        segment = Segment(path)
        count = len(segment)
        whole = list(intact_rows(segment))
    except SegmentError as error:
        return 0, f"{path}: {error}{_left(remove_unused(path))}"
    except OSError as error:
        return 0, None if isinstance(error, FileNotFoundError) else f"{path} cannot be read: {error.strerror}"
    if len(whole) == count:
        return count, None
    if whole:
        digests = np.array([digest for digest, _ in whole], f"S{DIGEST}")
        rows = {name: np.stack([row[name] for _, row in whole]) for name in segment.parts}
        write_segment(path.parent, digests, segment.parts, rows)
    return count, f"{path}: {count - len(whole)} of {count} rows{_left(remove_unused(path))}"


def _left(removed: bool) -> str:
    return "" if removed else " (a running process holds it; it will replace what is damaged)"


def ago(moment: float | None) -> str:
    """How long ago, in words."""
    if moment is None:
        return "-"
    seconds = max(0.0, time.time() - moment)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return "just now"
