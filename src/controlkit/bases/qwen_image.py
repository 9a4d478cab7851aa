"""Qwen-Image (Wu et al. 2025, arXiv 2508.02324): a diffusion transformer whose blocks read image and prompt apart.

Qwen2.5-VL, a language model that also sees images, reads the prompt. The autoencoder is one for video; an image is one
frame.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from controlkit.bases.component import Component, Configurations, model_index
from controlkit.bases.flux import pack, unpack
from controlkit.bases.language_model import MaskedPromptBase, arranged
from controlkit.bases.latent_rgb import WAN_LATENT_RGB, LatentRGB
from controlkit.bases.latent_space import Latents
from controlkit.bases.residuals import Residuals
from controlkit.bases.schedules import EvenlySpacedFlow, RectifiedFlow
from controlkit.bases.taps import Point, Taps
from controlkit.bases.text import Text
from controlkit.errors import UserError

PACK = 2
"""Side length in latent positions of a token of the transformer."""
TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial"
    " relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
"""The chat that the text encoder reads (diffusers, pipelines/qwenimage/pipeline_qwenimage.py)."""
TEMPLATE_TOKENS = 34
"""Tokens of it before the prompt."""

QWEN_IMAGE_TRANSFORMER: dict[str, Any] = {
    "patch_size": 2,
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 60,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 3584,
    "guidance_embeds": False,
    "axes_dims_rope": [16, 56, 56],
}
"""Transformer of Qwen-Image and Qwen-Image-2512."""
QWEN_IMAGE_VAE: dict[str, Any] = {
    "base_dim": 96,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
}
"""Its autoencoder, that of Wan 2.1 with another decoder. diffusers' class has the mean and deviation of its latents."""
QWEN_IMAGE_TEXT_ENCODER: dict[str, Any] = {
    "text_config": {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    },
    "vision_config": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16},
}
"""Qwen2.5-VL 7B."""
QWEN_IMAGE_SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "base_image_seq_len": 256,
    "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
    "time_shift_type": "exponential",
}

_OTHER_MODELS = ("zero_cond_t", "use_additional_t_cond", "use_layer3d_rope")
"""Settings of the transformers of Qwen-Image-Edit-2511 and Qwen-Image-Layered."""
_PREFIX = "model.diffusion_model."
_MARKS = {
    "__index_timestep_zero__": "Qwen-Image-Edit-2511, which edits images",
    "time_text_embed.addition_t_embedding.": "Qwen-Image-Layered, which makes layers",
    "control_blocks.": "a Qwen-Image with a Fun control in one file",
}
"""Beginning of a tensor's name -> what such a file is."""
_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.")


