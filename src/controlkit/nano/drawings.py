"""Drawings of icons with cached latents, the training data of nano and its controls."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from controlkit.files import sha256_of, write_atomically
from controlkit.images import to_tensor
from controlkit.nano.icons import LEAST_SCALE, Drawing, Icon, caption_of, draw

_BATCH = 64


class Drawings:
    """`variants` drawings of each icon (random background, scale and position) with their latents.

    Drawings are composed on demand, which costs less than storing them. Latents are cached in `path` for the same
    icons, seed and autoencoder.

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
        path: Path,
        encode: Callable[[Tensor], Tensor],
        key: str,
        least_scale: float = LEAST_SCALE,
    ) -> None:
        self.icons = icons
        self.variants = variants
        self.seed = seed
        self.least_scale = least_scale
        contents = [part for icon in icons for part in (icon.style, icon.concept, icon.rgba.tobytes())]
        full_key = sha256_of(*contents, repr((variants, seed, least_scale)), key)
        self.latents, self.colours = self._read(path, full_key) or self._encode(path, full_key, encode)

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

    @staticmethod
    def _read(path: Path, key: str) -> tuple[Tensor, list[str]] | None:
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("key") != key:
                    return None
                return file.get_tensor("latents"), metadata["colours"].split()
        except (SafetensorError, KeyError):  # damaged: encode again
            return None

    def _encode(self, path: Path, key: str, encode: Callable[[Tensor], Tensor]) -> tuple[Tensor, list[str]]:
        print(f"encoding {len(self)} drawings, cached in {path}", file=sys.stderr, flush=True)
        chunks: list[Tensor] = []
        colours: list[str] = []
        for first in range(0, len(self), _BATCH):
            drawings = [self.draw(index) for index in range(first, min(first + _BATCH, len(self)))]
            colours += [drawing.colour for drawing in drawings]
            with torch.no_grad():
                chunks.append(encode(to_tensor([drawing.image for drawing in drawings]) * 2 - 1).half().cpu())
        latents = torch.cat(chunks).contiguous()  # a slice of channels in an autoencoder without quant convolutions
        metadata = {"key": key, "colours": " ".join(colours)}
        write_atomically(path, lambda temporary: save_file({"latents": latents}, temporary, metadata))
        return latents, colours
