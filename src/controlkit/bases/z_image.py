"""Z-Image (Z-Image Team 2025, arXiv 2511.22699): a diffusion transformer that reads image and prompt as one sequence.

Turbo is distilled to about 8 steps without guidance; the model that it was made from needs both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import nullcontext
from functools import cached_property
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, ZImageTransformer2DModel
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import Qwen3Model

from controlkit.bases.component import VAE, Component, Configurations
from controlkit.bases.flux import FLUX1_VAE
from controlkit.bases.language_model import MaskedPromptBase, arranged
from controlkit.bases.latent_rgb import FLUX_LATENT_RGB, LatentRGB
from controlkit.bases.residuals import Residuals
from controlkit.bases.schedules import EvenlySpacedFlow, RectifiedFlow
from controlkit.bases.taps import Point, Taps
from controlkit.bases.text import Text
from controlkit.errors import UserError

PATCH = 2
"""Side length in latent positions of a token of the transformer."""
PAD = 32
"""Image and prompt are each padded to a multiple of as many tokens, with learned tokens."""
_NAME = f"{PATCH}-1"
"""Of the transformer's layers for tokens of this size, in one frame."""

Z_IMAGE_TRANSFORMER: dict[str, Any] = {
    "all_patch_size": [PATCH],
    "all_f_patch_size": [1],
    "in_channels": 16,
    "dim": 3840,
    "n_layers": 30,
    "n_refiner_layers": 2,
    "n_heads": 30,
    "n_kv_heads": 30,
    "norm_eps": 1e-5,
    "qk_norm": True,
    "cap_feat_dim": 2560,
    "rope_theta": 256.0,
    "t_scale": 1000.0,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
}
"""Transformer of Z-Image and Z-Image Turbo."""
Z_IMAGE_TEXT_ENCODER: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
}
"""Qwen3-4B."""
Z_IMAGE_SCHEDULER: dict[str, Any] = {"num_train_timesteps": 1000, "shift": 6.0, "use_dynamic_shifting": False}
Z_IMAGE_TURBO_SCHEDULER: dict[str, Any] = {**Z_IMAGE_SCHEDULER, "shift": 3.0}

_ORIGINAL = re.compile(r"(model\.diffusion_model\.)?layers\.0\.adaLN_modulation\.0\.weight")
_LAYER = re.compile(r"(model\.diffusion_model\.)?layers\.(\d+)\.")


def _known(scheduler: dict[str, Any]) -> Configurations:
    return {
        "transformer": Z_IMAGE_TRANSFORMER,
        "vae": FLUX1_VAE,
        "text_encoder": Z_IMAGE_TEXT_ENCODER,
        "scheduler": scheduler,
    }


