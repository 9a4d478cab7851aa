"""Cached rows for a list of contents; missing and damaged ones are computed."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence

import numpy as np

from controlkit.data.cache import FOLDER_VARIABLE, LIMIT_VARIABLE, Store
from controlkit.data.segments import Part, Rows
from controlkit.errors import UserError

_SEGMENT_SECONDS = 60.0
"""A segment is written when it is full or this old, which bounds what a killed process loses."""
_ATTEMPTS = 4

Make = Callable[[Sequence[int]], tuple[dict[str, Part], Rows]]
"""Computes the rows of some indices: their parts, and their bytes."""


class CachedRows:
    """The rows of `digests`, in order. Missing rows are computed now, damaged ones when they are read.

    Args:
        store: where they are stored.
        digests: `S16 [N]`, of the contents; equal ones share a row.
        make: computes the rows of some indices.
        what: message while computing, such as "encoding {count} pairs".
        batch: rows computed at a time.
        start: where in the list of missing rows to begin, in [0, 1). Processes of one run begin at different places
            and skip what others have finished: they share the work without waiting, and none hangs when another dies.

    Raises:
        UserError: the cache is not writable, or the rows do not fit into it.
    """

    def __init__(
        self, store: Store, digests: np.ndarray, make: Make, *, what: str, batch: int = 32, start: float = 0.0
    ) -> None:
        self.store = store
        self.digests = digests
        self.batch = batch
        self._make = make
        self._start = start
        self._locate()
        attempts = 0
        while (self._segment < 0).any():
            if attempts == _ATTEMPTS:
                raise self._vanishing()
            self._fill(what)
            attempts += 1

    def __len__(self) -> int:
        return len(self.digests)

    @property
    def parts(self) -> dict[str, Part]:
        """The tensors of a row."""
        return self.store.parts or {}

    def gather(self, chosen: np.ndarray) -> dict[str, np.ndarray]:
        """Copies of the rows at indices `chosen` `[B]`: name of the part -> bytes `uint8 [B, nbytes]`.

        Raises:
            UserError: a damaged row cannot be replaced because the cache is not writable.
        """
        gathered = {name: np.empty((len(chosen), part.nbytes), np.uint8) for name, part in self.parts.items()}
        damaged: list[tuple[int, int]] = []
        for position, index in enumerate(chosen.tolist()):
            row = self._read(index)
            if row is None:
                damaged.append((position, index))
                continue
            for name, part in row.items():
                gathered[name][position] = part
        if damaged:
            indices = sorted({index for _, index in damaged})
            replaced = self._replace(indices)
            for position, index in damaged:
                for name, rows in replaced.items():
                    gathered[name][position] = rows[indices.index(index)]
        return gathered

    def check(self) -> None:
        """Read every row now, and replace damaged ones.

        Raises:
            UserError: a damaged row cannot be replaced because the cache is not writable.
        """
        damaged = [index for index in range(len(self)) if self._read(index) is None]
        for first in range(0, len(damaged), self.batch):
            self._replace(damaged[first : first + self.batch])

    def _read(self, index: int) -> dict[str, np.ndarray] | None:
        return self._segments[self._segment[index]].row(int(self._row[index]))

    def _replace(self, indices: Sequence[int]) -> Rows:
        parts, rows = self._make(indices)
        self.store.warn(f"damaged rows in {self.store.folder}: {len(indices)}; computed again")
        self.store.add(self.digests[list(indices)], parts, rows)
        self._locate()
        return rows

    def _locate(self) -> None:
        """Find every row, and map the segments that have them."""
        for _ in range(_ATTEMPTS):
            self._segments = self.store.segments
            self._segment, self._row = self.store.find(self.digests)
            try:
                for number in np.unique(self._segment[self._segment >= 0]):
                    self._segments[number].map()
                return
            except FileNotFoundError:  # removed since it was listed
                self.store.refresh()
            except OSError as error:
                raise UserError(
                    f"cannot read the cache {self.store.folder}: {error.strerror or error}", "unreadable-file"
                ) from error
        raise self._vanishing()

    def _vanishing(self) -> UserError:
        return UserError(
            f"rows vanish from the cache {self.store.root} as fast as they are computed: another process clears it, or"
            f" it is too small; set {FOLDER_VARIABLE} to another folder, or raise {LIMIT_VARIABLE}",
            "in-use",
        )

    def _fill(self, what: str) -> None:
        missing = np.flatnonzero(self._segment < 0)
        missing = np.sort(missing[np.unique(self.digests[missing], return_index=True)[1]])
        self.store.check_writable()
        print(f"{what.format(count=len(missing))} once, cached in {self.store.folder}", file=sys.stderr, flush=True)
        batches = [missing[at : at + self.batch] for at in range(0, len(missing), self.batch)]
        first = int(self._start * len(batches))
        waiting: list[tuple[np.ndarray, Rows]] = []
        size, since, parts = 0, time.monotonic(), None
        for batch in batches[first:] + batches[:first]:
            lacking = batch[self._segment[batch] < 0]
            if not len(lacking):
                continue
            before = parts
            parts, rows = self._make(lacking.tolist())
            nbytes = sum(array.nbytes for array in rows.values())
            if before is None:
                self.store.make_room(nbytes // len(lacking) * len(missing))
            waiting.append((self.digests[lacking], rows))
            size += nbytes
            if size >= self.store.segment_bytes or time.monotonic() - since > _SEGMENT_SECONDS:
                self._write(parts, waiting)
                waiting, size, since = [], 0, time.monotonic()
                if left := int((self._segment[missing] < 0).sum()):
                    print(f"{self.store.spec.kind}: {left} of {len(missing)} to go", file=sys.stderr, flush=True)
        if parts is not None and waiting:
            self._write(parts, waiting)

    def _write(self, parts: dict[str, Part], waiting: Sequence[tuple[np.ndarray, Rows]]) -> None:
        digests = np.concatenate([digests for digests, _ in waiting])
        self.store.add(digests, parts, {name: np.concatenate([rows[name] for _, rows in waiting]) for name in parts})
        self._locate()
