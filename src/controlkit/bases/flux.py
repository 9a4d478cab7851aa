"""FLUX.1 (Black Forest Labs 2024): a diffusion transformer with CLIP's pooled prompt and T5's tokens.

Read are `dev`, whose guidance scale is an input of the network (guidance distillation), and `schnell`, which has none.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel

from controlkit.bases.clip_tokenizer import clip_tokenizer
from controlkit.bases.component import VAE, Component, Configurations, clip_components
from controlkit.bases.latent_rgb import FLUX_LATENT_RGB, LatentRGB
from controlkit.bases.prompt_encoding import PLAIN, TextOptions
from controlkit.bases.residuals import Residuals
from controlkit.bases.schedules import EvenlySpacedFlow, RectifiedFlow
from controlkit.bases.sd3 import SD3_TEXT_ENCODER_3, SD3_VAE
from controlkit.bases.stable_diffusion import SD15_TEXT_ENCODER
from controlkit.bases.taps import Point, Taps
from controlkit.bases.text import Text, cut_from, normed_clip_states, token_ids
from controlkit.bases.transformer import TransformerBase
from controlkit.errors import UserError

PACK = 2
"""Side length in latent positions of a token of the transformer."""
USUAL_GUIDANCE = 3.5
"""Default guidance scale of diffusers' text-to-image pipeline and training script of FLUX.1 dev."""
T5_TOKENS = 512
"""Tokens of a prompt that T5 reads in diffusers' pipeline (`max_sequence_length`)."""

FLUX1_SCHNELL_TRANSFORMER: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": False,
    "axes_dims_rope": [16, 56, 56],
}
"""Transformer of FLUX.1 schnell."""
FLUX1_DEV_TRANSFORMER: dict[str, Any] = {**FLUX1_SCHNELL_TRANSFORMER, "guidance_embeds": True}
"""Transformer of FLUX.1 dev."""
FLUX1_VAE: dict[str, Any] = {**SD3_VAE, "scaling_factor": 0.3611, "shift_factor": 0.1159, "force_upcast": True}
"""Autoencoder of FLUX.1."""
FLUX1_DEV_SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
FLUX1_SCHNELL_SCHEDULER: dict[str, Any] = {**FLUX1_DEV_SCHEDULER, "shift": 1.0, "use_dynamic_shifting": False}

_BLOCK = re.compile(r"(model\.diffusion_model\.)?(double|single)_blocks\.(\d+)\.")
_ORIGINAL = re.compile(r"(model\.diffusion_model\.)?double_blocks\.0\.img_attn\.")


def _known(transformer: dict[str, Any], scheduler: dict[str, Any]) -> Configurations:
    return {
        "transformer": transformer,
        "vae": FLUX1_VAE,
        "text_encoder": SD15_TEXT_ENCODER,
        "text_encoder_2": SD3_TEXT_ENCODER_3,
        "scheduler": scheduler,
    }


