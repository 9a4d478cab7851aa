"""A pair of condition image and image, in files or tar archives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from controlkit.conditions import find
from controlkit.conditions.condition import Condition, left_right
from controlkit.data.sources import ComputedCondition, Source, open_image, upright_size
from controlkit.files import sha256_of
from controlkit.images import resize_cover

SOURCE, TARGET = "source", "target"
"""The sides of a pair: condition image and image."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One pair on disk."""

    source: Source
    """The condition image."""
    target: Source
    """The image."""
    prompt: str
    """The first caption, which evaluation and previews use."""
    more_prompts: tuple[str, ...] = ()
    """Further captions. Training samples one of all captions at each step."""
    condition: str | None = None
    """The condition of `source`, if known; it decides how condition images are scaled and flipped."""
    parameters: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """The condition's parameters for `source`, if known; scores compute the condition of a result with them."""
    sha256: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Side (`SOURCE`, `TARGET`) -> hex SHA-256 of its file, where a manifest records it."""
    original: str | None = None
    """Hex SHA-256 of the image file that `target` was made from, where a manifest records it; tiles share it."""
    place: float = 0.5
    """Position of the square crop along the long side, from 0 (left, top) to 1."""

    @property
    def captions(self) -> tuple[str, ...]:
        """All captions: at least one, possibly empty."""
        return (self.prompt, *self.more_prompts)

    def images(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Condition image and image, both `uint8 [size, size, 3]`, cropped at `place`."""
        return self.side(SOURCE, size), self.side(TARGET, size)

    def side(self, side: str, size: int, mirrored: bool = False) -> np.ndarray:
        """One side of the pair, `SOURCE` or `TARGET`: `uint8 [size, size, 3]`, cropped at `place`.

        Args:
            mirrored: flip the pair horizontally.

        Raises:
            UserError: it cannot be read, or images of its condition cannot be flipped.
        """
        condition = find(self.condition) if side == SOURCE and self.condition is not None else None
        nearest = condition is not None and condition.resize == "nearest"
        background = Condition.background if condition is None else condition.background
        whole = open_image(getattr(self, side), background)
        image = np.asarray(resize_cover(whole, size, size, nearest=nearest, place=self.place))
        if not mirrored:
            return image
        return left_right(image) if condition is None else condition.mirrored(image, self.parameters)

    def is_scaled(self, size: int) -> bool:
        """Whether the condition image of this size is scaled."""
        return min(open_image(self.source).size) != size

    @property
    def is_reproducible(self) -> bool:
        """Whether the condition image can be computed from the image: by recorded parameters, without a network."""
        if self.condition is None or not self.parameters:
            return False
        condition = find(self.condition)
        return condition.requires is None and not condition.provided

    def reference(self, size: int) -> np.ndarray:
        """What scores compare the condition of a result with, `uint8 [size, size, 3]`.

        Scaling makes lines thinner, so that no image has exactly the edges of a larger one scaled down. So this is the
        condition of the scaled image where the condition image is scaled and reproducible, else the condition image.
        """
        if self.condition is None or not self.is_reproducible or not self.is_scaled(size):
            return self.side(SOURCE, size)
        return find(self.condition)(self.side(TARGET, size), **self.parameters)

    def key(self) -> str:
        """Hash of the bytes of both sides."""
        return sha256_of(self.source.read_bytes(), self.target.read_bytes())

    def crops(self, count: int) -> list[Pair]:
        """The pair at `count` evenly spaced places; a square one, whose crops are all the same, `count` times."""
        if count == 1:
            return [self]
        target = self.target
        size = None if isinstance(target, ComputedCondition) else upright_size(target)  # of the header: much faster
        width, height = size or open_image(target).size
        if width == height:
            return [self] * count
        return [replace(self, place=(number + 0.5) / count) for number in range(count)]


def references_of(pairs: Sequence[Pair], size: int) -> list[np.ndarray] | None:
    """`Pair.reference` of each; None if all are the condition images."""
    if not any(pair.is_reproducible and pair.is_scaled(size) for pair in pairs):
        return None
    return [pair.reference(size) for pair in pairs]
