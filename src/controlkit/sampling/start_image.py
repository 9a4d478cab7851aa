"""Sampling from an image: img2img (Meng et al. 2022, arXiv 2108.01073) and inpainting, as in diffusers' pipelines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from controlkit.bases.base import Base
from controlkit.bases.schedules import Solver
from controlkit.errors import UserError


def first_step(base: Base, steps: int, strength: float) -> int:
    """Index of the first of `steps` steps that runs.

    Raises:
        UserError: no step remains.
    """
    first = base.schedule.first_step(steps, strength)
    if first >= steps:
        raise UserError(
            f"strength {strength:g} of {steps} steps leaves no step to run; raise the strength or the number of steps",
            "out-of-range",
        )
    return first


@dataclass(frozen=True, kw_only=True)
class StartImage:
    """The image that sampling starts from."""

    pixels: Tensor
    """`[1, 3, H, W]` in [-1, 1] for all images, or `[B, 3, H, W]` with one for each."""
    strength: float
    """Fraction of the steps that run, in (0, 1]. With a mask, 1 starts from noise alone."""
    mask: Tensor | None = None
    """`[1, 1, H, W]`: at least 0.5 where the image is replaced. None is everywhere."""

    def of_images(self, images: slice) -> StartImage:
        """The start of some of the images."""
        return self if len(self.pixels) == 1 else replace(self, pixels=self.pixels[images])

    def first_step(self, base: Base, steps: int) -> int:
        """`first_step` for its strength."""
        return first_step(base, steps, self.strength)

    def begin(self, base: Base, solver: Solver, first: int, normal: Callable[[], Tensor]) -> Start:
        """The state of a batch before its first step.

        Args:
            first: from `first_step`; the solver has begun there.
            normal: draws standard normal latents `[B, C, h, w]`. It is called in the order of diffusers: for the
                posterior of the image, the noise, and the posterior of the masked image.

        Raises:
            UserError: the mask covers no latent position.
        """
        height, width = (side // base.factor for side in self.pixels.shape[-2:])
        mask = self._mask(base, height, width)
        from_noise = mask is not None and self.strength == 1
        z = None if from_noise and base.is_inpainting else base.encode_image(self.pixels, normal())
        noise = normal()
        x_t = noise * solver.initial if from_noise or z is None else solver.noised(z, noise, first)
        if mask is None:
            return Start(x_t)
        if not base.is_inpainting:
            normal()  # diffusers encodes the masked image for every base; stochastic solvers draw after that
            return Start(x_t, mask=mask, z=z, noise=noise)
        assert self.mask is not None
        hidden = base.encode_image(self.pixels * (self.mask < 0.5), normal())
        return Start(x_t, masked=torch.cat([mask.expand(len(noise), -1, -1, -1), hidden], 1))

    def _mask(self, base: Base, height: int, width: int) -> Tensor | None:
        """The mask of the latents, `[1, 1, h, w]` of zeros and ones."""
        if self.mask is None:
            return None
        mask = functional.interpolate((self.mask >= 0.5).float(), (height, width))
        if not mask.any():
            raise UserError(
                "the mask is black at every latent position, so nothing would be inpainted; paint white what is to be"
                f" replaced, at least {base.factor} pixels wide",
                "out-of-range",
            )
        return mask.to(base.device, base.dtype)


@dataclass(frozen=True)
class Start:
    """The state of a batch of images that starts from an image."""

    x_t: Tensor
    """Latents before the first step, `[B, C, h, w]`."""
    mask: Tensor | None = None
    """`[1, 1, h, w]`, 1 where latents are replaced; of bases that do not read it."""
    z: Tensor | None = None
    """Clean latents of the image, which are kept outside the mask."""
    noise: Tensor | None = None
    masked: Tensor | None = None
    """`Base.predict`'s, for inpainting models."""

    def kept(self, x_t: Tensor, solver: Solver, following: int) -> Tensor:
        """Latents with those of the image outside the mask.

        Args:
            x_t: before step `following`; clean after the last step.
        """
        if self.mask is None or self.z is None or self.noise is None:
            return x_t
        is_last = following == len(solver.timesteps)
        outside = self.z if is_last else solver.noised(self.z, self.noise, following)
        return (1 - self.mask) * outside + self.mask * x_t
