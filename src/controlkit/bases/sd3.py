"""Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv 2403.03206): a diffusion transformer with three text
encoders."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import Tensor
from torch.nn.functional import pad
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel

from controlkit.bases.clip_tokenizer import clip_tokenizer
from controlkit.bases.component import VAE, Component, Configurations, clip_components
from controlkit.bases.latent_rgb import SD3_LATENT_RGB, LatentRGB
from controlkit.bases.prompt_encoding import PLAIN, TextOptions
from controlkit.bases.residuals import Residuals
from controlkit.bases.sdxl import SDXL_TEXT_ENCODER_2
from controlkit.bases.stable_diffusion import SD15_TEXT_ENCODER, SD15_VAE, check_autoencoder
from controlkit.bases.taps import Point, Taps
from controlkit.bases.text import CLIP_TOKENS, Text, clip_states, cut_from, token_ids
from controlkit.bases.transformer import TransformerBase
from controlkit.errors import UserError

SD3_MEDIUM_TRANSFORMER: dict[str, Any] = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
"""Transformer of Stable Diffusion 3 medium (2,028,328,000 parameters)."""

SD35_MEDIUM_TRANSFORMER: dict[str, Any] = {
    **SD3_MEDIUM_TRANSFORMER,
    "pos_embed_max_size": 384,
    "dual_attention_layers": list(range(13)),
    "qk_norm": "rms_norm",
}
"""Transformer of Stable Diffusion 3.5 medium."""

SD35_LARGE_TRANSFORMER: dict[str, Any] = {
    **SD3_MEDIUM_TRANSFORMER,
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "qk_norm": "rms_norm",
}
"""Transformer of Stable Diffusion 3.5 large."""

SD3_VAE: dict[str, Any] = {
    **SD15_VAE,
    "sample_size": 1024,
    "latent_channels": 16,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
"""Autoencoder of Stable Diffusion 3."""

SD3_TEXT_ENCODER_3: dict[str, Any] = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
"""Encoder of T5 v1.1 XXL."""

SD3_SCHEDULER: dict[str, Any] = {"num_train_timesteps": 1000, "shift": 3.0}

T5_TOKENS = 256
"""Tokens of a prompt that T5 reads in diffusers' pipeline (`max_sequence_length`)."""

_ORIGINAL = re.compile(r"(model\.diffusion_model\.)?joint_blocks\.")
_TEXT_ENCODERS = {
    "text_encoder": "text_encoders.clip_l.",
    "text_encoder_2": "text_encoders.clip_g.",
    "text_encoder_3": "text_encoders.t5xxl.",
}
"""Component -> prefix of its tensors in a single file."""


def _known(transformer: dict[str, Any]) -> Configurations:
    return {
        "transformer": transformer,
        "vae": SD3_VAE,
        "text_encoder": SD15_TEXT_ENCODER,
        "text_encoder_2": SDXL_TEXT_ENCODER_2,
        "text_encoder_3": SD3_TEXT_ENCODER_3,
        "scheduler": SD3_SCHEDULER,
    }


