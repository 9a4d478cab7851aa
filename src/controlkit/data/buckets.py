"""Aspect-ratio buckets: images of similar aspect ratio share a size and a batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from controlkit.errors import UserError

Size = tuple[int, int]
"""Width and height in pixels."""


@dataclass(frozen=True, kw_only=True)
class Buckets:
    """Sizes of at most `size` x `size` pixels whose sides are multiples of `step`."""

    size: int = 512
    """Side of the square bucket."""
    step: int = 64
    """Granularity of both sides."""
    longest: float = 2.0
    """Maximum ratio of long to short side."""

    def __post_init__(self) -> None:
        if self.step < 1 or self.size < self.step or self.size % self.step:
            raise UserError(f"buckets: size is {self.size}; expected a multiple of {self.step}", "wrong-size")
        if self.longest < 1:
            raise UserError(f"buckets: longest is {self.longest}; expected at least 1", "out-of-range")

    @cached_property
    def sizes(self) -> tuple[Size, ...]:
        """Every bucket, from tallest to widest, including the square, which none exceeds in pixels."""
        most = self.size * self.size
        found = {(self.size, self.size)}
        for long in range(self.size, int(self.size * self.longest) + 1, self.step):
            short = most // long // self.step * self.step
            if short >= self.step and long <= self.longest * short:
                found |= {(long, short), (short, long)}
        return tuple(sorted(found, key=lambda bucket: (bucket[0] / bucket[1], bucket)))

    def assign(self, width: int, height: int) -> Size:
        """The bucket nearest in aspect ratio to `width` x `height`, which crops least; the larger one of a tie."""
        aspect = math.log(width / height)
        return min(
            self.sizes, key=lambda size: (round(abs(math.log(size[0] / size[1]) - aspect), 9), -size[0] * size[1])
        )


@dataclass(frozen=True, kw_only=True)
class BucketBatches:
    """Batches whose images share a bucket; batch `n` depends on (seed, n) alone.

    Every image occurs at least once per epoch. The last batch of a bucket is filled up from its start, so that all
    batches have the same size and no image is dropped.
    """

    buckets: Sequence[Size]
    """The bucket of each image."""
    batch_size: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1 or not self.buckets:
            raise ValueError(f"{len(self.buckets)} images in batches of {self.batch_size}")

    @cached_property
    def _members(self) -> tuple[np.ndarray, ...]:
        groups: dict[Size, list[int]] = {}
        for index, bucket in enumerate(self.buckets):
            groups.setdefault(bucket, []).append(index)
        return tuple(np.array(groups[bucket]) for bucket in sorted(groups))

    @property
    def steps_per_epoch(self) -> int:
        """Batches per epoch."""
        return sum(-(-len(members) // self.batch_size) for members in self._members)

    def batch(self, step: int) -> list[int]:
        """Indices of the `batch_size` images of batch `step`, all from one bucket."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch not in self._plans:
            self._plans.clear()
            self._plans[epoch] = self._plan(epoch)
        return self._plans[epoch][position].tolist()

    @cached_property
    def _plans(self) -> dict[int, np.ndarray]:
        return {}

    def _plan(self, epoch: int) -> np.ndarray:
        """All batches of an epoch `[steps, batch_size]`."""
        rng = np.random.default_rng((self.seed, epoch))
        batches = []
        for members in self._members:
            order = rng.permutation(members)
            filled = np.resize(order, -(-len(order) // self.batch_size) * self.batch_size)
            batches.append(filled.reshape(-1, self.batch_size))
        return rng.permutation(np.concatenate(batches))