class QwenImage(MaskedPromptBase):
    """A rectified flow in a transformer of double blocks, which reads latents in tokens of 2 x 2 positions."""

    components: ClassVar[tuple[Component, ...]] = (
        Component(name="tokenizer", library="transformers", class_name="Qwen2Tokenizer"),
        Component(name="text_encoder", library="transformers", class_name="Qwen2_5_VLForConditionalGeneration"),
        Component(name="vae", library="diffusers", class_name="AutoencoderKLQwenImage"),
        Component(name="transformer", library="diffusers", class_name="QwenImageTransformer2DModel"),
        Component(name="scheduler", library="diffusers", class_name="FlowMatchEulerDiscreteScheduler"),
    )
    known: ClassVar[Mapping[str, Configurations]] = {
        "qwen-image": {
            "transformer": QWEN_IMAGE_TRANSFORMER,
            "vae": QWEN_IMAGE_VAE,
            "text_encoder": QWEN_IMAGE_TEXT_ENCODER,
            "scheduler": QWEN_IMAGE_SCHEDULER,
        }
    }
    required_settings: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "transformer": ("in_channels", "num_layers", "joint_attention_dim"),
        "vae": ("z_dim",),
    }
    pipeline: ClassVar[str] = "QwenImagePipeline"
    family_title: ClassVar[str] = "Qwen-Image"
    tokenizer_title: ClassVar[str] = "Qwen2.5's tokenizer"
    left_out: ClassVar[int] = TEMPLATE_TOKENS
    lora_loader: ClassVar[str | None] = "QwenImageLoraLoaderMixin"
    lora_names: ClassVar[str] = r"lora_unet_|diffusion_model\."
    schedule_class: ClassVar[type[RectifiedFlow]] = EvenlySpacedFlow
    usual_guidance: ClassVar[float] = 4.0
    usual_latent_rgb: ClassVar[LatentRGB] = WAN_LATENT_RGB

    text_encoder: Qwen2_5_VLForConditionalGeneration
    vae: AutoencoderKLQwenImage
    transformer: QwenImageTransformer2DModel

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        config = self.vae.config
        for name in ("latents_mean", "latents_std"):
            if len(config.get(name) or ()) != config.z_dim:
                raise UserError(
                    f"the autoencoder of {self.name} has {config.z_dim} channels (z_dim) and {name} {config.get(name)};"
                    " expected a number for each",
                    "damaged-file",
                )
        if other := [name for name in _OTHER_MODELS if self.transformer.config.get(name)]:
            raise UserError(
                f"{self.name} has a transformer with {', '.join(other)}, as Qwen-Image-Edit-2511 and Qwen-Image-Layered"
                " have; use Qwen-Image or Qwen-Image-2512",
                "unsupported",
            )

    @classmethod
    def settings_in(cls, folder: Path) -> dict[str, Any]:
        """None; a folder whose pipeline edits images or makes layers is refused, as its transformer may not show it.

        Raises:
            UserError: it is such a folder.
        """
        pipeline = str(model_index(folder).get("_class_name"))
        if any(word in pipeline for word in ("Edit", "Layered")):
            raise UserError(
                f"{folder} is for {pipeline}, which edits images or makes layers; use Qwen-Image or Qwen-Image-2512",
                "unsupported",
            )
        return {}

    @property
    def architecture(self) -> str:
        return "qwen-image"

    @property
    def patch(self) -> int:
        return PACK

    @property
    def denoiser_channels(self) -> int:
        return int(self.transformer.config.in_channels) // PACK**2

    @property
    def vae_channels(self) -> int:
        return int(self.vae.config.z_dim)

    @property
    def latents(self) -> Latents:
        config = self.vae.config
        return Latents(
            channels=self.denoiser_channels,
            factor=2 ** len(config.temperal_downsample),
            scale=tuple(1 / deviation for deviation in config.latents_std),
            shift=tuple(config.latents_mean),
            patch=self.patch,
        )

    @cached_property
    def sites(self) -> dict[str, tuple[int, int]]:
        """`block.N` follows the Nth block. Residuals are added to the image tokens, `[B, h * w, C]`, in row-major
        order."""
        blocks = range(len(self.transformer.transformer_blocks))
        return dict.fromkeys((f"block.{place}" for place in blocks), (self.transformer.inner_dim, self.size_multiple))

    @cached_property
    def points(self) -> dict[str, Point]:
        """`block.N.in` and `block.N` are before and after a block, on the image tokens `[B, h * w, C]`; `time` is the
        time embedding `[B, C]`, which modulates all blocks."""
        points = {"time": Point(module="time_text_embed")}
        for place in range(len(self.transformer.transformer_blocks)):
            points[f"block.{place}.in"] = Point(module=f"transformer_blocks.{place}", side="input")
            points[f"block.{place}"] = Point(module=f"transformer_blocks.{place}", place=1)
        return points

    def sites_in_words(self) -> dict[str, str]:
        blocks, width = len(self.transformer.transformer_blocks), self.transformer.inner_dim
        return {"where residuals enter": f"after {blocks} blocks, {width} channels a token"}

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
                **prompt_and_positions(self.transformer, x_t, text),
                return_dict=False,
            )[0]
        return unpack(tokens, x_t.shape[2] // PACK, x_t.shape[3] // PACK)

    def combined(self, unconditional: Tensor, conditional: Tensor, guidance: float) -> Tensor:
        """As `Base.combined`, with each token scaled to the norm that it has on the conditional branch, as in
        diffusers' pipeline."""
        guided = super().combined(unconditional, conditional, guidance)
        tokens, own = pack(guided), pack(conditional)
        scaled = tokens * (own.norm(dim=-1, keepdim=True) / tokens.norm(dim=-1, keepdim=True))
        return unpack(scaled, guided.shape[2] // PACK, guided.shape[3] // PACK)

    def chat(self, prompt: str) -> str:
        return TEMPLATE.format(prompt)

    def states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The last ones."""
        states: Tensor = self.text_encoder.model(input_ids=ids, attention_mask=mask).last_hidden_state
        return states

    @property
    def text_width(self) -> int:
        return int(self.transformer.config.joint_attention_dim)

    def embed_time(self, x_t: Tensor, t: Tensor, text: Text) -> Tensor:
        time = t.expand(len(x_t)) / self.schedule.length
        # The network takes the type that its first layer makes, which autocast decides.
        like = self.transformer.img_in(pack(x_t)[:1, :1])
        return self.transformer.time_text_embed(time.to(like.dtype), like)

    def _moments(self, x: Tensor) -> Tensor:
        return super()._moments(x[:, :, None])[:, :, 0]

    def _pixels(self, z: Tensor) -> Tensor:
        return super()._pixels(z[:, :, None])[:, :, 0]

    @classmethod
    def recognise(cls, shapes: Mapping[str, tuple[int, ...]], name: str) -> str | None:
        names = {name.removeprefix(_PREFIX) for name in shapes}
        if not {"transformer_blocks.0.img_mod.1.weight", "txt_norm.weight", "proj_out.weight"} <= names:
            return None
        for mark, model in _MARKS.items():
            if found := next((each for each in names if each.startswith(mark)), None):
                raise UserError(
                    f"{name} is {model} ({found}); use a file of Qwen-Image or Qwen-Image-2512", "unsupported"
                )
        if _PREFIX + "txt_norm.weight" in shapes:
            raise UserError(
                f"{name} has the names of a whole model ({_PREFIX}*), which are not read of Qwen-Image; use a file of"
                " the transformer alone (ComfyUI's diffusion_models)",
                "unsupported",
            )
        return "qwen-image"

    @classmethod
    def settings_of_file(cls, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        numbers = {int(found[1]) for key in shapes if (found := _BLOCK.match(key))}
        return {"num_layers": len(numbers)}


def prompt_and_positions(network: Any, x_t: Tensor, text: Text) -> dict[str, Any]:
    """Arguments of diffusers' networks for Qwen-Image that tell the prompt and the shape of the image.

    Args:
        network: the transformer or the copy of a control, which keeps the rotary embeddings of each shape.
        x_t: noisy latents `[B, C, h, w]`.
        text: of batch B; tokens after those of `mask` (`Text.extended`) are read, too.
    """
    tokens, read, _ = arranged(text.tokens, text["mask"], text["mask"].sum(1))
    shapes = [[(1, x_t.shape[2] // PACK, x_t.shape[3] // PACK)]] * len(x_t)
    if not x_t.is_meta:
        # Kept from a call in inference mode, they could not be used in training.
        with torch.inference_mode(False):
            network.pos_embed(shapes, device=x_t.device, max_txt_seq_len=tokens.shape[1])
    mask = None if "even" in text else read
    return {"encoder_hidden_states": tokens, "encoder_hidden_states_mask": mask, "img_shapes": shapes}
