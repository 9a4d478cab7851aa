"""Report, verify and clear the cache."""

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
    """One store: rows of one kind, network and transform."""

    kind: str
    model: str
    """Hash of the networks."""
    made_by: str
    """The base that the store was created for."""
    transform: str
    shape: str
    """Of a row: dtype and shape of each part."""
    rows: int
    """Distinct rows."""
    bytes: int
    segments: int
    created: str
    last_used: float | None
    """Seconds since 1970; None without segments."""
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
    """Segments that were cleared."""
    in_use: int = 0
    """Segments that were not cleared because a running process has them mapped."""
    verified: int | None = None
    """Rows read; None without `verify`."""
    damaged: tuple[str, ...] = ()
    """What was damaged and removed; it is computed again when needed."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def manage_cache(*, clear: bool | str = False, verify: bool = False) -> CacheReport:
    """Report the contents of the cache, after clearing or verifying it.

    Args:
        clear: remove everything, or one kind (`latents`, ...), except segments in use.
        verify: read every row, and remove damaged ones.

    Raises:
        UserError: there is no such kind, or the limit is not a number.
    """
    root, limit = cache_folder(), cache_limit()
    stores = [_facts(folder) for folder in store_folders(root)]
    if isinstance(clear, str) and clear not in {store.kind for store in stores}:
        kinds = sorted({store.kind for store in stores})
        raise UserError(f"the cache {root} has no rows of kind {clear!r}{nearest(clear, kinds)}", "unknown-name")
    removed, in_use = 0, 0
    for store in stores:
        if clear is True or clear == store.kind:
            counts = _clear(Path(store.folder))
            removed, in_use = removed + counts[0], in_use + counts[1]
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
        in_use=in_use,
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
    """Remove segments that are not in use: (segments removed, segments left)."""
    removed = [remove_unused(path) for path in segment_paths(folder)]
    if all(removed):
        shutil.rmtree(folder, ignore_errors=True)
    return sum(removed), len(removed) - sum(removed)


def _verify(path: Path) -> tuple[int, str | None]:
    """Read a segment and remove damaged rows: (number of rows, the problem)."""
    try:
        segment = Segment(path)
        count = len(segment)
        intact = list(intact_rows(segment))
    except SegmentError as error:
        return 0, f"{path}: {error}{_still_there(remove_unused(path))}"
    except OSError as error:
        return 0, None if isinstance(error, FileNotFoundError) else f"{path} cannot be read: {error.strerror}"
    if len(intact) == count:
        return count, None
    if intact:
        digests = np.array([digest for digest, _ in intact], f"S{DIGEST}")
        rows = {name: np.stack([row[name] for _, row in intact]) for name in segment.parts}
        write_segment(path.parent, digests, segment.parts, rows)
    return count, f"{path}: {count - len(intact)} of {count} rows{_still_there(remove_unused(path))}"


def _still_there(removed: bool) -> str:
    return "" if removed else " (in use by a running process, which will replace damaged rows)"


def ago(moment: float | None) -> str:
    """Time since `moment` (seconds since 1970), in words."""
    if moment is None:
        return "-"
    seconds = max(0.0, time.time() - moment)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return "just now"
