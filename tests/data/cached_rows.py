"""Rows that tell whether they are right, for the tests of the cache and for programs that they start."""

from __future__ import annotations

import numpy as np

from controlkit.data.cache import Spec, Store
from controlkit.data.cached_rows import CachedRows
from controlkit.data.segments import Part, digests_of
from controlkit.files import sha256_of

SPEC = Spec(kind="latents", model="m", transform="8 x 8")
WIDTH = 24


def digests(first: int, count: int) -> np.ndarray:
    return digests_of([sha256_of(str(number)) for number in range(first, first + count)])


def content(number: int) -> np.ndarray:
    """What row `number` holds."""
    return np.random.default_rng(number).integers(0, 256, WIDTH, np.uint8)


class Encoder:
    """Makes the rows of `content` and counts them; `first` is the number of its first row."""

    def __init__(self, first: int = 0) -> None:
        self.first = first
        self.made: list[int] = []

    def __call__(self, indices):
        self.made += [self.first + index for index in indices]
        rows = np.stack([content(self.first + index) for index in indices])
        return {"x": Part(dtype="F16", shape=(3, WIDTH // 6))}, {"x": rows}


def cached(count: int = 10, first: int = 0, spec: Spec = SPEC, **settings) -> tuple[CachedRows, Encoder]:
    encoder = Encoder(first)
    rows = CachedRows(Store(spec), digests(first, count), encoder, what="encoding {count} rows", batch=4, **settings)
    return rows, encoder


def assert_right(rows: CachedRows, first: int = 0) -> None:
    everything = rows.gather(np.arange(len(rows)))["x"]
    assert np.array_equal(everything, np.stack([content(first + number) for number in range(len(rows))]))
