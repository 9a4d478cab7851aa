"""Recipes of nano's own networks: its autoencoder, and its text encoder with its UNet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from controlkit.errors import UserError
from controlkit.nano.icons import LEAST_SCALE, TRAINED_STYLES
from controlkit.training.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class AutoencoderRecipe(Recipe):
    """The autoencoder of an embedded base, from scratch, on icons."""

    system: ClassVar[str] = "autoencoder"
    objective: ClassVar[str] = "controlkit.nano.autoencoder_objective:AutoencoderObjective"

    icons: str
    """File of rendered icons (`recipes/nano/build_pictures.py`)."""
    channels: tuple[int, ...] = (16, 32, 64)
    """Channels of each resolution; one fewer halvings than entries."""
    latent_channels: int = 4
    """Channels of the latent."""
    kl_weight: float = 2e-5
    """Weight of the mean KL divergence of a latent element to a unit normal."""
    gradient_weight: float = 0.5
    """Weight of the L1 distance of horizontal and vertical differences, which keeps edges sharp."""
    square_weight: float = 1.0
    """Weight of the squared error."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_channels(self.channels)

    @property
    def results(self) -> tuple[str, ...]:
        return ("vae",)


@dataclass(frozen=True, kw_only=True)
class BaseRecipe(Recipe):
    """The text encoder and UNet of an embedded base, together, on icons: from scratch, or from a base that there is."""

    system: ClassVar[str] = "base"
    objective: ClassVar[str] = "controlkit.nano.base_objective:BaseObjective"

    icons: str
    """File of rendered icons."""
    autoencoder: str | None = None
    """Folder of the run that trained the autoencoder; this or `start`."""
    start: str | None = None
    """The base to start from, all of it: `nano` or a diffusers folder. Channels and text settings are its own then."""
    styles: tuple[str, ...] | None = None
    """Styles of icons to train on; None for all four. One alone makes a community model of a base."""
    concepts: str | None = None
    """Text file of the concepts to train on, one a line; None for all that can be drawn."""
    least_scale: float = LEAST_SCALE
    """Side of the smallest icon in a drawing, as a fraction of the drawing's."""
    time_sampling: str | None = None
    """How times of the noise schedule are drawn: `uniform`, `cubic` (more of the noisy ones) or `logit-normal` (more of
    those in the middle). None is the base's own: uniform for Stable Diffusion and nano."""
    snr_gamma: float | None = None
    """Weights the loss by min-SNR with this gamma (Hang et al. 2023 take 5); None weights all times alike."""
    channels: tuple[int, ...] = (48, 96, 160)
    """Channels of each resolution of the UNet."""
    attention: tuple[bool, ...] = (False, True, True)
    """Which resolutions have transformer blocks."""
    text_width: int = 128
    """Width of the text encoder and of cross attention."""
    text_layers: int = 2
    """Layers of the text encoder."""
    prompt_drop: float = 0.1
    """Share of prompts replaced by the empty prompt."""
    variants: int = 6
    """Drawings of each icon (background, scale, place) whose latents are kept."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.autoencoder is None) == (self.start is None):
            raise UserError("give either autoencoder (to train from scratch) or start (to go on from a base)")
        if not 0.1 <= self.least_scale <= 1:
            raise UserError(f"least_scale is {self.least_scale}; it must lie from 0.1 to 1")
        _check_channels(self.channels)
        if self.styles is not None and not set(self.styles) <= set(TRAINED_STYLES):
            raise UserError(f"styles are {list(self.styles)}; known: {', '.join(TRAINED_STYLES)}")
        if len(self.attention) != len(self.channels):
            raise UserError(
                f"attention has {len(self.attention)} entries and channels {len(self.channels)}; give one for each"
            )

    @property
    def results(self) -> tuple[str, ...]:
        return ("base",)


def _check_channels(channels: Sequence[int]) -> None:
    if not channels or any(width < 8 or width % 8 for width in channels):
        raise UserError(f"channels are {list(channels)}; they must be multiples of 8, one for each resolution")
