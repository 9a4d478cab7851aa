"""A known base with random weights, in full size: for measuring speed and memory without its files."""

from __future__ import annotations

from typing import Any

import torch

from controlkit.bases.base import Base, needs_float32
from controlkit.bases.clip_tokenizer import clip_tokenizer
from controlkit.bases.known import KNOWN_BASES
from controlkit.bases.sdxl import SDXLBase
from controlkit.errors import UserError, nearest


def random_base(name: str, dtype: torch.dtype) -> Base:
    """`sd15`, `sd21` or `sdxl` with random weights; its pictures are noise.

    Raises:
        UserError: the name is none of these.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    if name not in KNOWN_BASES:
        raise UserError(f"only known bases can have random weights, not {name!r}{nearest(name, list(KNOWN_BASES))}")
    known = KNOWN_BASES[name]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        parts: dict[str, Any] = {
            "name": name,
            "tokenizer": clip_tokenizer(),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**known["text_encoder"])),
            "vae": AutoencoderKL(**known["vae"]),
            "unet": UNet2DConditionModel(**known["unet"]),
            "scheduler_config": known["scheduler"],
        }
        if dtype == torch.float16 and needs_float32(parts["vae"], xl="text_encoder_2" in known):
            parts["vae"].to(torch.float32)
        if "text_encoder_2" not in known:
            return Base(**parts)
        second = CLIPTextModelWithProjection(CLIPTextConfig(**known["text_encoder_2"]))
        return SDXLBase(**parts, tokenizer_2=clip_tokenizer(pad_token="!"), text_encoder_2=second)
    finally:
        torch.set_default_dtype(before)
