"""The objective of nano's autoencoder."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from controlkit.images import contact_sheet, to_images, to_tensor, write_png
from controlkit.nano.icons import TRAINED_STYLES, Icon, IconSets, draw
from controlkit.nano.recipes import AutoencoderRecipe
from controlkit.training.objective import Objective, numpy_generator

SIZE = 64


class AutoencoderObjective(Objective):
    """L1, squared and gradient loss with a small KL term (Rombach et al. 2022, section 3.1, without a GAN)."""

    recipe: AutoencoderRecipe
    not_ahead = ""

    def __init__(self, recipe: AutoencoderRecipe, device: torch.device) -> None:
        self.recipe = recipe
        self.device = device
        sets = IconSets(recipe.icons)
        self.icons = sets.select(styles=TRAINED_STYLES, held_out=False)
        torch.manual_seed(recipe.seed)
        self.network = build_autoencoder(recipe.channels, recipe.latent_channels).to(device)
        self.trained = nn.ModuleDict({"autoencoder": self.network})
        self.held_out = images(sets.select(styles=TRAINED_STYLES, held_out=True), 192, numpy_generator(0, 0, 9)).to(
            device
        )

    def prepare(self, step: int) -> tuple[Tensor, Tensor]:
        """Images `[B, 3, 64, 64]` in [-1, 1], and noise of the posterior's shape."""
        x = images(self.icons, self.global_batch, self.numpy_generator(step))[self.local_slice]
        side = SIZE // 2 ** (len(self.recipe.channels) - 1)
        shape = (self.global_batch, self.recipe.latent_channels, side, side)
        return x, torch.randn(shape, generator=self.torch_generator(step))[self.local_slice]

    def loss(self, step: int) -> Tensor:
        x, noise = self.prepared(step, self.device)
        posterior = self.network.encode(x).latent_dist
        z = posterior.mean + posterior.std * noise
        error = self.network.decode(z).sample - x
        horizontal = (error[..., 1:] - error[..., :-1]).abs().mean()
        vertical = (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
        divergence = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        return (
            error.abs().mean()
            + self.recipe.square_weight * error.pow(2).mean()
            + self.recipe.gradient_weight * (horizontal + vertical)
            + self.recipe.kl_weight * divergence
        )

    @torch.no_grad()
    def preview(self, step: int, folder: Path) -> dict[str, float]:
        z = self.network.encode(self.held_out).latent_dist.mode()
        y = self.network.decode(z).sample.clamp(-1, 1)
        squared = ((y - self.held_out) / 2).pow(2).mean((1, 2, 3))
        columns = [
            [*pair] for pair in zip(to_images((self.held_out[:12] + 1) / 2), to_images((y[:12] + 1) / 2), strict=True)
        ]
        write_png(folder / f"{step:07d}.png", contact_sheet(list(map(list, zip(*columns, strict=True))), cell=96))
        return {"psnr": (-10 * torch.log10(squared)).mean().item(), "latent_std": z.std().item()}

    @torch.no_grad()
    def save(self, folder: Path, step: int) -> list[Path]:
        latents = self.network.encode(self.held_out).latent_dist.mode()
        # SD's convention (Rombach et al. 2022, appendix G): latents times this have unit variance.
        self.network.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
        self.network.save_pretrained(folder / "vae", safe_serialization=True)
        return [folder / "vae"]


def build_autoencoder(channels: tuple[int, ...], latent_channels: int) -> AutoencoderKL:
    """A new `AutoencoderKL` without attention, with a narrow initial posterior so that it quickly learns to copy."""
    levels = len(channels)
    network = AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=math.gcd(8, *channels),
        mid_block_add_attention=False,
        sample_size=SIZE,
    )
    with torch.no_grad():
        network.quant_conv.weight[latent_channels:].zero_()
        network.quant_conv.bias[latent_channels:].fill_(-6.0)
    return network


def images(icons: list[Icon], count: int, rng: np.random.Generator) -> Tensor:
    """`count` random drawings, `[count, 3, 64, 64]` in [-1, 1]."""
    chosen = rng.integers(len(icons), size=count)
    return to_tensor([draw(icons[index], rng, SIZE).image for index in chosen]) * 2 - 1