class ZImage(MaskedPromptBase):
    """A rectified flow in a transformer whose layers read image tokens and prompt tokens in one sequence, after refiner
    layers for each.

    diffusers' network takes a list of images and of prompts of any length, which it pads in Python; here all prompts
    have one length and a mask, so that no step waits for the device (`predict`).
    """

    components: ClassVar[tuple[Component, ...]] = (
        Component(name="tokenizer", library="transformers", class_name="Qwen2Tokenizer"),
        Component(name="text_encoder", library="transformers", class_name="Qwen3Model"),
        VAE,
        Component(name="transformer", library="diffusers", class_name="ZImageTransformer2DModel"),
        Component(name="scheduler", library="diffusers", class_name="FlowMatchEulerDiscreteScheduler"),
    )
    known: ClassVar[Mapping[str, Configurations]] = {
        "z-image": _known(Z_IMAGE_SCHEDULER),
        "z-image-turbo": _known(Z_IMAGE_TURBO_SCHEDULER),
    }
    required_settings: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "transformer": ("in_channels", "dim", "n_layers", "cap_feat_dim"),
        "vae": ("block_out_channels",),
    }
    pipeline: ClassVar[str] = "ZImagePipeline"
    family_title: ClassVar[str] = "Z-Image"
    tokenizer_title: ClassVar[str] = "Qwen3's tokenizer"
    lora_loader: ClassVar[str | None] = "ZImageLoraLoaderMixin"
    lora_names: ClassVar[str] = r"lora_unet_|diffusion_model\."
    schedule_class: ClassVar[type[RectifiedFlow]] = EvenlySpacedFlow
    usual_guidance: ClassVar[float] = 5.0
    usual_latent_rgb: ClassVar[LatentRGB] = FLUX_LATENT_RGB

    text_encoder: Qwen3Model
    vae: AutoencoderKL
    transformer: ZImageTransformer2DModel

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        if _NAME not in self.transformer.all_x_embedder:
            raise UserError(
                f"the network of {self.name} reads tokens of {', '.join(self.transformer.all_x_embedder)} latent"
                f" positions and frames; expected {_NAME}, as of Z-Image",
                "unsupported",
            )

    @property
    def architecture(self) -> str:
        return "z-image"

    @property
    def patch(self) -> int:
        return PATCH

    @property
    def largest_size(self) -> int:
        """Bounded by the rotary embedding."""
        return min(self.transformer.rope_embedder.axes_lens[1:]) * self.size_multiple

    @property
    def default_guidance(self) -> float:
        """1 (off) for Turbo, whose schedule has a shift of 3 or less; 5 for the model that it was made from. diffusers
        counts 1 less: 0 is off."""
        turbo = float(self.scheduler_config.get("shift", 1.0)) <= Z_IMAGE_TURBO_SCHEDULER["shift"]
        return float(self.defaults.get("guidance", 1.0 if turbo else self.usual_guidance))

    @property
    def sites(self) -> Mapping[str, tuple[int, int]]:
        """None: controls act by taps, on image and prompt tokens together."""
        return {}

    @cached_property
    def points(self) -> dict[str, Point]:
        """`refiner.N.in` and `refiner.N` are before and after a refiner layer of the image, on the image tokens
        `[B, n, C]`; `layer.N.in` and `layer.N` before and after a layer, on image and prompt tokens `[B, n + m, C]`
        (`Sequences`); `time` is the time embedding `[B, D]`, which modulates all of them."""
        points = {"time": Point(module="t_embedder")}
        for family, module in (("refiner", "noise_refiner"), ("layer", "layers")):
            for place in range(len(getattr(self.transformer, module))):
                points[f"{family}.{place}.in"] = Point(module=f"{module}.{place}", side="input")
                points[f"{family}.{place}"] = Point(module=f"{module}.{place}")
        return points

    def sites_in_words(self) -> dict[str, str]:
        transformer = self.transformer
        return {
            "where controls act": f"before and after {len(transformer.noise_refiner)} refiner layers and"
            f" {len(transformer.layers)} layers, {transformer.dim} channels a token"
        }

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
        self.check_sites(Residuals() if residuals is None else residuals)
        with self.tapping({}, taps) if taps else nullcontext():
            return -self._network(x_t, t, text)

    def _network(self, x_t: Tensor, t: Tensor, text: Text) -> Tensor:
        """What diffusers' `ZImageTransformer2DModel.forward` computes: z - noise."""
        transformer, sequences = self.transformer, Sequences(self.transformer, x_t, text)
        time = self.embed_time(x_t, t, text)
        image = self._padded(transformer.all_x_embedder[_NAME](patches(x_t)), sequences)
        for layer in transformer.noise_refiner:
            image = self._run(layer, image, None, sequences.image_rotation, time)
        prompt = transformer.cap_embedder(sequences.tokens)
        prompt = torch.where(sequences.own_tokens[..., None], prompt, transformer.cap_pad_token.to(prompt))
        for layer in transformer.context_refiner:
            prompt = self._run(layer, prompt, sequences.prompt_mask, sequences.prompt_rotation)
        both = torch.cat([image, prompt], 1)
        for layer in transformer.layers:
            both = self._run(layer, both, sequences.mask, sequences.rotation, time)
        tokens = transformer.all_final_layer[_NAME](both[:, : sequences.image_tokens], c=time)
        return unpatched(tokens, x_t.shape[2] // PATCH, x_t.shape[3] // PATCH)

    def _padded(self, image: Tensor, sequences: Sequences) -> Tensor:
        """Image tokens with learned tokens after them, up to a multiple of `PAD`."""
        return padded(image, self.transformer.x_pad_token, sequences.padded_image_tokens)

    def _run(self, layer: nn.Module, *inputs: Any) -> Tensor:
        if self.transformer.gradient_checkpointing and torch.is_grad_enabled():
            made: Tensor = self.transformer._gradient_checkpointing_func(layer, *inputs)
            return made
        return layer(*inputs)

    def chat(self, prompt: str) -> str:
        """A prompt in the tokenizer's chat template, as in diffusers' pipeline."""
        chat: str = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        return chat

    def states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The penultimate ones."""
        states: Tensor = self.text_encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[
            -2
        ]
        return states

    @property
    def text_width(self) -> int:
        return int(self.transformer.config.cap_feat_dim)

    def padded_length(self, mask: Tensor) -> Tensor:
        """A multiple of `PAD`, with learned tokens."""
        return padded_length(mask)

    def embed_time(self, x_t: Tensor, t: Tensor, text: Text) -> Tensor:
        clean = 1 - t.expand(len(x_t)).float() / self.schedule.length
        return self.transformer.t_embedder(clean * self.transformer.t_scale).to(x_t.dtype)

    @classmethod
    def recognise(cls, shapes: Mapping[str, tuple[int, ...]], name: str) -> str | None:
        return "z-image" if any(_ORIGINAL.match(key) for key in shapes) else None

    @classmethod
    def settings_of_file(cls, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        numbers = {int(found[2]) for key in shapes if (found := _LAYER.match(key))}
        return {"n_layers": len(numbers)}


class Sequences:
    """Lengths, masks and rotary embeddings of the sequences of one call, as diffusers' `patchify_and_embed` has them.

    The prompt's tokens have the positions (1, 0, 0), (2, 0, 0), ...; those of the image follow at (n, row, column),
    where n is the first position that is free.

    Args:
        transformer: of the base.
        x_t: noisy latents `[B, C, h, w]`.
        text: of batch B; tokens after those of `mask` (`Text.extended`) are read, too.
    """

    def __init__(self, transformer: ZImageTransformer2DModel, x_t: Tensor, text: Text) -> None:
        lengths = padded_length(text["mask"])
        tokens, self.own_tokens, read = arranged(text.tokens, text["mask"], lengths)
        """Which tokens are of the prompt, `bool [B, m]`; learned tokens stand in for the others."""
        self.tokens = tokens
        """Of the prompts, `[B, m, D]`."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        self.prompt_mask = None if "even" in text else read
        """Which tokens of the prompt are read, `bool [B, m]`; None for all."""
        rows, columns = x_t.shape[2] // PATCH, x_t.shape[3] // PATCH
        self.image_tokens = rows * columns
        self.padded_image_tokens = -(-self.image_tokens // PAD) * PAD
        self.mask = None if "even" in text else pad(read, (self.padded_image_tokens, 0), value=True)
        """Which tokens of both are read, `bool [B, n + m]`; None for all."""
        row, column = torch.meshgrid(
            *(torch.arange(side, device=tokens.device) for side in (rows, columns)), indexing="ij"
        )
        on_image = torch.stack([torch.zeros_like(row), row, column], -1).flatten(0, 1)
        of_image = pad(on_image, (0, 0, 0, self.padded_image_tokens - self.image_tokens)).repeat(len(tokens), 1, 1)
        of_image[:, : self.image_tokens, 0] = lengths[:, None] + 1
        of_prompt = torch.stack([places + 1, torch.zeros_like(places), torch.zeros_like(places)], -1)

        def rotation(positions: Tensor) -> Tensor:
            made: Tensor = transformer.rope_embedder(positions.flatten(0, 1))
            return made.unflatten(0, positions.shape[:2])

        self.image_rotation = rotation(of_image)
        """`[B, n, D / 2]`, complex."""
        self.prompt_rotation = rotation(of_prompt[None]).expand(len(tokens), -1, -1)
        self.rotation = torch.cat([self.image_rotation, self.prompt_rotation], 1)


def padded_length(mask: Tensor) -> Tensor:
    """Number of tokens of prompts `bool [B, m]`, padded to multiples of `PAD`, `[B]`."""
    return (mask.sum(1) + PAD - 1) // PAD * PAD


def padded(tokens: Tensor, learned: Tensor, count: int) -> Tensor:
    """Tokens `[B, n, C]` with a learned one `[1, C]` after them, `[B, count, C]`."""
    more = count - tokens.shape[1]
    return torch.cat([tokens, learned.to(tokens).expand(len(tokens), more, -1)], 1) if more else tokens


def patches(latents: Tensor) -> Tensor:
    """Latents `[B, C, h, w]` => tokens of 2 x 2 positions, `[B, h / 2 * w / 2, 4 * C]`, channels last."""
    batch, channels, height, width = latents.shape
    parts = latents.reshape(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return parts.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatched(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of `patches`, for rows and columns of tokens."""
    parts = tokens.reshape(len(tokens), rows, columns, PATCH, PATCH, -1)
    return parts.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
