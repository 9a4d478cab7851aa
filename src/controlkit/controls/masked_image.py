"""Inputs of alibaba-pai's Fun ControlNets, which read a masked image beside the condition image."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pixel_unshuffle

from controlkit.bases.base import Base
from controlkit.controls.inputs import Input, check_range
from controlkit.errors import UserError

INPAINTING = (
    Input(name="original", condition="identity", required=False),
    Input(name="mask", condition="identity", required=False),
)
"""The image, and where to inpaint it (white)."""


def latents_of(given: Mapping[str, Tensor], base: Base) -> Tensor:
    """The latents of condition images, the mode of the posterior; with a masked image also where it is kept, and its
    latent without the rest, `[B, C, h, w]` or `[B, 2 * C + 1, h, w]`; a base that groups positions of its autoencoder
    has one channel of the mask for each of a group.

    Args:
        given: images `[B, 3, H, W]` in [0, 1] by the names of inputs: `image`, and both or none of `INPAINTING`.

    Raises:
        ValueError: a value is outside [0, 1].
        UserError: the size does not fit the base, or one of `original` and `mask` is missing.
    """
    if ("original" in given) != ("mask" in given):
        raise UserError("inpainting takes both original and mask; one is missing", "contradiction")
    for image in given.values():
        base.check_size(image.shape[-1], image.shape[-2])
        check_range(image)
    latents = base.encode_image(given["image"] * 2 - 1)
    if "mask" not in given:
        return latents
    kept = (given["mask"][:, :1] < 0.5).to(latents)
    masked = base.encode_image((given["original"] * 2 - 1).to(latents) * kept)
    group = base.latents.group
    mask = interpolate(kept, [side * group for side in latents.shape[-2:]])
    parts = (latents, pixel_unshuffle(mask, group), masked)
    rows = max(map(len, parts))
    return torch.cat([part.expand(rows, -1, -1, -1) for part in parts], 1)
