"""`LatentSpace`: the autoencoder of a model, images to latents and back."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import RLock
from typing import ClassVar

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from controlkit.bases.latent_rgb import LatentRGB
from controlkit.bases.networks import Networks

_CASTING = RLock()
"""Held while an autoencoder that overflows is cast, which several threads may use."""

PIXELS_AT_ONCE = 2**19
"""Pixels per call of an autoencoder: two images of 512 x 512, whose largest float32 activations take 256 MiB, or whole
batches of small images."""


@dataclass(frozen=True, kw_only=True)
class Latents:
    """Shape and scale of a base's latents."""

    channels: int
    factor: int
    """Downsampling factor of the autoencoder: pixels per latent position, along each side."""
    scale: float | tuple[float, ...] = 1.0
    """Latents are (z - shift) * scale of the autoencoder's output z, for about unit variance; one number for all
    channels, or one for each."""
    shift: float | tuple[float, ...] = 0.0
    patch: int = 1
    """Patch size: latent positions per token, along each side."""
    group: int = 1
    """Positions of the autoencoder in one of latents, along each side; its channels are theirs, one after another."""

    def scaled(self, z: Tensor) -> Tensor:
        """Output of the autoencoder `[B, C, h, w]` => scaled latents."""
        return (z - _by_channel(self.shift, z)) * _by_channel(self.scale, z)

    def unscaled(self, z: Tensor) -> Tensor:
        """The inverse of `scaled`."""
        return z / _by_channel(self.scale, z) + _by_channel(self.shift, z)


def _by_channel(values: float | tuple[float, ...], like: Tensor) -> Tensor | float:
    """One number, or one for each channel as `[1, C, 1, 1]`."""
    return values if isinstance(values, (int, float)) else torch.tensor(values).to(like).view(1, -1, 1, 1)


class LatentSpace(Networks):
    """A model's autoencoder in terms of its denoiser.

    Images are `[B, 3, H, W]` in [-1, 1]; latents are `[B, latents.channels, H / factor, W / factor]`, scaled to about
    unit variance.
    """

    usual_latent_rgb: ClassVar[LatentRGB] = ()
    """Linear approximation of the family's autoencoder, for previews; empty if unknown."""

    @property
    @abstractmethod
    def latents(self) -> Latents:
        """Shape and scale of its latents."""

    @property
    def latent_channels(self) -> int:
        """Channels of its latents."""
        return self.latents.channels

    @property
    def vae_channels(self) -> int:
        """Channels of the latents of its autoencoder."""
        return int(self.vae.config["latent_channels"])

    @property
    def factor(self) -> int:
        """Pixels per latent position, along each side."""
        return self.latents.factor

    @torch.no_grad()
    def encode_image(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Images `[B, 3, H, W]` => scaled latents: the mode of the posterior, or a sample of it.

        An autoencoder in float16 that overflows is cast to float32 for good.

        Args:
            noise: standard normal `[B, C, h, w]` of the sample; for one image, of several samples.
        """
        x = x.to(self.vae.device, self.vae.dtype)  # which may be offloaded while the network trains
        parts = x.split(_vae_batch(x.shape[2] * x.shape[3]))
        moments = [self._finite(self._moments, part) for part in parts]
        posteriors = [DiagonalGaussianDistribution(each) for each in moments]
        z = torch.cat([posterior.mode() for posterior in posteriors])
        if noise is not None:
            z = z + torch.cat([posterior.std for posterior in posteriors]) * noise.to(z.device, z.dtype)
        return self.scaled(z).to(self.device, self.dtype)

    def scaled(self, z: Tensor) -> Tensor:
        """Output of the autoencoder => scaled latents."""
        return self.latents.scaled(z)

    def unscaled(self, z: Tensor) -> Tensor:
        """The inverse of `scaled`."""
        return self.latents.unscaled(z)

    def _moments(self, x: Tensor) -> Tensor:
        """Images => mean and logarithm of the variance of the autoencoder's posterior, `[B, 2 * C, h, w]`."""
        moments: Tensor = self.vae.encode(x).latent_dist.parameters
        return moments

    def _pixels(self, z: Tensor) -> Tensor:
        """Output of the autoencoder's encoder => images, not clamped."""
        images: Tensor = self.vae.decode(z).sample
        return images

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Scaled latents => images, clamped to [-1, 1].

        An autoencoder in float16 that overflows is cast to float32 for good.
        """
        z = self.unscaled(z.to(self.vae.dtype))
        parts = z.split(_vae_batch(z.shape[2] * z.shape[3] * self.factor**2))
        images = torch.cat([self._finite(self._pixels, part) for part in parts])
        return images.clamp(-1, 1)

    def _finite(self, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """`run` of the autoencoder on `x`. One that overflows float16 is cast to float32, which it then keeps."""
        if self.vae.dtype != torch.float16 or x.is_meta:
            return run(x.to(self.vae.dtype))
        try:
            made = run(x.half())
            if made.isfinite().all():
                return made
        except RuntimeError:
            with _CASTING:
                if self.vae.dtype == torch.float16:
                    raise  # else another thread has cast it meanwhile
        with _CASTING:
            self.vae.to(torch.float32)
        return run(x.float())

    @contextmanager
    def slicing(self, enabled: bool = True) -> Iterator[None]:
        """A context in which the autoencoder takes one image at a time, as by `enable_slicing` of diffusers."""
        before = self.vae.use_slicing
        self.vae.use_slicing = enabled
        try:
            yield
        finally:
            self.vae.use_slicing = before

    @contextmanager
    def tiling(self, enabled: bool = True) -> Iterator[None]:
        """A context in which the autoencoder works in overlapping tiles, of its native size or as it says, as by
        `enable_tiling` of diffusers. It bounds the memory for large images and changes them a little."""
        before = self.vae.use_tiling
        self.vae.use_tiling = enabled
        try:
            yield
        finally:
            self.vae.use_tiling = before


def _vae_batch(pixels: int) -> int:
    """Images of `pixels` pixels per call of an autoencoder."""
    return max(1, PIXELS_AT_ONCE // pixels)
