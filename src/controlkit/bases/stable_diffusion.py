"""Stable Diffusion 1 and 2 (Rombach et al. 2022, arXiv 2112.10752) and models of the same architecture, such as
nano."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from controlkit.bases.clip_tokenizer import clip_tokenizer
from controlkit.bases.component import VAE, Component, Configurations, clip_components
from controlkit.bases.latent_rgb import SD1_LATENT_RGB, LatentRGB
from controlkit.bases.prompt_encoding import PLAIN, TextOptions, encode_prompts
from controlkit.bases.text import Text, normed_clip_states, token_ids
from controlkit.bases.unet import UNetBase
from controlkit.errors import UserError

UNET = Component(name="unet", library="diffusers", class_name="UNet2DConditionModel")
SCHEDULER = Component(name="scheduler", library="diffusers", class_name="DDIMScheduler")
ORIGINAL_UNET = "model.diffusion_model."
"""Prefix of the UNet's tensors in the original format."""
_PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
"""modelspec's name of a prediction type -> diffusers'."""

SD15_UNET: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "down_block_types": [
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "DownBlock2D",
    ],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
"""UNet of Stable Diffusion 1.x (859,520,964 parameters). `attention_head_dim` is the number of heads, a
misnomer that diffusers keeps."""

SD15_VAE: dict[str, Any] = {
    "sample_size": 512,
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
}
"""Autoencoder of Stable Diffusion 1.x (83,653,863 parameters)."""

SD15_TEXT_ENCODER: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
"""Text model of CLIP ViT-L/14 (123,060,480 parameters)."""

SD15_SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
}
"""Noise schedule of Stable Diffusion 1.x."""

SD21_UNET: dict[str, Any] = {
    **SD15_UNET,
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}
"""UNet of Stable Diffusion 2.x (865,910,724 parameters); the 512 x 512 models have a sample size of 64."""

SD21_TEXT_ENCODER: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "projection_dim": 512,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "max_position_embeddings": 77,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
"""Text model of OpenCLIP ViT-H/14 without its last layer, whose output Stable Diffusion 2 does not use."""

SD21_SCHEDULER: dict[str, Any] = {**SD15_SCHEDULER, "prediction_type": "v_prediction"}
"""Noise schedule of the 768 x 768 models of Stable Diffusion 2.x; the 512 x 512 ones predict the noise."""


