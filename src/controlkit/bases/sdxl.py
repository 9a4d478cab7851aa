"""Stable Diffusion XL (Podell et al. 2023, arXiv 2307.01952): two text encoders, and sizes that the UNet is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from controlkit.bases.base import Base, Text, token_ids


class SDXLBase(Base):
    """A base whose prompts are read by two encoders and whose UNet also gets a pooled vector and the picture's size.

    Args:
        zero_empty: whether the empty prompt means zeros and not its embedding, as the model was trained
            (`force_zeros_for_empty_prompt` in diffusers).
    """

    usual_guidance: ClassVar[float] = 5.0

    def __init__(
        self,
        *,
        name: str,
        tokenizer: CLIPTokenizer,
        tokenizer_2: CLIPTokenizer,
        text_encoder: CLIPTextModel,
        text_encoder_2: CLIPTextModelWithProjection,
        vae: AutoencoderKL,
        unet: UNet2DConditionModel,
        scheduler_config: dict[str, Any],
        zero_empty: bool = True,
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer_2 = tokenizer_2
        self.text_encoder_2 = text_encoder_2
        self.zero_empty = zero_empty
        super().__init__(
            name=name,
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=vae,
            unet=unet,
            scheduler_config=scheduler_config,
            defaults=defaults,
        )

    @property
    def text_encoders(self) -> tuple[nn.Module, ...]:
        return (self.text_encoder, self.text_encoder_2)

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        return (self.text_encoder, self.text_encoder_2, self.vae, self.unet)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str], size: tuple[int, int] | None = None) -> Text:
        """Prompts => the encoders' last hidden states but one, side by side, the pooled vector, and the size.

        The picture counts as not scaled and not cropped: original size = target size = `size`, crop at 0, 0.
        """
        states = []
        pooled = None
        for tokenizer, encoder in ((self.tokenizer, self.text_encoder), (self.tokenizer_2, self.text_encoder_2)):
            ids = token_ids(tokenizer, prompts).to(encoder.device)
            made = encoder(ids, output_hidden_states=True)
            states.append(made.hidden_states[-2])
            pooled = made[0]  # the second encoder's projection stays
        assert pooled is not None
        tokens = torch.cat(states, dim=-1)
        if self.zero_empty:
            said = torch.tensor([prompt != "" for prompt in prompts], device=tokens.device)
            tokens, pooled = tokens * said[:, None, None], pooled * said[:, None]
        width, height = size or (self.size, self.size)
        ids_of_size = torch.tensor([[height, width, 0, 0, height, width]], device=tokens.device, dtype=tokens.dtype)
        return Text(tokens, pooled, ids_of_size.expand(len(prompts), -1))
