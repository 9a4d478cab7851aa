"""FLUX.2 (Black Forest Labs 2025): a diffusion transformer whose prompts are states from three layers of a language
model.

Read are `dev`, whose text encoder is Mistral Small 3 and whose guidance scale is an input of the network (guidance
distillation), and `klein` with 4 or 9 billion parameters, whose text encoder is Qwen3 and which has none.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle
from transformers import Mistral3ForConditionalGeneration, Qwen3ForCausalLM

from controlkit.bases.component import Component, Configurations, model_index
from controlkit.bases.flux import blocks_in
from controlkit.bases.language_model import LanguageModelBase
from controlkit.bases.latent_rgb import FLUX2_LATENT_RGB, LatentRGB
from controlkit.bases.latent_space import Latents
from controlkit.bases.prompt_encoding import PLAIN, TextOptions
from controlkit.bases.residuals import Residuals
from controlkit.bases.schedules import Flux2Flow, RectifiedFlow
from controlkit.bases.taps import Point, Taps
from controlkit.bases.text import Text
from controlkit.bases.z_image import Z_IMAGE_TEXT_ENCODER
from controlkit.errors import UserError

USUAL_GUIDANCE = 4.0
"""Default guidance scale of diffusers' pipelines of FLUX.2."""
DEV_LAYERS = (10, 20, 30)
"""Layers of Mistral Small 3 whose states are the prompt (diffusers, pipelines/flux2/pipeline_flux2.py)."""
KLEIN_LAYERS = (9, 18, 27)
"""Those of Qwen3 (diffusers, pipelines/flux2/pipeline_flux2_klein.py)."""
TEMPLATE = (
    "{}[SYSTEM_PROMPT]You are an AI that reasons about image descriptions. You give structured responses focusing on"
    " object relationships, object\nattribution and actions without speculation.[/SYSTEM_PROMPT][INST]{}[/INST]"
)
"""The chat that dev's text encoder reads after its first token (black-forest-labs/flux2, src/flux2/system_messages.py,
in the template of Mistral Small 3)."""

FLUX2_DEV_TRANSFORMER: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 128,
    "num_layers": 8,
    "num_single_layers": 48,
    "attention_head_dim": 128,
    "num_attention_heads": 48,
    "joint_attention_dim": 15360,
    "timestep_guidance_channels": 256,
    "mlp_ratio": 3.0,
    "axes_dims_rope": [32, 32, 32, 32],
    "rope_theta": 2000,
    "eps": 1e-6,
    "guidance_embeds": True,
}
FLUX2_KLEIN_4B_TRANSFORMER: dict[str, Any] = {
    **FLUX2_DEV_TRANSFORMER,
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
}
FLUX2_KLEIN_9B_TRANSFORMER: dict[str, Any] = {
    **FLUX2_DEV_TRANSFORMER,
    "num_layers": 8,
    "num_single_layers": 24,
    "num_attention_heads": 32,
    "joint_attention_dim": 12288,
    "guidance_embeds": False,
}
FLUX2_VAE: dict[str, Any] = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 32,
    "sample_size": 1024,
    "patch_size": [2, 2],
    "batch_norm_eps": 1e-4,
}
FLUX2_DEV_TEXT_ENCODER: dict[str, Any] = {
    "text_config": {
        "model_type": "mistral",
        "vocab_size": 131072,
        "hidden_size": 5120,
        "intermediate_size": 32768,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e9},
        "sliding_window": None,
    },
    "vision_config": {
        "model_type": "pixtral",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "head_dim": 64,
        "image_size": 1540,
        "patch_size": 14,
    },
    "spatial_merge_size": 2,
    "tie_word_embeddings": False,
}
"""Mistral Small 3, which also sees images."""
FLUX2_KLEIN_9B_TEXT_ENCODER: dict[str, Any] = {
    **Z_IMAGE_TEXT_ENCODER,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "tie_word_embeddings": False,
}
"""Qwen3-8B."""
FLUX2_SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "time_shift_type": "exponential",
}

