"""Configurations of well-known bases, as data: enough to build and count their networks with no download."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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

KNOWN_BASES: dict[str, dict[str, dict[str, Any]]] = {
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
    "sdxl": {
        "unet": SDXL_UNET,
        "vae": SDXL_VAE,
        "text_encoder": SD15_TEXT_ENCODER,
        "text_encoder_2": SDXL_TEXT_ENCODER_2,
        "scheduler": SD15_SCHEDULER,
    },
}
"""Name -> the configuration of each part, under the names of a diffusers folder."""


def known_by_shape(name: str) -> bool:
    """Whether `name` means one of `KNOWN_BASES`, and no folder here that is called so."""
    return name in KNOWN_BASES and not Path(name).is_dir()


NANO_DEFAULTS: dict[str, Any] = {
    "guidance": 3.0,
    "mode": "control",
    "adapter": {"rank": 4, "learning_rate": 1e-3, "batch_size": 16},
}
"""What nano, and bases that are trained by its recipes, do where nothing is asked for (docs/nano.md, docs/ctrlora.md):
the scale of guidance, on which halves of it a control acts, and settings of an adapter's training."""

DEFAULTS_KEY = "_controlkit"
"""Of `model_index.json`, under which a folder says its defaults; diffusers leaves names with a line in front alone."""


def defaults_in(folder: Path) -> dict[str, Any]:
    """What a base's folder says (in `model_index.json`) to do where nothing is asked for; empty if it says nothing."""
    try:
        said = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))[DEFAULTS_KEY]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return said if isinstance(said, dict) else {}


FAMILIES = {768: "stable-diffusion-v1", 1024: "stable-diffusion-v2", 2048: "stable-diffusion-xl-v1-base"}
"""Width of the text that a base's cross attention reads -> the base's family, under modelspec's names."""
