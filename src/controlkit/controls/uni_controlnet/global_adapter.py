"""The global adapter: an image as a prompt, in a few tokens after those of the text."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

from controlkit.bases.base import Base
from controlkit.bases.image_encoders import CLIP_LARGE, embed_images, embedding_width, encoder_key
from controlkit.controls.control import Acts, Control, OneImage, Reads, Training
from controlkit.controls.encoder_copy.network import checked_config
from controlkit.controls.hints import ConditionDrop, Hint, map_hint
from controlkit.controls.registry import control
from controlkit.controls.uni_controlnet.formats import GLOBAL_FORMATS, GLOBAL_MODULES

_DROPOUT = (0.1, 0.3)
"""Dropout of the two feed-forward networks, in training."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a global adapter."""

    image_encoder: str | None = None
    """Encoder of the image: `efficientnet-lite0`, or a CLIP vision model with a projection (a transformers folder, or a
    name on the hub). Default: the base's, CLIP ViT-L/14 for Stable Diffusion."""
    token_count: int = 4
    """Number of tokens per image."""


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(Options):
    """Recipe settings of a global adapter."""

    start: str | None = None
    """Initial weights: a global adapter's file. Default: random."""
    keep_all: float = 0.1
    """Fraction of samples that always keep their image, in [0, 1]."""
    drop_all: float = 0.1
    """Fraction of samples that are always trained without their image, in [0, 1]."""
    drop_each: float = 0.5
    """Fraction of the other samples that are trained without it, in [0, 1]."""
    prompt_drop: float = 0.5
    """Fraction of prompts replaced by the empty prompt."""

    @property
    def condition_drop(self) -> ConditionDrop:
        """The fractions of samples without an image."""
        return ConditionDrop(keep_all=self.keep_all, drop_all=self.drop_all, each=self.drop_each)


