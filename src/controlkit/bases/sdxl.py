"""Stable Diffusion XL (Podell et al. 2023, arXiv 2307.01952): two text encoders and size conditioning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from controlkit.bases.clip_tokenizer import clip_tokenizer
from controlkit.bases.component import VAE, Component, Configurations, clip_components, model_index
from controlkit.bases.latent_rgb import SDXL_LATENT_RGB, LatentRGB
from controlkit.bases.prompt_encoding import PLAIN, TextOptions, encode_prompts
from controlkit.bases.stable_diffusion import (
    ORIGINAL_UNET,
    SCHEDULER,
    SD15_SCHEDULER,
    SD15_TEXT_ENCODER,
    SD15_UNET,
    SD15_VAE,
    UNET,
    check_autoencoder,
    with_channels,
    with_prediction,
)
from controlkit.bases.text import Text, clip_states
from controlkit.bases.unet import UNetBase
from controlkit.errors import UserError

SDXL_UNET: dict[str, Any] = {
    **SD15_UNET,
    "sample_size": 128,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
"""UNet of Stable Diffusion XL (2,567,463,684 parameters)."""

SDXL_VAE: dict[str, Any] = {**SD15_VAE, "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True}
"""Autoencoder of Stable Diffusion XL; its activations overflow float16."""

SDXL_TEXT_ENCODER_2: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "projection_dim": 1280,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "max_position_embeddings": 77,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
"""Text model of OpenCLIP ViT-bigG/14 (694,659,840 parameters with its projection)."""


class StableDiffusionXL(UNetBase):
    """A base with two text encoders, whose UNet is also conditioned on a pooled vector and the image's size.

    Args:
        zero_empty: whether the empty prompt is encoded as zeros, as in its training (`force_zeros_for_empty_prompt` in
            diffusers).
        arguments: of `Base`.
    """

    components: ClassVar[tuple[Component, ...]] = (*clip_components("", "_2", projected=("_2",)), VAE, UNET, SCHEDULER)
    known: ClassVar[Mapping[str, Configurations]] = {
        "sdxl": {
            "unet": SDXL_UNET,
            "vae": SDXL_VAE,
            "text_encoder": SD15_TEXT_ENCODER,
            "text_encoder_2": SDXL_TEXT_ENCODER_2,
            "scheduler": SD15_SCHEDULER,
        },
    }
    pipeline: ClassVar[str] = "StableDiffusionXLPipeline"
    index_entries: ClassVar[Mapping[str, Any]] = {"force_zeros_for_empty_prompt": True}
    usual_guidance: ClassVar[float] = 5.0
    usual_latent_rgb: ClassVar[LatentRGB] = SDXL_LATENT_RGB
    upcasts_vae: ClassVar[bool] = True

    tokenizer: CLIPTokenizer
    tokenizer_2: CLIPTokenizer
    text_encoder: CLIPTextModel
    text_encoder_2: CLIPTextModelWithProjection
    vae: AutoencoderKL

    def __init__(self, *, zero_empty: bool = True, **arguments: Any) -> None:
        self.zero_empty = zero_empty
        super().__init__(**arguments)

    @classmethod
    def settings_in(cls, folder: Path) -> dict[str, Any]:
        return {"zero_empty": bool(model_index(folder).get("force_zeros_for_empty_prompt", True))}

    @classmethod
    def is_folder_of(cls, folder: Mapping[str, Mapping[str, Any]]) -> bool:
        is_sdxl = "text_encoder_2" in folder or folder.get("unet", {}).get("addition_embed_type") is not None
        return super().is_folder_of(folder) and is_sdxl

    @torch.no_grad()
    def encode_text(
        self, prompts: Sequence[str], size: tuple[int, int] | None = None, options: TextOptions = PLAIN
    ) -> Text:
        """Prompts => penultimate hidden states of both encoders, concatenated; the pooled vector; and the size.

        The size condition is that of an image neither scaled nor cropped: original size = target size = `size`, crop at
        0, 0.
        """

        def encoded(which: str) -> tuple[Tensor, Tensor]:
            tokenizer, encoder = getattr(self, f"tokenizer{which}"), getattr(self, f"text_encoder{which}")
            encode = partial(clip_states, encoder, clip_skip=options.clip_skip)
            return encode_prompts(tokenizer, encoder, f"text_encoder{which}", prompts, options, encode)

        (first, _), (second, pooled) = encoded(""), encoded("_2")
        tokens, pooled = torch.cat([first, second], -1).to(self.device, self.dtype), pooled.to(self.device, self.dtype)
        if self.zero_empty:
            not_empty = torch.tensor([prompt != "" for prompt in prompts], device=tokens.device)
            tokens, pooled = tokens * not_empty[:, None, None], pooled * not_empty[:, None]
        width, height = size or (self.size, self.size)
        time_ids = torch.tensor([[height, width, 0, 0, height, width]], device=tokens.device, dtype=tokens.dtype)
        return Text(tokens, pooled=pooled, time_ids=time_ids.expand(len(prompts), -1))

    @classmethod
    def recognise(cls, shapes: Mapping[str, tuple[int, ...]], name: str) -> str | None:
        if f"{ORIGINAL_UNET}label_emb.0.0.weight" not in shapes:
            return None
        check_autoencoder(shapes, name)
        if not any(key.startswith("conditioner.embedders.1.") for key in shapes):
            raise UserError(
                f"{name} looks like the SDXL refiner (it has no first text encoder); use the SDXL base model",
                "unsupported",
            )
        return "sdxl"

    @classmethod
    def configurations_of_file(
        cls, known: Configurations, shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]
    ) -> tuple[Configurations, list[str]]:
        return with_prediction(with_channels(known, shapes), shapes, metadata), []

    @classmethod
    def tokenizer_for(cls, component: Component, configurations: Configurations) -> CLIPTokenizer:
        return clip_tokenizer(pad_token="!" if component.name == "tokenizer_2" else "<|endoftext|>")

    @property
    def pooled_width(self) -> int:
        return self.text_encoder_2.config.projection_dim

    def pool_text(self, phrases: Sequence[str]) -> Tensor:
        return self.encode_text(phrases)["pooled"]
