"""Drawings of icons with cached latents, the training data of nano and its controls."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from controlkit.bases.base import Base
from controlkit.data.cache import Spec, Store
from controlkit.data.cached_rows import CachedRows
from controlkit.data.segments import Part, Rows, digests_of
from controlkit.errors import UserError
from controlkit.files import sha256_of
from controlkit.images import to_tensor
from controlkit.nano.icons import COLOURS, DRAWN_SIZE, LEAST_SCALE, Drawing, Icon, caption_of, draw
from controlkit.training.pair_cache import as_rows, gather_rows, start_of_process

_BATCH = 64


def check_drawn_size(base: Base) -> None:
    """Raises:
    UserError: `base` makes images of another size than that of drawings.
    """
    if base.size != DRAWN_SIZE:
        raise UserError(
            f"icons are drawn in {DRAWN_SIZE} x {DRAWN_SIZE} pixels, and {base.name} makes images of {base.size} x"
            f" {base.size}; set base=nano, or train on `pairs`",
            "contradiction",
        )


class Drawings:
    """`variants` drawings of each icon (random background, scale and position) with their latents.

    Drawings are composed on demand, which costs less than storing them. Latents are cached, for every run with the
    same icons, seed and autoencoder (`data.cache`).

    Args:
        encode: images `[b, 3, 64, 64]` in [-1, 1] => scaled latents.
        key: hash of the autoencoder's weights and settings.
        least_scale: as in `nano.icons.draw`.
    """

    def __init__(
        self,
        icons: Sequence[Icon],
        variants: int,
        seed: int,
        *,
        encode: Callable[[Tensor], Tensor],
        key: str,
        least_scale: float = LEAST_SCALE,
    ) -> None:
        self.icons = icons
        self.variants = variants
        self.seed = seed
        self.least_scale = least_scale
        rows = gather_rows(self._rows(encode, key), torch.arange(len(self)))
        self.latents = rows["latents"]
        self.colours = [list(COLOURS)[index] for index in rows["colour"].flatten().tolist()]

    def __len__(self) -> int:
        return len(self.icons) * self.variants

    def draw(self, index: int) -> Drawing:
        """Drawing `index`, the same in every call."""
        rng = np.random.default_rng((self.seed, index, 7))
        return draw(self.icons[index // self.variants], rng, least_scale=self.least_scale)

    def prompt(self, index: int, rng: np.random.Generator, drop: float) -> str:
        """Its caption, empty with probability `drop`; style and colour are each omitted with probability 0.2."""
        if rng.random() < drop:
            return ""
        icon = self.icons[index // self.variants]
        style = None if rng.random() < 0.2 else icon.style
        colour = None if rng.random() < 0.2 else self.colours[index]
        return caption_of(icon.concept, style, colour)

    def _rows(self, encode: Callable[[Tensor], Tensor], key: str) -> CachedRows:
        """Latent and colour of every drawing."""
        names = list(COLOURS)

        def make(indices: Sequence[int]) -> tuple[dict[str, Part], Rows]:
            drawings = [self.draw(index) for index in indices]
            with torch.no_grad():
                latents = encode(to_tensor([drawing.image for drawing in drawings]) * 2 - 1).half()
            colours = torch.tensor([[names.index(drawing.colour)] for drawing in drawings], dtype=torch.uint8)
            return as_rows({"latents": latents, "colour": colours})

        contents = [sha256_of(icon.rgba.tobytes()) for icon in self.icons]
        digests = digests_of(
            [
                sha256_of(contents[index // self.variants], repr((self.seed, index, self.least_scale, names)))
                for index in range(len(self))
            ]
        )
        store = Store(Spec(kind="drawings", model=key, transform="icons on coloured backgrounds"), note="nano")
        what = "encoding {count} drawings"
        return CachedRows(store, digests, make, what=what, batch=_BATCH, start=start_of_process())
