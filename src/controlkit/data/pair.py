"""One pair of a condition image and a picture, wherever its bytes lie."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from controlkit.data.sources import Source, read_picture
from controlkit.files import sha256_of
from controlkit.images import resize_cover


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One pair, on disk: paths of files, or pieces of a tar archive."""

    source: Source
    """The condition image."""
    target: Source
    """The picture."""
    prompt: str

    def images(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Condition image and picture, both `uint8 [size, size, 3]`, cropped around their centres alike."""
        source, target = (
            np.asarray(resize_cover(read_picture(where), size, size)) for where in (self.source, self.target)
        )
        return source, target

    def key(self) -> str:
        """Hash of the bytes of both."""
        return sha256_of(self.source.read_bytes(), self.target.read_bytes())
