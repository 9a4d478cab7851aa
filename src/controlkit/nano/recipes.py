"""Recipes of nano's networks: the autoencoder, and the text encoder with the UNet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from controlkit.errors import Code, UserError
from controlkit.nano.icons import LEAST_SCALE, TRAINED_STYLES
from controlkit.training.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class AutoencoderRecipe(Recipe):
    """Train an embedded base's autoencoder on icons from scratch."""

    system: ClassVar[str] = "autoencoder"
    objective: ClassVar[str] = "controlkit.nano.autoencoder_objective:AutoencoderObjective"

    icons: str
    """File of rendered icons (`recipes/nano/build_pictures.py`)."""
    channels: tuple[int, ...] = (16, 32, 64)
    """Channels at each resolution; each entry after the first halves it."""
    latent_channels: int = 4
    """Channels of the latent."""
    kl_weight: float = 2e-5
    """Weight of the mean KL divergence of latent elements from a unit normal."""
    gradient_weight: float = 0.5
    """Weight of the L1 loss of horizontal and vertical differences, which keeps edges sharp."""
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
    """Train an embedded base's text encoder and UNet together on icons, from scratch or from an existing base."""

    system: ClassVar[str] = "base"
    objective: ClassVar[str] = "controlkit.nano.base_objective:BaseObjective"

    icons: str
    """File of rendered icons."""
    autoencoder: str | None = None
    """Folder of the run that trained the autoencoder; this or `start`."""
    start: str | None = None
    """The base to start from, `nano` or a diffusers folder, with its own channels and text settings."""
    styles: tuple[str, ...] | None = None
    """Styles of icons to train on; null for all four. A single one gives a community model of a base."""
    concepts: str | None = None
    """Text file of the concepts to train on, one per line, with spaces or hyphens; null for all drawable ones."""
    least_scale: float = LEAST_SCALE
    """Minimum side of an icon as a fraction of the drawing's."""
    time_sampling: str | None = None
    """Distribution of training times: `uniform`, `cubic` (more noisy ones) or `logit-normal` (more in the middle); null
    is the base's own: uniform for Stable Diffusion and nano."""
    snr_gamma: float | None = None
    """Gamma of min-SNR loss weighting, above 0 (5 in Hang et al. 2023); null weights all times equally."""
    channels: tuple[int, ...] = (48, 96, 160)
    """Channels of the UNet at each resolution."""
    attention: tuple[bool, ...] = (False, True, True)
    """Which resolutions have transformer blocks."""
    text_width: int = 128
    """Width of the text encoder and of cross attention."""
    text_layers: int = 2
    """Layers of the text encoder."""
    prompt_drop: float = 0.1
    """Fraction of prompts replaced by the empty prompt."""
    variants: int = 6
    """Drawings of each icon (background, scale, position), whose latents are cached."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.autoencoder is None) == (self.start is None):
            code: Code = "missing-setting" if self.start is None else "contradiction"
            raise UserError("set either autoencoder, to train from scratch, or start, to train from a base", code)
        if not 0.1 <= self.least_scale <= 1:
            raise UserError(f"least_scale is {self.least_scale}; it must be between 0.1 and 1", "out-of-range")
        _check_channels(self.channels)
        if self.styles is not None and not set(self.styles) <= set(TRAINED_STYLES):
            raise UserError(f"styles are {list(self.styles)}; known: {', '.join(TRAINED_STYLES)}", "unknown-name")
        if len(self.attention) != len(self.channels):
            raise UserError(
                f"attention has {len(self.attention)} entries and channels {len(self.channels)}; they must match",
                "contradiction",
            )

    @property
    def results(self) -> tuple[str, ...]:
        return ("base",)


_MOST_LEVELS = 6
"""Down to 2 x 2: a single position has no variance to normalise by."""


def _check_channels(channels: Sequence[int]) -> None:
    if not channels or any(width < 8 or width % 8 for width in channels):
        raise UserError(
            f"channels are {list(channels)}; they must be multiples of 8, one for each resolution", "out-of-range"
        )
    if len(channels) > _MOST_LEVELS:
        raise UserError(
            f"channels has {len(channels)} entries; expected at most {_MOST_LEVELS}, as images of 64 x 64 are halved"
            " for each but the first",
            "out-of-range",
        )
