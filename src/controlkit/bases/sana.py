"""Sana (Xie et al. 2024, arXiv 2410.10629): a diffusion transformer with linear attention over latents of 1/32 of the
image's size, which reads prompts by Gemma 2 after an instruction to enhance them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import cache, cached_property
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderDC, SanaPipeline, SanaTransformer2DModel
from torch import Tensor
from torch.nn.functional import pad
from transformers import Gemma2Model

from controlkit.bases.component import Component, Configurations
from controlkit.bases.language_model import MaskedPromptBase, arranged
from controlkit.bases.latent_space import Latents
from controlkit.bases.prompt_encoding import PLAIN, TextOptions
from controlkit.bases.residuals import Residuals
from controlkit.bases.schedules import RectifiedFlow, SanaFlow
from controlkit.bases.taps import Point, Taps
from controlkit.bases.text import Text, TokenizedPrompts
from controlkit.errors import UserError
from controlkit.files import valid_text

SANA_TOKENS = 300
"""Tokens of a prompt that the network reads, in diffusers' pipeline (`max_sequence_length`)."""

SANA_1600M_TRANSFORMER: dict[str, Any] = {
    "in_channels": 32,
    "out_channels": 32,
    "num_attention_heads": 70,
    "attention_head_dim": 32,
    "num_layers": 20,
    "num_cross_attention_heads": 20,
    "cross_attention_head_dim": 112,
    "cross_attention_dim": 2240,
    "caption_channels": 2304,
    "mlp_ratio": 2.5,
    "sample_size": 32,
    "patch_size": 1,
}
"""Transformer of Sana with 1.6 billion parameters, for images of 1024 x 1024."""
SANA_600M_TRANSFORMER: dict[str, Any] = {
    **SANA_1600M_TRANSFORMER,
    "num_attention_heads": 36,
    "num_layers": 28,
    "num_cross_attention_heads": 16,
    "cross_attention_head_dim": 72,
    "cross_attention_dim": 1152,
}
SANA_VAE: dict[str, Any] = {
    "latent_channels": 32,
    "attention_head_dim": 32,
    "encoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "decoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "decoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
    "decoder_layers_per_block": [3, 3, 3, 3, 3, 3],
    "encoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "decoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "downsample_block_type": "Conv",
    "upsample_block_type": "interpolate",
    "decoder_norm_types": "rms_norm",
    "decoder_act_fns": "silu",
    "scaling_factor": 0.41407,
}
"""DC-AE (Chen et al. 2024, arXiv 2410.10733) with 32 channels."""
SANA_TEXT_ENCODER: dict[str, Any] = {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "max_position_embeddings": 8192,
}
"""Gemma 2 with 2 billion parameters."""
SANA_SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "flow_shift": 3.0,
    "use_flow_sigmas": True,
    "prediction_type": "flow_prediction",
}


def _known(transformer: dict[str, Any]) -> Configurations:
    return {
        "transformer": transformer,
        "vae": SANA_VAE,
        "text_encoder": SANA_TEXT_ENCODER,
        "scheduler": SANA_SCHEDULER,
    }


@cache
def instruction() -> str:
    """What Gemma reads before a prompt: the instruction of Sana's authors that is diffusers' default."""
    lines = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    return "\n".join(lines)


