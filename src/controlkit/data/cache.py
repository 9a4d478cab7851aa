"""Content-addressed cache of frozen-network outputs for training data: latents, hints, text embeddings.

Each kind of row, network and transform has one folder (a *store*) of immutable segments (`segments.py`), which are
only added or removed. So several processes can write without waiting for each other: a duplicate row is harmless, and
a damaged row counts as missing.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from controlkit.data.segments import (
    DIGEST,
    SUFFIX,
    Part,
    Rows,
    Segment,
    SegmentError,
    in_use,
    intact_rows,
    remove_unused,
    segment_paths,
    write_segment,
)
from controlkit.errors import UserError
from controlkit.files import read_json, sha256_of, writable_folder, write_json

FOLDER_VARIABLE = "CONTROLKIT_CACHE"
LIMIT_VARIABLE = "CONTROLKIT_CACHE_MB"
_DEFAULT_MB = 50_000
_FORMAT = "controlkit cache 1"
_SPEC = "spec.json"
_SEGMENT_BYTES = 256 * 10**6
"""Target size of a segment."""
_MOST_SMALL = 32
"""A store with this many small segments merges them when it is opened: each takes a file descriptor."""


def cache_folder() -> Path:
    """The cache folder: `CONTROLKIT_CACHE`, or `controlkit` in `XDG_CACHE_HOME`, or `~/.cache/controlkit`."""
    if os.environ.get(FOLDER_VARIABLE):
        return Path(os.environ[FOLDER_VARIABLE]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "controlkit"


def cache_limit() -> int:
    """Size limit in bytes: `CONTROLKIT_CACHE_MB` (millions of bytes), or 50 GB.

    Raises:
        UserError: the variable is not a number above 0.
    """
    text = os.environ.get(LIMIT_VARIABLE) or str(_DEFAULT_MB)
    try:
        limit = float(text)
    except ValueError:
        limit = 0
    if not 0 < limit < float("inf"):
        raise UserError(
            f"{LIMIT_VARIABLE} is {text!r}; expected a number of megabytes above 0, such as 50000", "out-of-range"
        )
    return int(limit * 10**6)


@dataclass(frozen=True, kw_only=True)
class Spec:
    """Identity of a store: equal specs share one."""

    kind: str
    """`latents`, `hints`, `texts`, or `drawings` (of nano)."""
    model: str
    """Hash of the networks, and of all settings that the rows depend on."""
    transform: str
    """Preprocessing of the content, in words."""

    def folder(self, root: Path) -> Path:
        """The store's folder in the cache `root`."""
        return root / f"{self.kind}-{sha256_of(self.model, self.transform)[:24]}"


