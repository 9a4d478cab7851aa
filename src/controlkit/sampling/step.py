"""`Step`: the argument of the callback `on_step`, after each denoising step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image
from torch import Tensor
from torch.nn.functional import pixel_shuffle

from controlkit.bases.base import Base
from controlkit.bases.latent_rgb import latents_to_rgb
from controlkit.errors import UserError
from controlkit.images import to_images, write_png


def write_preview(step: Step, path: str | Path) -> None:
    """Write the previews of a step's images side by side, enlarged to the size of the images."""
    previews = step.preview()
    factor, columns = step.base.factor, math.ceil(math.sqrt(len(previews)))
    width, height = (side * factor for side in previews[0].size)
    sheet = Image.new("RGB", (columns * width, math.ceil(len(previews) / columns) * height))
    for index, preview in enumerate(previews):
        place = (index % columns * width, index // columns * height)
        sheet.paste(preview.resize((width, height), Image.Resampling.BICUBIC), place)
    write_png(path, sheet)


@dataclass(frozen=True)
class Step:
    """A denoising step of one batch of images.

    A callback may raise to cancel: nothing that belongs to the call remains, and base and controls can be used again.
    """

    base: Base
    done: int
    """Steps done, over all batches."""
    total: int
    """Steps of all batches."""
    step: int
    """Steps done of this batch."""
    steps: int
    """Steps of this batch."""
    images: range
    """Indices of this batch's images, in the order of the results."""
    clean: Callable[[], Tensor]
    """Computes the current estimate of the clean latents, `[len(images), C, h, w]`."""

    def among(self, before: int, total: int) -> Step:
        """A copy that counts several calls of sampling: `before` steps were done, of `total` in all."""
        return replace(self, done=before + self.done, total=total)

    def preview(self) -> list[Image.Image]:
        """Small previews, one per image and one pixel per position of the autoencoder, by a matrix in its place.

        Raises:
            UserError: the base has no matrix for its latents.
        """
        z = pixel_shuffle(self.clean(), self.base.latents.group)
        rows = self.base.latent_rgb
        if not rows:
            raise UserError(
                f"previews of {self.base.name} are not possible: no matrix is known for its {z.shape[1]} latent"
                " channels",
                "unsupported",
            )
        if len(rows) not in (z.shape[1], z.shape[1] + 1):
            raise UserError(
                f"previews of {self.base.name} are not possible: it has {z.shape[1]} latent channels, and the matrix of"
                f" its family {len(rows)} rows",
                "unsupported",
            )
        return to_images((latents_to_rgb(z, rows) + 1) / 2)
