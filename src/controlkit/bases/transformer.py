"""What bases with a diffusion transformer share; all are rectified flows."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from controlkit.bases.base import Base
from controlkit.bases.component import Configurations
from controlkit.bases.latent_space import Latents
from controlkit.bases.prompt_encoding import TextOptions
from controlkit.bases.schedules import RectifiedFlow
from controlkit.bases.text import Text
from controlkit.errors import UserError


class TransformerBase(Base):
    """A base whose denoiser is a transformer that reads latents in patches."""

    schedule_class: ClassVar[type[RectifiedFlow]] = RectifiedFlow
    learns_words: ClassVar[bool] = False
    usual_sampler: ClassVar[str] = "euler"
    family_title: ClassVar[str]
    """Name of its family, in text."""
    usual_size: ClassVar[int] = 1024
    """Native side length in pixels, if no configuration says."""

    transformer: Any

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        self._own_size = int(self.vae.config.get("sample_size") or self.usual_size)

    @property
    def denoiser(self) -> Any:
        return self.transformer

    @property
    @abstractmethod
    def patch(self) -> int:
        """Latent positions per token, along each side."""

    @property
    def latents(self) -> Latents:
        config = self.vae.config
        return Latents(
            channels=self.denoiser_channels,
            factor=2 ** (len(config.block_out_channels) - 1),
            scale=config.scaling_factor,
            shift=config.shift_factor or 0.0,
            patch=self.patch,
        )

    @property
    def size(self) -> int:
        """That of the transformer, or of its own autoencoder if the transformer's configuration has none."""
        side = self.transformer.config.get("sample_size")
        return self._own_size if side is None else int(side) * self.factor

    @classmethod
    def configurations_of_file(
        cls, known: Configurations, shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]
    ) -> tuple[Configurations, list[str]]:
        """A file has the transformer alone."""
        return {part: known[part] for part in ("transformer", "scheduler")}, []

    def guided(self, text: Text, guidance: float) -> Text:
        if not self.reads_guidance:
            return text
        return Text(**{**text.named, "guidance": torch.full_like(text["guidance"], guidance)})

    def check_plain(self, options: TextOptions, *, clip_skip: bool = False) -> None:
        """Check that prompts are read as they stand.

        Args:
            clip_skip: whether layers of CLIP can be selected.

        Raises:
            UserError: `options` asks for anything else.
        """
        if options.by_chunks or (options.clip_skip is not None and not clip_skip):
            what = (
                "weighted prompts and textual inversions"
                if clip_skip
                else "weighted prompts, textual inversions and clip_skip"
            )
            raise UserError(
                f"{self.name} is of {self.family_title}'s family, for which {what} are not supported; use prompt syntax"
                f" plain and none of them. It reads words as they stand (up to {self.prompt_tokens} tokens)",
                "unsupported",
            )