class Store:
    """The rows of one spec, with the index in memory.

    Args:
        note: origin of the rows, shown by `controlkit cache`.
        root: the cache folder; default `cache_folder()`.
    """

    def __init__(self, spec: Spec, note: str = "", root: Path | None = None) -> None:
        self.spec = spec
        self.note = note
        self.root = cache_folder() if root is None else root
        self.folder = spec.folder(self.root)
        self.limit = cache_limit()
        # Far fewer segments than open files allowed, and small enough that eviction does not drop everything at once.
        self.segment_bytes = max(self.limit // 512, min(_SEGMENT_BYTES, self.limit // 8))
        self.parts: dict[str, Part] | None = None
        self.segments: list[Segment] = []
        self._skipped: set[Path] = set()
        self.refresh()
        if self._merge():
            self.refresh()

    def __len__(self) -> int:
        """Number of distinct rows."""
        return len(np.unique(self._digests))

    def refresh(self) -> None:
        """Pick up segments that other processes added or removed."""
        known = {segment.path: segment for segment in self.segments}
        found = [known.pop(path, None) or self._open(path) for path in segment_paths(self.folder)]
        # Mapped segments stay readable after an unlink.
        removed = [segment for segment in known.values() if segment.mapped]
        segments = [segment for segment in found if segment is not None] + removed
        self.segments = sorted(segments, key=lambda segment: segment.path, reverse=True)
        self._starts = np.cumsum([0, *map(len, self.segments)])
        digests = [segment.digests for segment in self.segments] or [np.empty(0, f"S{DIGEST}")]
        unsorted = np.concatenate(digests)
        # Stable: of equal digests the newest comes first, so that a row made again shadows the damaged one.
        self._order = np.argsort(unsorted, kind="stable")
        self._digests = unsorted[self._order]

    def find(self, digests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Digests `S16 [N]` => index of the segment (-1: missing) and of the row in it, both `int64 [N]`."""
        if not len(self._digests):
            return np.full(len(digests), -1), np.zeros(len(digests), np.int64)
        place = np.minimum(np.searchsorted(self._digests, digests), len(self._digests) - 1)
        entry = self._order[place]
        segment = np.searchsorted(self._starts, entry, side="right") - 1
        return np.where(self._digests[place] == digests, segment, -1), entry - self._starts[segment]

    def add(self, digests: np.ndarray, parts: dict[str, Part], rows: Rows) -> None:
        """Add rows as one segment.

        Raises:
            UserError: the cache is not writable or full of rows in use, or the disk is full.
        """
        self.make_room(sum(array.nbytes for array in rows.values()))
        with self._explain_write_errors():
            if not is_spec(self.folder / _SPEC):  # missing or damaged
                created = time.strftime("%Y-%m-%d %H:%M:%S")
                described = {name: asdict(part) for name, part in parts.items()}
                facts = {"format": _FORMAT, **asdict(self.spec), "made by": self.note, "parts": described}
                write_json(self.folder / _SPEC, {**facts, "created": created})
            write_segment(self.folder, digests, parts, rows)
        self.refresh()

    def make_room(self, needed: int) -> None:
        """Evict the least recently used segments, except those in use, until `needed` bytes fit.

        Raises:
            UserError: they do not fit.
        """
        files = []
        for folder in store_folders(self.root):
            for path in folder.glob(f"*{SUFFIX}"):
                with contextlib.suppress(OSError):
                    facts = path.stat()
                    files.append((facts.st_mtime, facts.st_size, path))
        used = sum(size for _, size, _ in files)
        if used + needed <= self.limit:
            return
        # First whether it suffices: rows that cannot be stored should cost no others.
        kept = sum(size for _, size, path in files if path.name.startswith(".") or in_use(path))
        if kept + needed <= self.limit:
            for _, size, path in sorted(files):
                if used + needed <= self.limit:
                    return
                if not path.name.startswith(".") and remove_unused(path):
                    used -= size
            kept = used
        if kept + needed > self.limit:
            raise UserError(
                f"{_megabytes(needed)} of {self.spec.kind} do not fit into the cache {self.root}: its limit is"
                f" {_megabytes(self.limit)}, of which {_megabytes(kept)} are in use; set {LIMIT_VARIABLE} to"
                f" {-(-(kept + needed) // 10**6)} or more",
                "out-of-range",
            )

    def check_writable(self) -> None:
        """Check, before any row is computed, that rows can be stored.

        Raises:
            UserError: the folder cannot be created or written.
        """
        with self._explain_write_errors():
            writable_folder(self.folder)

    def warn(self, message: str) -> None:
        """Print one line on standard error."""
        print(f"cache: {message}", file=sys.stderr, flush=True)

    def _open(self, path: Path) -> Segment | None:
        if path in self._skipped:
            return None
        try:
            segment = Segment(path)
            self.parts = self.parts or segment.parts
            if segment.parts == self.parts:
                return segment
            reason = "rows of another shape"
        except FileNotFoundError:
            return None
        except SegmentError as error:
            reason = str(error)
            remove_unused(path)
        except OSError as error:
            reason = str(error.strerror or error)
        self._skipped.add(path)
        self.warn(f"{path} is damaged ({reason}); its {self.spec.kind} are computed again")
        return None

    def _merge(self) -> bool:
        """Merge small unused segments into large ones without duplicate rows; whether there were enough to merge."""
        small = [segment for segment in self.segments if _size(segment.path) < self.segment_bytes // 2]
        if len(small) < _MOST_SMALL:
            return False
        with contextlib.suppress(Timeout, OSError, UserError), FileLock(self.folder / ".merge.lock", timeout=0):
            group: list[Segment] = []
            for segment in [*small, None]:
                full = sum(_size(each.path) for each in group) > self.segment_bytes // 2
                if group and (segment is None or full):
                    self._merge_group(group)
                    group = []
                if segment is not None and not in_use(segment.path):
                    group.append(segment)
        return True

    def _merge_group(self, group: Sequence[Segment]) -> None:
        if len(group) == 1 or self.parts is None:
            return
        newest: dict[bytes, dict[str, np.ndarray]] = {}
        for segment in group:  # newest first
            for digest, row in intact_rows(segment):
                newest.setdefault(digest, row)
        if newest:
            rows = {name: np.stack([row[name] for row in newest.values()]) for name in self.parts}
            write_segment(self.folder, np.array(list(newest), f"S{DIGEST}"), self.parts, rows)
        for segment in group:
            remove_unused(segment.path)
        self.segments = [segment for segment in self.segments if segment not in group]

    @contextlib.contextmanager
    def _explain_write_errors(self) -> Iterator[None]:
        """Name the cache and its environment variable in write errors."""
        try:
            yield
        except UserError as error:
            reason = getattr(error.__cause__, "strerror", None) or error
            raise UserError(
                f"cannot write to the cache {self.root} ({reason}); free some space there, or set the environment"
                f" variable {FOLDER_VARIABLE} to another folder",
                "write-failed",
            ) from error


def store_folders(root: Path) -> list[Path]:
    """The stores in a cache: folders with a `spec.json` of this format, so that nothing else is ever removed. With a
    damaged one, a folder counts if it is named like a store and has segments."""
    stores = []
    for path in sorted(root.glob(f"*/{_SPEC}")):
        named_like_store = re.fullmatch(r".+-[0-9a-f]{24}", path.parent.name) is not None
        if is_spec(path) or (named_like_store and any(segment_paths(path.parent))):
            stores.append(path.parent)
    return stores


def is_spec(path: Path) -> bool:
    """Whether a file is the spec of a store of this format."""
    try:
        facts = read_json(path)
    except UserError:
        return False
    return isinstance(facts, dict) and facts.get("format") == _FORMAT and {"kind", "model", "transform"} <= facts.keys()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _megabytes(count: int) -> str:
    return f"{count / 10**6:,.1f} MB"
