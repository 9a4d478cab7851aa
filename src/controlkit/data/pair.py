"""One pair of a condition image and an image, wherever its bytes lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from controlkit.conditions import find
from controlkit.conditions.condition import Condition, left_right
from controlkit.data.sources import Source, open_image
from controlkit.files import sha256_of
from controlkit.images import resize_cover

SOURCE, TARGET = "source", "target"
"""The sides of a pair: condition image and image."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One pair, on disk: paths of files, or pieces of a tar archive."""

    source: Source
    """The condition image."""
    target: Source
    """The image."""
    prompt: str
    """Its caption; the first, where there are several. Evaluation and previews use this one."""
    more_prompts: tuple[str, ...] = ()
    """Further captions of the same image. Training draws one of all of them in each step."""
    condition: str | None = None
    """Which condition `source` is, where that is known; it decides how its images are scaled and mirrored."""
    parameters: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Those that `source` was made with, where that is known; scores of a result make its condition image with them."""

    @property
    def captions(self) -> tuple[str, ...]:
        """All captions; one at least, which may be empty."""
        return (self.prompt, *self.more_prompts)

    def images(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Condition image and image, both `uint8 [size, size, 3]`, cropped around their centres alike."""
        return self.side(SOURCE, size), self.side(TARGET, size)

    def side(self, side: str, size: int, mirrored: bool = False) -> np.ndarray:
        """One side of the pair, `SOURCE` or `TARGET`, as `images` gives it: `uint8 [size, size, 3]`.

        Args:
            mirrored: as it is when the image is flipped.

        Raises:
            UserError: it cannot be read, or images of its condition cannot be mirrored.
        """
        condition = find(self.condition) if side == SOURCE and self.condition is not None else None
        nearest = condition is not None and condition.resize == "nearest"
        background = Condition.background if condition is None else condition.background
        image = np.asarray(resize_cover(open_image(getattr(self, side), background), size, size, nearest=nearest))
        if not mirrored:
            return image
        return left_right(image) if condition is None else condition.mirrored(image)

    def key(self) -> str:
        """Hash of the bytes of both."""
        return sha256_of(self.source.read_bytes(), self.target.read_bytes())
