"""Rows of the cache for a list of contents: those that are there, and those that are made when they are missing."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence

import numpy as np

from controlkit.data.cache import FOLDER_VARIABLE, LIMIT_VARIABLE, Store
from controlkit.data.segments import Part, Rows
from controlkit.errors import UserError

_SEGMENT_SECONDS = 60.0
"""A segment is written when it is full or so old: what a process that is killed loses."""
_ATTEMPTS = 4

Make = Callable[[Sequence[int]], tuple[dict[str, Part], Rows]]
"""Makes the rows of these indices: their parts, and their bytes."""


class CachedRows:
    """The rows of `digests`, in their order: those that the store lacks are made now, those that turn out to be
    damaged when they are read.

    Args:
        store: where they are kept.
        digests: `S16 [N]`, of the contents; equal ones share a row.
        make: makes the rows of some indices.
        what: what is made, for the line that says so, such as "encoding {count} pairs".
        batch: how many rows are made at a time.
        start: where in the list of missing rows to begin, from 0 to below 1. Processes that train together begin at
            different places and skip what others have finished meanwhile: so they share the work without waiting for
            each other, and none hangs when another dies.

    Raises:
        UserError: the cache cannot be written, or the rows do not fit into it.
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
        """What a row consists of."""
        return self.store.parts or {}

    def gather(self, chosen: np.ndarray) -> dict[str, np.ndarray]:
        """The rows of indices `chosen` `[B]`, by the name of the part, as bytes: `uint8 [B, nbytes]`, a copy.

        Raises:
            UserError: a damaged row cannot be replaced, since the cache cannot be written.
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
            again = self._again(indices)
            for position, index in damaged:
                for name, rows in again.items():
                    gathered[name][position] = rows[indices.index(index)]
        return gathered

    def check(self) -> None:
        """Read every row now, and make those that are damaged again.

        Raises:
            UserError: a damaged row cannot be replaced, since the cache cannot be written.
        """
        damaged = [index for index in range(len(self)) if self._read(index) is None]
        for first in range(0, len(damaged), self.batch):
            self._again(damaged[first : first + self.batch])

    def _read(self, index: int) -> dict[str, np.ndarray] | None:
        return self._segments[self._segment[index]].row(int(self._row[index]))

    def _again(self, indices: Sequence[int]) -> Rows:
        self.store.tell(f"damaged rows in {self.store.folder}: {len(indices)}; made again")
        parts, rows = self._make(indices)
        self.store.add(self.digests[list(indices)], parts, rows)
        self._locate()
        return rows

    def _locate(self) -> None:
        """Find every row, and hold the segments that have them."""
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
                raise UserError(f"cannot read the cache {self.store.folder}: {error.strerror or error}") from error
        raise self._vanishing()

    def _vanishing(self) -> UserError:
        return UserError(
            f"rows vanish from the cache {self.store.root} as fast as they are made; is another process clearing it?"
            f" Name another folder in {FOLDER_VARIABLE}, or raise {LIMIT_VARIABLE}"
        )

    def _fill(self, what: str) -> None:
        missing = np.flatnonzero(self._segment < 0)
        missing = np.sort(missing[np.unique(self.digests[missing], return_index=True)[1]])
        self.store.check_writable()
        print(f"{what.format(count=len(missing))} once, kept in {self.store.folder}", file=sys.stderr, flush=True)
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
            made = sum(array.nbytes for array in rows.values())
            if before is None:
                self.store.make_room(made // len(lacking) * len(missing))
            waiting.append((self.digests[lacking], rows))
            size += made
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