class StableDiffusion3(TransformerBase):
    """A rectified flow in a transformer with joint attention over image and text.

    T5, by far its largest network, is optional: without it, its tokens are zeros.
    """

    components: ClassVar[tuple[Component, ...]] = (
        *clip_components("", "_2", projected=("", "_2")),
        Component(name="tokenizer_3", library="transformers", class_name="T5TokenizerFast", optional=True),
        Component(name="text_encoder_3", library="transformers", class_name="T5EncoderModel", optional=True),
        VAE,
        Component(name="transformer", library="diffusers", class_name="SD3Transformer2DModel"),
        Component(name="scheduler", library="diffusers", class_name="FlowMatchEulerDiscreteScheduler"),
    )
    known: ClassVar[Mapping[str, Configurations]] = {
        "sd3-medium": _known(SD3_MEDIUM_TRANSFORMER),
        "sd35-medium": _known(SD35_MEDIUM_TRANSFORMER),
        "sd35-large": _known(SD35_LARGE_TRANSFORMER),
    }
    required_settings: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "transformer": ("in_channels", "patch_size", "num_layers", "joint_attention_dim"),
        "vae": ("block_out_channels",),
    }
    pipeline: ClassVar[str] = "StableDiffusion3Pipeline"
    family_title: ClassVar[str] = "Stable Diffusion 3"
    usual_guidance: ClassVar[float] = 7.0
    usual_latent_rgb: ClassVar[LatentRGB] = SD3_LATENT_RGB

    tokenizer: CLIPTokenizer
    tokenizer_2: CLIPTokenizer
    tokenizer_3: Any
    text_encoder: CLIPTextModelWithProjection
    text_encoder_2: CLIPTextModelWithProjection
    text_encoder_3: T5EncoderModel | None
    vae: AutoencoderKL
    transformer: SD3Transformer2DModel

    @property
    def architecture(self) -> str:
        kind = "3.5" if self.transformer.config.qk_norm else "3"
        return f"stable-diffusion-v{kind}"

    @property
    def patch(self) -> int:
        return int(self.transformer.config.patch_size)

    @property
    def largest_size(self) -> int:
        """Bounded by the size of the position embedding."""
        return self.transformer.config.pos_embed_max_size * self.size_multiple

    @cached_property
    def sites(self) -> dict[str, tuple[int, int]]:
        """`block.N` follows the Nth joint block; diffusers takes no residual after the last.

        Residuals are added to the image tokens, `[B, h * w, C]`, in row-major order.
        """
        width = self.transformer.inner_dim
        return {f"block.{place}": (width, self.size_multiple) for place in range(self._blocks - 1)}

    @cached_property
    def points(self) -> dict[str, Point]:
        """`block.N.in` and `block.N` are before and after the Nth joint block, on the image tokens `[B, h * w, C]`;
        `time` is the embedding of time and pooled prompts, `[B, C]`, which modulates all blocks."""
        points = {"time": Point(module="time_text_embed")}
        for place in range(self._blocks):
            module = f"transformer_blocks.{place}"
            points[f"block.{place}.in"] = Point(module=module, side="input")
            points[f"block.{place}"] = Point(module=module, place=1)
        return points

    @property
    def _blocks(self) -> int:
        return len(self.transformer.transformer_blocks)

    def sites_in_words(self) -> dict[str, str]:
        count = len(self.sites)
        width = self.transformer.inner_dim
        return {"where residuals enter": f"after {count} of {self._blocks} blocks, {width} channels a token"}

    def predict(
        self,
        x_t: Tensor,
        t: Tensor,
        text: Text,
        residuals: Residuals | None = None,
        taps: Taps | None = None,
        *,
        masked: Tensor | None = None,
    ) -> Tensor:
        added = Residuals() if residuals is None else residuals
        self.check_sites(added)
        with self.tapping(added, taps or {}) if added or taps else nullcontext():
            return self.transformer(
                hidden_states=x_t,
                timestep=t.expand(len(x_t)),
                encoder_hidden_states=text.tokens,
                pooled_projections=text["pooled"],
                return_dict=False,
            )[0]

    @torch.no_grad()
    def encode_text(
        self, prompts: Sequence[str], size: tuple[int, int] | None = None, options: TextOptions = PLAIN
    ) -> Text:
        """Prompts => CLIP's states, concatenated and padded to T5's width, followed by T5's; and the pooled vectors.

        Weighted prompts and textual inversions are not supported: T5 was trained with neither, and chunks of CLIP
        would change the attention between image and text.

        Raises:
            UserError: `options` asks for them.
        """
        self.check_plain(options, clip_skip=True)
        skip = options.clip_skip
        first, pooled = clip_states(self.text_encoder, token_ids(self.tokenizer, prompts), skip)
        second, pooled_2 = clip_states(self.text_encoder_2, token_ids(self.tokenizer_2, prompts), skip)
        width = self.transformer.config.joint_attention_dim
        both = torch.cat([first, second], -1)
        clip = pad(both, (0, width - both.shape[-1])).to(self.device, self.dtype)
        tokens = torch.cat([clip, self._t5_states(prompts).to(self.device, self.dtype)], 1)
        return Text(tokens, pooled=torch.cat([pooled, pooled_2], -1).to(self.device, self.dtype))

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        clip, clip_2, *t5 = self.tokenizers
        ids = (token_ids(clip, prompts), token_ids(clip_2, prompts))
        return (*ids, *(token_ids(tokenizer, prompts, T5_TOKENS) for tokenizer in t5))

    def embed_time(self, x_t: Tensor, t: Tensor, text: Text) -> Tensor:
        return self.transformer.time_text_embed(t.expand(len(x_t)), text["pooled"])

    def zero_text(self) -> Text:
        config = self.transformer.config
        tokens = torch.zeros(1, CLIP_TOKENS + T5_TOKENS, config.joint_attention_dim)
        return Text(tokens, pooled=torch.zeros(1, config.pooled_projection_dim))

    def _t5_states(self, prompts: Sequence[str]) -> Tensor:
        """`[B, T5_TOKENS, D]`."""
        if self.text_encoder_3 is None:
            return torch.zeros(len(prompts), T5_TOKENS, self.transformer.config.joint_attention_dim)
        ids = token_ids(self.tokenizer_3, prompts, T5_TOKENS)
        return self.text_encoder_3(ids.to(self.text_encoder_3.device))[0]

    @property
    def prompt_tokens(self) -> int:
        return super().prompt_tokens if self.text_encoder_3 is None else T5_TOKENS

    def cut_from(self, prompt: str) -> str:
        """The part that no encoder reads."""
        if self.text_encoder_3 is None:
            return super().cut_from(prompt)
        return cut_from(self.tokenizer_3, prompt, T5_TOKENS)

    @classmethod
    def recognise(cls, shapes: Mapping[str, tuple[int, ...]], name: str) -> str | None:
        blocks = [key for key in shapes if _ORIGINAL.match(key)]
        if not blocks:
            return None
        check_autoencoder(shapes, name)
        if any(".x_block.attn2." in key for key in blocks):
            return "sd35-medium"
        return "sd35-large" if any(".ln_q." in key for key in blocks) else "sd3-medium"

    @classmethod
    def configurations_of_file(
        cls, known: Configurations, shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]
    ) -> tuple[Configurations, list[str]]:
        """Number of blocks and position embeddings from the file; text encoders only if the file has them."""
        keys = [key.partition("joint_blocks.")[2].split(".") for key in shapes if _ORIGINAL.match(key)]
        blocks = {int(key[0]) for key in keys}
        dual = sorted({int(key[0]) for key in keys if key[1:3] == ["x_block", "attn2"]})
        positions = next((shape[1] for key, shape in shapes.items() if key.endswith("pos_embed")), 0)
        sizes = {"num_layers": len(blocks), "dual_attention_layers": dual, "pos_embed_max_size": math.isqrt(positions)}
        present = {
            name: config
            for name, config in known.items()
            if name not in _TEXT_ENCODERS or any(key.startswith(_TEXT_ENCODERS[name]) for key in shapes)
        }
        return {**present, "transformer": {**known["transformer"], **sizes}}, []

    @classmethod
    def tokenizer_for(cls, component: Component, configurations: Configurations) -> CLIPTokenizer:
        """CLIP's; controlkit does not ship T5's.

        Raises:
            UserError: it is T5's.
        """
        if component.name == "tokenizer_3":
            raise UserError(
                "controlkit does not ship T5's tokenizer; pass the base as a diffusers folder", "missing-file"
            )
        return clip_tokenizer(pad_token="!" if component.name == "tokenizer_2" else "<|endoftext|>")