_MARKS = ("double_stream_modulation_img.lin.weight", "img_in.weight", "txt_in.weight")
"""Names of tensors of a file in the original format."""
_PREFIX = "model.diffusion_model."
_AT_ONCE = 4
"""Prompts per call of the text encoder."""
_TEXT_ENCODER, _TOKENIZER = "text_encoder", "tokenizer"
_OTHERS = (
    Component(name="vae", library="diffusers", class_name="AutoencoderKLFlux2"),
    Component(name="transformer", library="diffusers", class_name="Flux2Transformer2DModel"),
    Component(name="scheduler", library="diffusers", class_name="FlowMatchEulerDiscreteScheduler"),
)


def _known(transformer: dict[str, Any], text_encoder: dict[str, Any]) -> Configurations:
    return {
        "transformer": transformer,
        "vae": FLUX2_VAE,
        "text_encoder": text_encoder,
        "scheduler": FLUX2_SCHEDULER,
    }


class Flux2Base(LanguageModelBase):
    """A rectified flow in a transformer of double and single blocks, which reads latents one position a token.

    Latents are those of the autoencoder in groups of 2 x 2 positions, normalised by the statistics of its batch norm.
    The network reads all `PROMPT_TOKENS` states of a prompt, those of its padding, too.
    """

    required_settings: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "transformer": ("in_channels", "num_layers", "joint_attention_dim"),
        "vae": ("block_out_channels", "latent_channels"),
    }
    family_title: ClassVar[str] = "FLUX.2"
    lora_loader: ClassVar[str | None] = "Flux2LoraLoaderMixin"
    lora_names: ClassVar[str] = (
        r"lora_unet_|diffusion_model\.|(double|single)_(blocks|stream_modulation)"
        r"|(img|txt|time|guidance)_in\.|final_layer\."
    )
    schedule_class: ClassVar[type[RectifiedFlow]] = Flux2Flow
    usual_guidance: ClassVar[float] = USUAL_GUIDANCE
    usual_latent_rgb: ClassVar[LatentRGB] = FLUX2_LATENT_RGB
    text_layers: ClassVar[tuple[int, ...]]
    """Layers of the language model whose states are read, side by side."""

    vae: AutoencoderKLFlux2
    transformer: Flux2Transformer2DModel

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        of_vae, of_transformer = self.vae_channels, int(self.transformer.config.in_channels)
        if of_vae != of_transformer or self.transformer.config.patch_size != 1:
            raise UserError(
                f"the network of {self.name} reads {of_transformer} channels in patches of"
                f" {self.transformer.config.patch_size}, and its autoencoder makes {of_vae}; expected equal numbers and"
                " patches of 1, as of FLUX.2",
                "unsupported",
            )
        width = int(self.text_encoder.config.get_text_config().hidden_size)
        if width * len(self.text_layers) != self.text_width:
            raise UserError(
                f"the network of {self.name} reads prompts of {self.text_width} channels, and {len(self.text_layers)}"
                f" layers of its text encoder make {width * len(self.text_layers)}: they are of different models",
                "unsupported",
            )
        self._leave_out_unread_layers()

    def _leave_out_unread_layers(self) -> None:
        """The states of a layer are those before it, so the last of `text_layers` is the last layer that runs."""
        model, needed = self.language_model(), max(self.text_layers) + 1
        if len(model.layers) < needed:
            raise UserError(
                f"the text encoder of {self.name} has {len(model.layers)} layers; expected at least {needed}, as the"
                f" network reads layers {', '.join(map(str, self.text_layers))}",
                "unsupported",
            )
        model.layers = model.layers[:needed]
        model.config.num_hidden_layers = needed
        # One entry a layer, in the configurations that have it.
        if getattr(model.config, "layer_types", None):
            model.config.layer_types = model.config.layer_types[:needed]

    @abstractmethod
    def language_model(self) -> Any:
        """The network that reads token ids."""

    @property
    def reads_guidance(self) -> bool:
        return bool(self.transformer.config.guidance_embeds)

    @property
    def patch(self) -> int:
        return 1

    @property
    def denoiser_channels(self) -> int:
        return int(self.transformer.config.in_channels)

    @property
    def vae_channels(self) -> int:
        return int(self.vae.config.latent_channels) * self._group**2

    @property
    def _group(self) -> int:
        return int(self.vae.config.patch_size[0])

    @property
    def latents(self) -> Latents:
        halvings, group = len(self.vae.config.block_out_channels) - 1, self._group
        return Latents(channels=self.denoiser_channels, factor=2**halvings * group, patch=self.patch, group=group)

    def scaled(self, z: Tensor) -> Tensor:
        mean, deviation = self._statistics(z)
        return (z - mean) / deviation

    def unscaled(self, z: Tensor) -> Tensor:
        mean, deviation = self._statistics(z)
        return z * deviation + mean

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel, `[1, C, 1, 1]`."""
        norm = self.vae.bn
        mean, variance = (value.to(like).view(1, -1, 1, 1) for value in (norm.running_mean, norm.running_var))
        return mean, (variance + self.vae.config.batch_norm_eps).sqrt()

    def _moments(self, x: Tensor) -> Tensor:
        parts = super()._moments(x).chunk(2, 1)
        return torch.cat([pixel_unshuffle(part, self._group) for part in parts], 1)

    def _pixels(self, z: Tensor) -> Tensor:
        return super()._pixels(pixel_shuffle(z, self._group))

    @cached_property
    def sites(self) -> dict[str, tuple[int, int]]:
        """`block.N` follows the Nth double block. Residuals are added to the image tokens, `[B, h * w, C]`, in
        row-major order."""
        blocks = range(len(self.transformer.transformer_blocks))
        return dict.fromkeys((f"block.{place}" for place in blocks), (self.transformer.inner_dim, self.size_multiple))

    @cached_property
    def points(self) -> dict[str, Point]:
        """`block.N.in` and `block.N` are before and after a double block, on the image tokens `[B, n, C]`;
        `single.N.in` and `single.N` before and after a single block, on prompt and image tokens `[B, m + n, C]`; `time`
        is the embedding of time and guidance `[B, C]`, which modulates all blocks."""
        points = {"time": Point(module="time_guidance_embed")}
        for place in range(len(self.transformer.transformer_blocks)):
            points[f"block.{place}.in"] = Point(module=f"transformer_blocks.{place}", side="input")
            points[f"block.{place}"] = Point(module=f"transformer_blocks.{place}", place=1)
        for place in range(len(self.transformer.single_transformer_blocks)):
            points[f"single.{place}.in"] = Point(module=f"single_transformer_blocks.{place}", side="input")
            points[f"single.{place}"] = Point(module=f"single_transformer_blocks.{place}")
        return points

    def sites_in_words(self) -> dict[str, str]:
        transformer = self.transformer
        double, single = len(transformer.transformer_blocks), len(transformer.single_transformer_blocks)
        return {
            "where residuals enter": f"after {double} double blocks of {double + single}, {transformer.inner_dim}"
            " channels a token"
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
        added = Residuals() if residuals is None else residuals
        self.check_sites(added)
        with self.tapping(added, taps or {}) if added or taps else nullcontext():
            tokens = self.transformer(
                hidden_states=tokens_of(x_t),
                timestep=t.expand(len(x_t)) / self.schedule.length,
                guidance=text["guidance"] if self.reads_guidance else None,
                encoder_hidden_states=text.tokens,
                txt_ids=text_positions(text),
                img_ids=positions(x_t),
                return_dict=False,
            )[0]
        return tokens.transpose(1, 2).unflatten(2, x_t.shape[2:])

    @torch.no_grad()
    def encode_text(
        self, prompts: Sequence[str], size: tuple[int, int] | None = None, options: TextOptions = PLAIN
    ) -> Text:
        """Prompts => states `[B, PROMPT_TOKENS, D]`; for a base that reads it the usual guidance scale, which `guided`
        replaces.

        Weighted prompts, textual inversions and other layers are not supported, because the encoder is a language model
        that reads the prompt in a chat template.

        Raises:
            UserError: `options` asks for them.
        """
        self.check_plain(options)
        (ids,) = self.tokenize(prompts)
        device = self.text_encoder.device
        masks = self.is_of_prompt(ids)
        # A few at a time, as the states of all layers are kept for all tokens.
        parts = [
            self.states(rows.to(device), mask.to(device)).to(self.device, self.dtype)
            for rows, mask in zip(ids.split(_AT_ONCE), masks.split(_AT_ONCE), strict=True)
        ]
        return self._text(torch.cat(parts))

    def states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Those of `text_layers`, side by side."""
        hidden = self.language_model()(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
        return torch.cat([hidden[layer] for layer in self.text_layers], -1)

    def _text(self, tokens: Tensor) -> Text:
        told = {"guidance": tokens.new_full((len(tokens),), USUAL_GUIDANCE)} if self.reads_guidance else {}
        return Text(tokens, **told)

    def zero_text(self) -> Text:
        return self._text(super().zero_text().tokens)

    @property
    def text_width(self) -> int:
        return int(self.transformer.config.joint_attention_dim)

    def embed_time(self, x_t: Tensor, t: Tensor, text: Text) -> Tensor:
        time = (t.expand(len(x_t)) / self.schedule.length).to(x_t.dtype) * 1000
        told = text["guidance"].to(x_t.dtype) * 1000 if self.reads_guidance else None
        return self.transformer.time_guidance_embed(time, told)

    @classmethod
    def lora_of(cls, layer: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """With scale before shift in the modulation of the last layer, as in diffusers' network; its converter of LoRAs
        leaves them as in the original (diffusers 0.42)."""
        if "adaLN_modulation" not in layer:
            return dict(tensors)
        return {
            name: torch.cat(value.chunk(2)[::-1]) if name.endswith("lora_B.weight") else value
            for name, value in tensors.items()
        }

    @classmethod
    def settings_of_file(cls, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        return {"guidance_embeds": _reads_guidance(shapes), **blocks_in(shapes)}


class Flux2(Flux2Base):
    """FLUX.2 dev."""

    components: ClassVar[tuple[Component, ...]] = (
        # Of the folder's processor only the tokenizer is used: that of images needs torchvision.
        Component(name=_TOKENIZER, library="transformers", class_name="AutoTokenizer"),
        Component(name=_TEXT_ENCODER, library="transformers", class_name="Mistral3ForConditionalGeneration"),
        *_OTHERS,
    )
    known: ClassVar[Mapping[str, Configurations]] = {"flux2-dev": _known(FLUX2_DEV_TRANSFORMER, FLUX2_DEV_TEXT_ENCODER)}
    pipeline: ClassVar[str] = "Flux2Pipeline"
    tokenizer_title: ClassVar[str] = "Mistral's tokenizer"
    padding_side: ClassVar[str] = "left"
    text_layers: ClassVar[tuple[int, ...]] = DEV_LAYERS

    text_encoder: Mistral3ForConditionalGeneration

    @property
    def architecture(self) -> str:
        return "flux-2-dev"

    def language_model(self) -> Any:
        return self.text_encoder.model.language_model

    def chat(self, prompt: str) -> str:
        """A prompt in dev's chat; the name of the token for an image is left out of it, as in diffusers' pipeline."""
        return TEMPLATE.format(self.tokenizer.bos_token, prompt.replace("[IMG]", ""))

    @classmethod
    def recognise(cls, shapes: Mapping[str, tuple[int, ...]], name: str) -> str | None:
        return "flux2-dev" if _is_flux2(shapes, name) and _reads_guidance(shapes) else None


class Flux2Klein(Flux2Base):
    """FLUX.2 klein, distilled to about 4 steps without guidance, and the models that it was made from (klein-base).

    Args:
        is_distilled: which of the two, as `model_index.json` has it.
    """

    components: ClassVar[tuple[Component, ...]] = (
        Component(name=_TOKENIZER, library="transformers", class_name="Qwen2Tokenizer"),
        Component(name=_TEXT_ENCODER, library="transformers", class_name="Qwen3ForCausalLM"),
        *_OTHERS,
    )
    known: ClassVar[Mapping[str, Configurations]] = {
        "flux2-klein-4b": _known(FLUX2_KLEIN_4B_TRANSFORMER, Z_IMAGE_TEXT_ENCODER),
        "flux2-klein-9b": _known(FLUX2_KLEIN_9B_TRANSFORMER, FLUX2_KLEIN_9B_TEXT_ENCODER),
    }
    pipeline: ClassVar[str] = "Flux2KleinPipeline"
    tokenizer_title: ClassVar[str] = "Qwen3's tokenizer"
    text_layers: ClassVar[tuple[int, ...]] = KLEIN_LAYERS

    text_encoder: Qwen3ForCausalLM

    def __init__(self, *, is_distilled: bool = False, **parts: Any) -> None:
        super().__init__(**parts)
        self.is_distilled = is_distilled

    @classmethod
    def is_folder_of(cls, folder: Mapping[str, Mapping[str, Any]]) -> bool:
        """Judged by its text encoder, too."""
        kind = folder.get(_TEXT_ENCODER, {}).get("model_type")
        return super().is_folder_of(folder) and kind == Qwen3ForCausalLM.config_class.model_type

    @classmethod
    def settings_in(cls, folder: Path) -> dict[str, Any]:
        index = model_index(folder)
        # diffusers' pipeline for it takes True where the index says nothing.
        is_kv = index.get("_class_name") == "Flux2KleinKVPipeline"
        return {"is_distilled": bool(index.get("is_distilled", is_kv))}

    @property
    def architecture(self) -> str:
        return "flux-2-klein"

    @property
    def default_guidance(self) -> float:
        """1 (off) for a distilled model."""
        return float(self.defaults.get("guidance", 1.0 if self.is_distilled else self.usual_guidance))

    def language_model(self) -> Any:
        return self.text_encoder.model

    def chat(self, prompt: str) -> str:
        """A prompt in the tokenizer's chat template, as in diffusers' pipeline."""
        chat: str = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        return chat

    @classmethod
    def recognise(cls, shapes: Mapping[str, tuple[int, ...]], name: str) -> str | None:
        if not _is_flux2(shapes, name) or _reads_guidance(shapes):
            return None
        is_9b = shapes["txt_in.weight"][-1] == FLUX2_KLEIN_9B_TRANSFORMER["joint_attention_dim"]
        return "flux2-klein-9b" if is_9b else "flux2-klein-4b"


def _is_flux2(shapes: Mapping[str, tuple[int, ...]], name: str) -> bool:
    """Whether a file has the names of FLUX.2's transformer.

    Raises:
        UserError: it has them, as part of a whole model.
    """
    if all(f"{_PREFIX}{mark}" in shapes for mark in _MARKS):
        raise UserError(
            f"{name} has the names of a whole model ({_PREFIX}*), which are not read of FLUX.2; use a file of the"
            " transformer alone (ComfyUI's diffusion_models)",
            "unsupported",
        )
    return set(_MARKS) <= set(shapes)


def _reads_guidance(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    return any(name.startswith("guidance_in.") for name in shapes)


def tokens_of(latents: Tensor) -> Tensor:
    """Latents `[B, C, h, w]` => tokens `[B, h * w, C]`, row by row."""
    return latents.flatten(2).transpose(1, 2)


def positions(latents: Tensor) -> Tensor:
    """Positions of the tokens of an image, `[h * w, 4]`: 0, row, column, 0."""
    # In float32, as bfloat16 would round those above 256.
    rows, columns = (torch.arange(side, device=latents.device, dtype=torch.float32) for side in latents.shape[2:])
    row, column = torch.meshgrid(rows, columns, indexing="ij")
    zero = torch.zeros_like(row)
    return torch.stack([zero, row, column, zero], -1).flatten(0, 1)


def text_positions(text: Text) -> Tensor:
    """Positions of a text's tokens, `[L, 4]`: 0, 0, 0, place."""
    places = torch.arange(text.tokens.shape[1], device=text.tokens.device, dtype=torch.float32)
    zero = torch.zeros_like(places)
    return torch.stack([zero, zero, zero, places], -1)