@control
class GlobalAdapter(OneImage):
    """Two feed-forward networks from an image's embedding to tokens after those of the prompt.

    The width between the networks is twice that of a token, their inner widths four and eight times.

    An embedding of zeros stands for no image. It replaces the embedding of the samples that training selects by
    `drop_all` and `drop_each`, and is used on the unconditional branch of guidance.

    Args:
        embedding_width: width of the image encoder's embeddings.
        token_width: width of the base's text.
        token_count: number of tokens per image.
        image_encoder: see `Options`.
    """

    kind: ClassVar[str] = "uni-controlnet-global"
    title: ClassVar[str] = "a global adapter of Uni-ControlNet"
    paper: ClassVar[str] = "Zhao et al. 2023, arXiv 2305.16322"
    reads: ClassVar[Reads] = Reads.NOTHING
    acts: ClassVar[Acts] = Acts.TOKENS
    enters: ClassVar[str] = "tokens after the prompt's"
    starts_at_zero: ClassVar[bool] = False
    hint_is_frozen: ClassVar[bool] = True
    not_elsewhere: ClassVar[str] = "only the paper's code has such a network"
    Options = Options
    formats = GLOBAL_FORMATS
    trainings = (
        Training(
            system="uni-controlnet-global",
            options=TrainingOptions,
            doc="The global adapter of a Uni-ControlNet: an image as a prompt.",
        ),
    )

    def __init__(
        self,
        *,
        embedding_width: int,
        token_width: int,
        token_count: int,
        image_encoder: str,
        condition: str | None = None,
    ) -> None:
        super().__init__()
        hidden, inner = 2 * token_width, (4 * token_width, 8 * token_width)
        self.norm1, self.norm2 = nn.LayerNorm(embedding_width), nn.LayerNorm(hidden)
        first, second = _DROPOUT
        self.ff1 = FeedForward(embedding_width, hidden, dropout=first, activation_fn="geglu", inner_dim=inner[0])
        self.ff2 = FeedForward(
            hidden, token_count * token_width, dropout=second, activation_fn="geglu", inner_dim=inner[1]
        )
        self.image_encoder = image_encoder
        self.widths = {
            "embedding_width": embedding_width,
            "token_width": token_width,
            "token_count": token_count,
        }
        self.condition = condition or "identity"

    @classmethod
    def for_base(
        cls,
        base: Base,
        condition: str | None = None,
        *,
        image_encoder: str | None = None,
        token_count: int = 4,
        **options: Any,
    ) -> GlobalAdapter:
        """A new one, with random weights. The options are those of `Options`.

        Raises:
            UserError: there is no such image encoder.
        """
        encoder = image_encoder or base.default_image_encoder
        new = cls(
            embedding_width=embedding_width(encoder),
            token_width=base.zero_text().tokens.shape[-1],
            token_count=token_count,
            image_encoder=encoder,
            condition=condition,
        )
        return new.to(base.device, base.dtype)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], condition: str | None = None) -> GlobalAdapter:
        return cls(**checked_config(config), condition=condition)

    def frozen_encoder(self) -> str:
        return encoder_key(self.image_encoder)

    def hint_settings(self) -> Hashable:
        encoder = self.frozen_encoder()
        return (super().hint_settings(), encoder) if encoder else super().hint_settings()

    def config(self) -> dict[str, Any]:
        return {**self.widths, "image_encoder": self.image_encoder}

    @classmethod
    def config_of(cls, tensors: Mapping[str, Tensor], unet_config: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """As `Control.config_of`, for CLIP ViT-L/14."""
        width = tensors["norm2.weight"].shape[0] // 2
        return {
            "embedding_width": tensors["norm1.weight"].shape[0],
            "token_width": width,
            "token_count": tensors["ff2.net.2.weight"].shape[0] // width,
            "image_encoder": CLIP_LARGE,
        }

    @classmethod
    def is_native(cls, tensors: Mapping[str, Tensor]) -> bool:
        return {name.partition(".")[0] for name in tensors} == GLOBAL_MODULES

    # Computation

    def encode(self, condition_image: Tensor, base: Base) -> Tensor:
        """Images `[B, 3, H, W]` in [0, 1] => embeddings `[B, D]`.

        Raises:
            UserError: the image encoder cannot be loaded.
        """
        weight = self.norm1.weight
        return embed_images(self.image_encoder, condition_image.to(weight.device)).to(weight.dtype)

    def tokens(self, hint: Hint) -> Tensor:
        """Embeddings `[B, D]` => tokens `[B, token_count, token_width]`."""
        assert isinstance(hint, Tensor)
        stream = self.ff1(self.norm1(hint.to(self.norm1.weight)))
        return self.ff2(self.norm2(stream)).unflatten(1, (self.widths["token_count"], -1))

    def unconditional(self, hint: Hint) -> Hint:
        return map_hint(hint, torch.zeros_like)

    @property
    def conditional_only(self) -> bool:
        return True

    def incompatibility(self, base: Base) -> str | None:
        own, of_base = self.widths["token_width"], base.zero_text().tokens.shape[-1]
        return None if own == of_base else f"its tokens' width: {own}, that of the base's text: {of_base}"

    # Training

    @classmethod
    def for_training(
        cls,
        base: Base,
        conditions: Sequence[str],
        options: Mapping[str, Any],
        *,
        name: str,
        seed: int,
        start: Control | None = None,
        companion: Control | None = None,
    ) -> Control:
        settings = TrainingOptions(**options)
        own = {"image_encoder": settings.image_encoder, "token_count": settings.token_count}
        new = super().for_training(base, conditions, own, name=name, seed=seed, start=start)
        new.condition_drop = settings.condition_drop
        return new

    def trainable_parameters(self) -> list[nn.Parameter]:
        return list(self.parameters())

    # Description

    @classmethod
    def needs(cls, config: Mapping[str, Any]) -> str:
        return (
            f"a base whose text has the width {config['token_width']}, and the image encoder {config['image_encoder']}"
        )

    @classmethod
    def facts(cls, config: Mapping[str, Any]) -> dict[str, str]:
        return {"image encoder": config["image_encoder"], "tokens": str(config["token_count"])}