class Sana(MaskedPromptBase):
    """A rectified flow in a transformer of blocks with linear attention, which reads the prompt by cross attention.

    Prompts are read in lower case, after `instruction`; the network gets the states of the first token and of the
    prompt's. The empty prompt, which training has in place of dropped ones, and negative prompts are read without it.
    """

    components: ClassVar[tuple[Component, ...]] = (
        Component(name="tokenizer", library="transformers", class_name="GemmaTokenizer"),
        Component(name="text_encoder", library="transformers", class_name="Gemma2Model"),
        Component(name="vae", library="diffusers", class_name="AutoencoderDC"),
        Component(name="transformer", library="diffusers", class_name="SanaTransformer2DModel"),
        Component(name="scheduler", library="diffusers", class_name="DPMSolverMultistepScheduler"),
    )
    known: ClassVar[Mapping[str, Configurations]] = {
        "sana-600m": _known(SANA_600M_TRANSFORMER),
        "sana-1600m": _known(SANA_1600M_TRANSFORMER),
    }
    required_settings: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "transformer": ("in_channels", "num_layers", "caption_channels"),
        "vae": ("encoder_block_out_channels", "latent_channels"),
    }
    pipeline: ClassVar[str] = "SanaPipeline"
    family_title: ClassVar[str] = "Sana"
    tokenizer_title: ClassVar[str] = "Gemma 2's tokenizer"
    lora_loader: ClassVar[str | None] = "SanaLoraLoaderMixin"
    schedule_class: ClassVar[type[RectifiedFlow]] = SanaFlow
    usual_sampler: ClassVar[str] = "dpm++"
    usual_guidance: ClassVar[float] = 4.5
    upcasts_vae: ClassVar[bool] = True
    tokens_read: ClassVar[int] = SANA_TOKENS

    text_encoder: Gemma2Model
    vae: AutoencoderDC
    transformer: SanaTransformer2DModel

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        config = self.transformer.config
        if config.guidance_embeds:
            raise UserError(
                f"{self.name} is Sana Sprint, whose network predicts in one to four steps of its own (guidance_embeds);"
                " use Sana or Sana 1.5",
                "unsupported",
            )
        if config.out_channels != config.in_channels or config.patch_size != 1:
            raise UserError(
                f"the network of {self.name} reads {config.in_channels} channels in patches of {config.patch_size} and"
                f" makes {config.out_channels}; expected equal numbers and patches of 1, as of Sana",
                "unsupported",
            )

    @property
    def architecture(self) -> str:
        return "sana"

    @property
    def patch(self) -> int:
        return 1

    @property
    def latents(self) -> Latents:
        config = self.vae.config
        return Latents(
            channels=self.denoiser_channels,
            factor=2 ** (len(config.encoder_block_out_channels) - 1),
            scale=config.scaling_factor,
        )

    @cached_property
    def sites(self) -> dict[str, tuple[int, int]]:
        """`block.N` follows the Nth block. Residuals are added to the image tokens, `[B, h * w, C]`, in row-major
        order."""
        blocks = range(len(self.transformer.transformer_blocks))
        return dict.fromkeys((f"block.{place}" for place in blocks), (self._width, self.size_multiple))

    @cached_property
    def points(self) -> dict[str, Point]:
        """`block.N.in` and `block.N` are before and after a block, on the image tokens `[B, h * w, C]`; `time` is the
        time embedding `[B, C]`, which modulates all blocks."""
        points = {"time": Point(module="time_embed.emb")}
        for place in range(len(self.transformer.transformer_blocks)):
            points[f"block.{place}.in"] = Point(module=f"transformer_blocks.{place}", side="input")
            points[f"block.{place}"] = Point(module=f"transformer_blocks.{place}")
        return points

    def sites_in_words(self) -> dict[str, str]:
        blocks = len(self.transformer.transformer_blocks)
        return {"where residuals enter": f"after {blocks} blocks, {self._width} channels a token"}

    @property
    def _width(self) -> int:
        return int(self.transformer.config.num_attention_heads * self.transformer.config.attention_head_dim)

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
            predicted: Tensor = self.transformer(
                hidden_states=x_t,
                timestep=t.expand(len(x_t)) * self.transformer.config.timestep_scale,
                **prompt_of(text),
                return_dict=False,
            )[0]
        return predicted

    def chat(self, prompt: str) -> str:
        return instruction() + plain(prompt)

    def states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The last ones."""
        states: Tensor = self.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return states

    @property
    def text_width(self) -> int:
        return int(self.transformer.config.caption_channels)

    @cached_property
    def _instruction_tokens(self) -> int:
        """With the token at the beginning; the last of them becomes one with the prompt."""
        return len(self.tokenizer(instruction()).input_ids)

    @property
    def _length(self) -> int:
        """Tokens of the instruction and the longest prompt."""
        return self._instruction_tokens + self.tokens_read - 2

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        length = self._length
        known = prompts.ids_of(self.tokenizer, length) if isinstance(prompts, TokenizedPrompts) else None
        if known is not None:
            return (known,)
        return (self._ids([self.chat(each) if plain(each) else "" for each in prompts], length),)

    def _ids(self, texts: Sequence[str], length: int) -> Tensor:
        """Token ids `[B, length]`, with the token at the beginning."""
        ids: Tensor = self.tokenizer(
            list(texts),
            padding="max_length",
            padding_side="right",
            max_length=length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        return ids

    @torch.no_grad()
    def encode_text(
        self, prompts: Sequence[str], size: tuple[int, int] | None = None, options: TextOptions = PLAIN
    ) -> Text:
        """Prompts => states `[B, SANA_TOKENS, D]`, zero after the prompt, and `mask`.

        Weighted prompts, textual inversions and other layers are not supported, because the encoder is a language model
        that reads the prompt after an instruction.

        Raises:
            UserError: `options` asks for them.
        """
        self.check_plain(options)
        if options.negative:
            ids = self._ids([plain(each) for each in prompts], self.tokens_read)
            skipped = torch.zeros(len(ids), dtype=torch.long)
        else:
            (ids,) = self.tokenize(prompts)
            is_empty = ids[:, 1] == self.tokenizer.pad_token_id
            skipped = torch.where(is_empty, 0, self._instruction_tokens - 2)
        mask = self.is_of_prompt(ids)
        longest = int(mask.sum(1).max())
        device = self.text_encoder.device
        states = self.states(ids[:, :longest].to(device), mask[:, :longest].to(device))
        # The first token, and those after the instruction.
        places = torch.arange(self.tokens_read)
        places = torch.where(places > 0, places + skipped[:, None], places)
        mask = pad(mask, (0, self.tokens_read)).gather(1, places).to(device)
        states = states.gather(1, places.clamp(max=longest - 1).to(device)[..., None].expand(-1, -1, states.shape[2]))
        return Text((states * mask[..., None]).to(self.device, self.dtype), mask=mask.to(self.device))

    def cut_from(self, prompt: str) -> str:
        ids = self.tokenizer(self.chat(prompt), verbose=False).input_ids
        return self.tokenizer.decode(ids[self._length :]).strip()

    def embed_time(self, x_t: Tensor, t: Tensor, text: Text) -> Tensor:
        time = t.expand(len(x_t)) * self.transformer.config.timestep_scale
        embedded: Tensor = self.transformer.time_embed.emb(
            time, batch_size=len(x_t), hidden_dtype=x_t.dtype, resolution=None, aspect_ratio=None
        )
        return embedded

    def _moments(self, x: Tensor) -> Tensor:
        """The autoencoder has no variance."""
        z: Tensor = self.vae.encode(x).latent
        return torch.cat([z, torch.full_like(z, -torch.inf)], 1)

    @classmethod
    def recognise(cls, shapes: Mapping[str, tuple[int, ...]], name: str) -> str | None:
        """None: only folders are read.

        Raises:
            UserError: it is a file of Sana's transformer.
        """
        of_nvidia = any(key.endswith("attention_y_norm.weight") for key in shapes)
        if of_nvidia or {"caption_norm.weight", "proj_out.weight"} <= set(shapes):
            raise UserError(
                f"{name} is the transformer of Sana in one file, which is not read; use the model's diffusers folder"
                " (such as Efficient-Large-Model/Sana_1600M_1024px_diffusers)",
                "unsupported",
            )
        return None


def plain(prompt: str) -> str:
    """A prompt as diffusers' pipeline has it: in lower case, without spaces around it.

    Raises:
        UserError: it contains half a character (a lone surrogate).
    """
    return valid_text(prompt, "the prompt").lower().strip()


def prompt_of(text: Text) -> dict[str, Any]:
    """Arguments of diffusers' networks for Sana that tell the prompt.

    Args:
        text: tokens after those of `mask` (`Text.extended`) are read, too.
    """
    tokens, read, _ = arranged(text.tokens, text["mask"], text["mask"].sum(1))
    return {"encoder_hidden_states": tokens, "encoder_attention_mask": None if "even" in text else read}