class Flux(TransformerBase):
    """A rectified flow in a transformer of double blocks (image and text apart) and single blocks (together).

    The network reads latents in tokens of 2 x 2 positions.
    """

    components: ClassVar[tuple[Component, ...]] = (
        *clip_components(""),
        Component(name="tokenizer_2", library="transformers", class_name="T5TokenizerFast"),
        Component(name="text_encoder_2", library="transformers", class_name="T5EncoderModel"),
        VAE,
        Component(name="transformer", library="diffusers", class_name="FluxTransformer2DModel"),
        Component(name="scheduler", library="diffusers", class_name="FlowMatchEulerDiscreteScheduler"),
    )
    known: ClassVar[Mapping[str, Configurations]] = {
        "flux1-dev": _known(FLUX1_DEV_TRANSFORMER, FLUX1_DEV_SCHEDULER),
        "flux1-schnell": _known(FLUX1_SCHNELL_TRANSFORMER, FLUX1_SCHNELL_SCHEDULER),
    }
    required_settings: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "transformer": ("in_channels", "patch_size", "num_layers", "joint_attention_dim"),
        "vae": ("block_out_channels",),
    }
    pipeline: ClassVar[str] = "FluxPipeline"
    family_title: ClassVar[str] = "FLUX.1"
    lora_loader: ClassVar[str | None] = "FluxLoraLoaderMixin"
    lora_names: ClassVar[str] = r"lora_(unet|te\d?|transformer)_|diffusion_model\.|.*\.processor\."
    schedule_class: ClassVar[type[RectifiedFlow]] = EvenlySpacedFlow
    usual_guidance: ClassVar[float] = USUAL_GUIDANCE
    usual_latent_rgb: ClassVar[LatentRGB] = FLUX_LATENT_RGB

    tokenizer: CLIPTokenizer
    tokenizer_2: Any
    text_encoder: CLIPTextModel
    text_encoder_2: T5EncoderModel
    vae: AutoencoderKL
    transformer: FluxTransformer2DModel

    @property
    def architecture(self) -> str:
        return "flux-1-dev" if self.reads_guidance else "flux-1-schnell"

    @property
    def patch(self) -> int:
        return PACK

    @property
    def denoiser_channels(self) -> int:
        return int(self.transformer.config.in_channels) // PACK**2

    @property
    def reads_guidance(self) -> bool:
        return bool(self.transformer.config.guidance_embeds)

    @property
    def default_guidance(self) -> float:
        """3.5; 1 (off) for a model that does not read it, as schnell."""
        return super().default_guidance if self.reads_guidance else float(self.defaults.get("guidance", 1.0))

    @cached_property
    def sites(self) -> dict[str, tuple[int, int]]:
        """`block.N` follows the Nth double block, `single.N` the Nth single block.

        Residuals are added to the image tokens, `[B, h * w, C]`, in row-major order.
        """
        return dict.fromkeys(
            (f"{family}.{place}" for family, _, count in self._blocks for place in range(count)),
            (self.transformer.inner_dim, self.size_multiple),
        )

    @cached_property
    def points(self) -> dict[str, Point]:
        """`FAMILY.N.in` and `FAMILY.N` are before and after a block of `sites`, on the image tokens `[B, h * w, C]`;
        `time` is the embedding of time, guidance and pooled prompts, `[B, C]`, which modulates all blocks."""
        points = {"time": Point(module="time_text_embed")}
        for family, module, count in self._blocks:
            for place in range(count):
                points[f"{family}.{place}.in"] = Point(module=f"{module}.{place}", side="input")
                points[f"{family}.{place}"] = Point(module=f"{module}.{place}", place=1)
        return points

    @property
    def _blocks(self) -> tuple[tuple[str, str, int], ...]:
        """Family of sites, path of the blocks, and their number."""
        transformer = self.transformer
        return (
            ("block", "transformer_blocks", len(transformer.transformer_blocks)),
            ("single", "single_transformer_blocks", len(transformer.single_transformer_blocks)),
        )

    def sites_in_words(self) -> dict[str, str]:
        (_, _, double), (_, _, single) = self._blocks
        width = self.transformer.inner_dim
        return {"where residuals enter": f"after {double} double and {single} single blocks, {width} channels a token"}

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
            tokens = self.transformer(
                hidden_states=pack(x_t),
                timestep=t.expand(len(x_t)) / self.schedule.length,
                guidance=text["guidance"] if self.reads_guidance else None,
                pooled_projections=text["pooled"],
                encoder_hidden_states=text.tokens,
                txt_ids=text_positions(text),
                img_ids=positions(x_t),
                return_dict=False,
            )[0]
        return unpack(tokens, x_t.shape[2] // PACK, x_t.shape[3] // PACK)

    @torch.no_grad()
    def encode_text(
        self, prompts: Sequence[str], size: tuple[int, int] | None = None, options: TextOptions = PLAIN
    ) -> Text:
        """Prompts => T5's states; CLIP's pooled vectors; and the usual guidance scale, which `guided` replaces. On a
        base that does not read it, controls of `dev` are told the usual one.

        Weighted prompts, textual inversions and other layers of CLIP are not supported: only CLIP's pooled vector is
        used, and T5 was trained with none of them.

        Raises:
            UserError: `options` asks for them.
        """
        self.check_plain(options)
        _, pooled = normed_clip_states(self.text_encoder, token_ids(self.tokenizer, prompts))
        ids = token_ids(self.tokenizer_2, prompts, T5_TOKENS)
        tokens = self.text_encoder_2(ids.to(self.text_encoder_2.device))[0]
        return Text(
            tokens.to(self.device, self.dtype),
            pooled=pooled.to(self.device, self.dtype),
            guidance=torch.full((len(prompts),), USUAL_GUIDANCE, device=self.device, dtype=self.dtype),
        )

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        return token_ids(self.tokenizer, prompts), token_ids(self.tokenizer_2, prompts, T5_TOKENS)

    def embed_time(self, x_t: Tensor, t: Tensor, text: Text) -> Tensor:
        time = t.expand(len(x_t)).to(x_t.dtype) * (1000 / self.schedule.length)
        told = (text["guidance"] * 1000,) if self.reads_guidance else ()
        return self.transformer.time_text_embed(time, *told, text["pooled"])

    def zero_text(self) -> Text:
        config = self.transformer.config
        tokens = torch.zeros(1, T5_TOKENS, config.joint_attention_dim)
        return Text(tokens, pooled=torch.zeros(1, config.pooled_projection_dim), guidance=torch.zeros(1))

    @property
    def prompt_tokens(self) -> int:
        return T5_TOKENS

    def cut_from(self, prompt: str) -> str:
        return cut_from(self.tokenizer_2, prompt, T5_TOKENS)

    @classmethod
    def recognise(cls, shapes: Mapping[str, tuple[int, ...]], name: str) -> str | None:
        if not any(_ORIGINAL.match(key) for key in shapes):
            return None
        return "flux1-dev" if cls.settings_of_file(shapes)["guidance_embeds"] else "flux1-schnell"

    @classmethod
    def settings_of_file(cls, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        return {"guidance_embeds": any("guidance_in." in key for key in shapes), **blocks_in(shapes)}

    @classmethod
    def tokenizer_for(cls, component: Component, configurations: Configurations) -> CLIPTokenizer:
        """CLIP's; controlkit does not ship T5's.

        Raises:
            UserError: it is T5's.
        """
        if component.name == "tokenizer_2":
            raise UserError(
                "controlkit does not ship T5's tokenizer; pass the base as a diffusers folder", "missing-file"
            )
        return clip_tokenizer()


def blocks_in(shapes: Iterable[str]) -> dict[str, int]:
    """Numbers of double and single blocks in a file with Black Forest Labs' names, by diffusers' settings."""
    found = [match.groups()[1:] for name in shapes if (match := _BLOCK.match(name))]
    double, single = (len({number for each, number in found if each == family}) for family in ("double", "single"))
    return {"num_layers": double, "num_single_layers": single}


def pack(latents: Tensor) -> Tensor:
    """Latents `[B, C, h, w]` => tokens of 2 x 2 positions, `[B, h / 2 * w / 2, 4 * C]`, row by row."""
    batch, channels, height, width = latents.shape
    parts = latents.reshape(batch, channels, height // PACK, PACK, width // PACK, PACK)
    return parts.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of `pack`, for rows and columns of tokens."""
    parts = tokens.reshape(len(tokens), rows, columns, -1, PACK, PACK)
    return parts.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def positions(latents: Tensor) -> Tensor:
    """Positions of the tokens of `pack`, `[h / 2 * w / 2, 3]`: 0, row, column."""
    # In float32, as bfloat16 would round those above 256.
    rows, columns = (
        torch.arange(side // PACK, device=latents.device, dtype=torch.float32) for side in latents.shape[2:]
    )
    row, column = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], -1).flatten(0, 1)


def text_positions(text: Text) -> Tensor:
    """Positions of a text's tokens, `[L, 3]`: all 0."""
    return text.tokens.new_zeros(text.tokens.shape[1], 3, dtype=torch.float32)