class StableDiffusion(UNetBase):
    """A base with one CLIP text encoder."""

    components: ClassVar[tuple[Component, ...]] = (*clip_components(""), VAE, UNET, SCHEDULER)
    known: ClassVar[Mapping[str, Configurations]] = {
        "sd15": {
            "unet": SD15_UNET,
            "vae": SD15_VAE,
            "text_encoder": SD15_TEXT_ENCODER,
            "scheduler": SD15_SCHEDULER,
        },
        "sd21": {
            "unet": SD21_UNET,
            "vae": {**SD15_VAE, "sample_size": 768},
            "text_encoder": SD21_TEXT_ENCODER,
            "scheduler": SD21_SCHEDULER,
        },
    }
    pipeline: ClassVar[str] = "StableDiffusionPipeline"
    index_entries: ClassVar[Mapping[str, Any]] = {
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
    }
    usual_guidance: ClassVar[float] = 7.5
    usual_latent_rgb: ClassVar[LatentRGB] = SD1_LATENT_RGB

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    vae: AutoencoderKL

    @torch.no_grad()
    def encode_text(
        self, prompts: Sequence[str], size: tuple[int, int] | None = None, options: TextOptions = PLAIN
    ) -> Text:
        def encode(ids: Tensor) -> tuple[Tensor, Tensor]:
            return normed_clip_states(self.text_encoder, ids, options.clip_skip)

        states, _ = encode_prompts(self.tokenizer, self.text_encoder, "text_encoder", prompts, options, encode)
        return Text(states.to(self.device, self.dtype))

    @property
    def pooled_width(self) -> int:
        return self.text_encoder.config.hidden_size

    @torch.no_grad()
    def pool_text(self, phrases: Sequence[str]) -> Tensor:
        _, pooled = normed_clip_states(self.text_encoder, token_ids(self.tokenizer, phrases))
        return pooled.to(self.device, self.dtype)

    @classmethod
    def recognise(cls, shapes: Mapping[str, tuple[int, ...]], name: str) -> str | None:
        if not any(key.startswith(ORIGINAL_UNET) for key in shapes):
            return None
        check_autoencoder(shapes, name)
        if not any(key.startswith("cond_stage_model.") for key in shapes):
            raise UserError(
                f"{name} is not a complete model: it has no text encoder (cond_stage_model.*); use a complete file, or"
                " a diffusers folder",
                "wrong-kind",
            )
        return "sd21" if any(key.startswith("cond_stage_model.model.") for key in shapes) else "sd15"

    @classmethod
    def configurations_of_file(
        cls, known: Configurations, shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]
    ) -> tuple[Configurations, list[str]]:
        known = with_channels(known, shapes)
        configurations = with_prediction(known, shapes, metadata)
        is_version_2 = known["unet"]["cross_attention_dim"] == SD21_UNET["cross_attention_dim"]
        notes = []
        if is_version_2 and configurations is known:
            guess = "a 768 x 768 model, which predicts v"
            # The released inpainting model, unlike the others (Stability-AI/stablediffusion,
            # configs/stable-diffusion/v2-inpainting-inference.yaml).
            if known["unet"]["in_channels"] != SD21_UNET["in_channels"]:
                guess = "the 512 x 512 inpainting model, which predicts the noise"
                configurations = {**known, "scheduler": {**known["scheduler"], "prediction_type": "epsilon"}}
            notes.append(
                f"does not declare its prediction type: treated as {guess}; if it is another, put a diffusers folder"
                " with its configuration beside the file, of the same name without suffix"
            )
        if is_version_2 and configurations["scheduler"]["prediction_type"] == "epsilon":  # the 512 x 512 models
            configurations = {**configurations, "unet": {**configurations["unet"], "sample_size": 64}}
        return configurations, notes

    @classmethod
    def tokenizer_for(cls, component: Component, configurations: Configurations) -> CLIPTokenizer:
        is_openclip = configurations["text_encoder"]["hidden_size"] == SD21_TEXT_ENCODER["hidden_size"]
        return clip_tokenizer(pad_token="!" if is_openclip else "<|endoftext|>")


def check_autoencoder(shapes: Mapping[str, tuple[int, ...]], name: str) -> None:
    """Check that a single file has an autoencoder.

    Raises:
        UserError: it has none.
    """
    if not any(key.startswith("first_stage_model.") for key in shapes):
        raise UserError(
            f"{name} is not a complete model: it has no autoencoder (first_stage_model.*); use a complete file, or a"
            " diffusers folder",
            "wrong-kind",
        )


def with_channels(known: Configurations, shapes: Mapping[str, tuple[int, ...]]) -> Configurations:
    """Configurations with the input channels of a single file's UNet, 9 for inpainting models; unchanged for 4."""
    shape = shapes.get(f"{ORIGINAL_UNET}input_blocks.0.0.weight", ())
    if len(shape) < 2 or shape[1] == known["unet"]["in_channels"]:
        return known
    return {**known, "unet": {**known["unet"], "in_channels": shape[1]}}


def with_prediction(
    known: Configurations, shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]
) -> Configurations:
    """Configurations with the prediction type that a single file declares, in modelspec's metadata or, as in ComfyUI,
    by empty tensors `v_pred` and `ztsnr`; with a scheduler of EDM for the tensors that mark Playground v2.5 and CosXL
    (ComfyUI, comfy/supported_models.py); unchanged if it declares none."""
    if "edm_mean" in shapes or "edm_vpred.sigma_max" in shapes:
        return {**known, "scheduler": {**known["scheduler"], "_class_name": "EDMEulerScheduler"}}
    prediction = _PREDICTIONS.get(metadata.get("modelspec.prediction_type", ""))
    if prediction is None and "v_pred" in shapes:
        prediction = "v_prediction"
    if prediction is None:
        return known
    schedule = {**known["scheduler"], "prediction_type": prediction}
    if "ztsnr" in shapes:
        schedule |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return {**known, "scheduler": schedule}
