"""Small things made by hand: a Stable-Diffusion-shaped base of random weights, a control on it, icons."""

from __future__ import annotations

import numpy as np
import torch

SD1_SCHEDULE = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
"""As in Stable Diffusion 1.5's scheduler_config.json; the tiny base has nano's own."""


def build_tiny_base(seed: int = 0, text_width: int = 16):
    """64 x 64 images, latents of 4 x 16 x 16, random weights: a forward pass takes milliseconds."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from controlkit.bases.defaults import NANO_DEFAULTS
    from controlkit.bases.stable_diffusion import StableDiffusion
    from controlkit.nano.base_objective import SCHEDULER, train_tokenizer

    torch.manual_seed(seed)
    tokenizer = train_tokenizer(["red apple", "cat face", "sailboat"])
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=text_width,
            intermediate_size=2 * text_width,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
            projection_dim=text_width,
        )
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=64,
        scaling_factor=0.7,
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=text_width,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    return StableDiffusion(
        name="tiny",
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        unet=unet,
        scheduler_config=dict(SCHEDULER),
        defaults=NANO_DEFAULTS,
    )


def randomise_zero_convolutions(control, seed: int = 1, scale: float = 0.3):
    """A control that steers, without training it: its zero convolutions get random weights."""
    generator = torch.Generator().manual_seed(seed)
    zero = [
        control.network.controlnet_down_blocks,
        control.network.controlnet_mid_block,
        control.hint_network.conv_out,
    ]
    with torch.no_grad():
        for module in zero:
            for parameter in module.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return control


def fresh_control(base, condition: str | None = "canny"):
    from controlkit.controls.controlnet import ControlNet

    torch.manual_seed(5)
    return ControlNet.for_base(base, condition).eval().requires_grad_(False)


VALUES = {"boxes": [{"box": [0.1, 0.2, 0.6, 0.7], "phrase": "red apple"}]}
"""A value of each plain input of our systems."""


def any_hint(control, images, base):
    """The hint of condition images, or of values if the control takes those alone."""
    from controlkit.controls.inputs import encode_images, takes_one_image

    if takes_one_image(control):
        return encode_images(control, images, base)
    return control.encode({entry.name: VALUES[entry.name] for entry in control.inputs}, base)


def hand_made_icon(shape: str, colour: tuple[int, int, int], size: int = 96) -> np.ndarray:
    """A filled disc, square or triangle, uint8 [size, size, 4]."""
    y, x = np.mgrid[:size, :size] / (size - 1) * 2 - 1
    inside = {
        "disc": np.hypot(x, y) < 0.9,
        "square": np.maximum(abs(x), abs(y)) < 0.8,
        "triangle": (y < 0.8) & (abs(x) < (y + 0.9) / 2),
    }[shape]
    icon = np.zeros((size, size, 4), np.uint8)
    icon[inside] = (*colour, 255)
    return icon


def concepts(held_out: bool, count: int) -> list[str]:
    """Names that fall on the wanted side of the split."""
    from controlkit.nano.icons import is_held_out

    found = (name for name in (f"thing-{number}" for number in range(10_000)) if is_held_out(name) == held_out)
    return [next(found) for _ in range(count)]


SDXL_PARTS = {
    "unet": {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [16, 32],
        "layers_per_block": 1,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2],
        "attention_head_dim": [2, 4],
        "use_linear_projection": True,
        "cross_attention_dim": 28,
        "norm_num_groups": 8,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 4 * 6 + 12,
    },
    "vae": {
        "block_out_channels": [8, 8, 16],
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 8,
        "scaling_factor": 0.13025,
        "force_upcast": True,
    },
    "text_encoder": {"hidden_size": 16, "projection_dim": 16, "hidden_act": "quick_gelu"},
    "text_encoder_2": {"hidden_size": 12, "projection_dim": 12, "hidden_act": "gelu"},
}
"""The parts of a tiny Stable Diffusion XL, under the names of a diffusers folder."""

_TINY_TEXT = {
    "vocab_size": 49408,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 77,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
}


def build_tiny_sdxl(seed: int = 0):
    """A base with two text encoders and a UNet that is told sizes, 64 x 64 images, random weights."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from controlkit.bases.clip_tokenizer import clip_tokenizer
    from controlkit.bases.sdxl import StableDiffusionXL

    torch.manual_seed(seed)
    first, second = ({**_TINY_TEXT, **SDXL_PARTS[name]} for name in ("text_encoder", "text_encoder_2"))
    return StableDiffusionXL(
        name="tiny-xl",
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(pad_token="!"),
        text_encoder=CLIPTextModel(CLIPTextConfig(**first)),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**second)),
        vae=AutoencoderKL(**SDXL_PARTS["vae"]),
        unet=UNet2DConditionModel(**SDXL_PARTS["unet"]),
        scheduler_config=dict(SD1_SCHEDULE),
    )


SD3_PARTS = {
    "transformer": {
        "sample_size": 16,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 3,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 28,
        "pos_embed_max_size": 12,
        "dual_attention_layers": [0],
        "qk_norm": "rms_norm",
    },
    "vae": {
        **{key: value for key, value in SDXL_PARTS["vae"].items() if key != "force_upcast"},
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    "text_encoder": {**_TINY_TEXT, **SDXL_PARTS["text_encoder"]},
    "text_encoder_2": {**_TINY_TEXT, **SDXL_PARTS["text_encoder_2"]},
    "text_encoder_3": {
        "vocab_size": 40,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 2,
        "num_heads": 2,
        "feed_forward_proj": "gated-gelu",
    },
    "scheduler": {"num_train_timesteps": 1000, "shift": 3.0},
}
"""The parts of a tiny Stable Diffusion 3, under the names of a diffusers folder."""


def t5_tokenizer():
    """A tokenizer of T5's kind with 40 tokens."""
    from transformers import T5TokenizerFast

    words = [f"▁{word}" for word in ("a", "red", "apple", "on", "blue", "table")]
    letters = [*"abcdefghijklmnopqrstuvwxyz", "▁", ",", ".", "'", "-"]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocab = [*special, *((word, -1.0) for word in words), *((letter, -3.0) for letter in letters)]
    return T5TokenizerFast(vocab=vocab, extra_ids=0)


OF_TRANSFORMERS = {
    "flux-control-lora": "flux1-dev",
    "controlnet-qwen-image-fun": "qwen-image",
    "controlnet-qwen-image": "qwen-image",
    "controlnet-sana": "sana-600m",
    "controlnet-sd3": "sd3-medium",
    "controlnet-flux": "flux1-dev",
    "controlnet-flux2-fun": "flux2-dev",
    "controlnet-z-image": "z-image",
}
"""Kind of a system for a transformer -> a known base that it is for."""


def unet_systems():
    """Kind -> class of every system of controlkit that can be made for a UNet."""
    from controlkit.controls.registry import registry

    systems = {name: kind for name, kind in registry().items() if kind.__module__.startswith("controlkit.controls.")}
    return {name: kind for name, kind in systems.items() if name not in OF_TRANSFORMERS}


def build_tiny_sd3(seed: int = 0, *, t5: bool = True):
    """A base with a transformer of three joint blocks and three text encoders, 64 x 64 images, random weights."""
    from controlkit.bases.sd3 import StableDiffusion3

    torch.manual_seed(seed)
    parts = {}
    for component in StableDiffusion3.components:
        if component.is_network and (t5 or not component.optional):
            parts[component.name] = component.build(SD3_PARTS[component.name])
        elif component.is_tokenizer and not component.optional:
            parts[component.name] = StableDiffusion3.tokenizer_for(component, SD3_PARTS)
    if t5:
        parts["tokenizer_3"] = t5_tokenizer()
    return StableDiffusion3(name="tiny-sd3", scheduler_config=SD3_PARTS["scheduler"], **parts)


FLUX_PARTS = {
    "transformer": {
        "in_channels": 16,
        "num_layers": 3,
        "num_single_layers": 4,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 16,
        "guidance_embeds": True,
        "axes_dims_rope": [2, 2, 4],
    },
    "vae": {
        **SD3_PARTS["vae"],
        "block_out_channels": [8, 8, 8, 16],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "sample_size": 64,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
    },
    "text_encoder": SD3_PARTS["text_encoder"],
    "text_encoder_2": SD3_PARTS["text_encoder_3"],
    "scheduler": {"num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": True},
}
"""The parts of a tiny FLUX.1 dev, under the names of a diffusers folder."""


def build_tiny_flux(seed: int = 0, **transformer):
    """A base with a transformer of three double and four single blocks and two text encoders, 64 x 64 images, random
    weights.

    Args:
        transformer: other settings of the transformer.
    """
    from controlkit.bases.flux import Flux

    torch.manual_seed(seed)
    configurations = {**FLUX_PARTS, "transformer": {**FLUX_PARTS["transformer"], **transformer}}
    parts = {one.name: one.build(configurations[one.name]) for one in Flux.components if one.is_network}
    parts["tokenizer"] = Flux.tokenizer_for(Flux.components[0], FLUX_PARTS)
    return Flux(name="tiny-flux", scheduler_config=FLUX_PARTS["scheduler"], tokenizer_2=t5_tokenizer(), **parts)


Z_IMAGE_PARTS = {
    "transformer": {
        "in_channels": 4,
        "dim": 32,
        "n_layers": 4,
        "n_refiner_layers": 2,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 16,
        "axes_dims": [4, 4, 8],
        "axes_lens": [600, 32, 32],
    },
    "vae": FLUX_PARTS["vae"],
    "text_encoder": {
        "vocab_size": 300,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 1024,
    },
    "scheduler": {"num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": False},
}
"""The parts of a tiny Z-Image Turbo, under the names of a diffusers folder."""


def qwen_tokenizer():
    """A tokenizer of Qwen's kind that reads bytes, with the form of its chat template."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    vocab = {letter: place for place, letter in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], pad_token="<|endoftext|>", model_max_length=131072)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


def build_tiny_z_image(seed: int = 0, **transformer):
    """A base with a transformer of four layers and a language model as text encoder, 64 x 64 images, random weights.

    Args:
        transformer: other settings of the transformer.
    """
    from controlkit.bases.z_image import ZImage

    torch.manual_seed(seed)
    configurations = {**Z_IMAGE_PARTS, "transformer": {**Z_IMAGE_PARTS["transformer"], **transformer}}
    parts = {one.name: one.build(configurations[one.name]) for one in ZImage.components if one.is_network}
    for name in ("x_pad_token", "cap_pad_token"):
        torch.nn.init.normal_(getattr(parts["transformer"], name))
    return ZImage(name="tiny-z-image", scheduler_config=Z_IMAGE_PARTS["scheduler"], tokenizer=qwen_tokenizer(), **parts)


SANA_PARTS = {
    "transformer": {
        "in_channels": 8,
        "out_channels": 8,
        "num_attention_heads": 4,
        "attention_head_dim": 8,
        "num_layers": 4,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 16,
        "cross_attention_dim": 32,
        "caption_channels": 16,
        "mlp_ratio": 2.0,
        "sample_size": 8,
        "patch_size": 1,
    },
    "vae": {
        "latent_channels": 8,
        "attention_head_dim": 8,
        "encoder_block_types": ["ResBlock", "ResBlock", "EfficientViTBlock", "EfficientViTBlock"],
        "decoder_block_types": ["ResBlock", "ResBlock", "EfficientViTBlock", "EfficientViTBlock"],
        "encoder_block_out_channels": [8, 8, 16, 16],
        "decoder_block_out_channels": [8, 8, 16, 16],
        "encoder_layers_per_block": [1, 1, 1, 1],
        "decoder_layers_per_block": [1, 1, 1, 1],
        "encoder_qkv_multiscales": [[], [], [3], [3]],
        "decoder_qkv_multiscales": [[], [], [3], [3]],
        "downsample_block_type": "Conv",
        "upsample_block_type": "interpolate",
        "decoder_norm_types": "rms_norm",
        "decoder_act_fns": "silu",
        "scaling_factor": 0.41407,
    },
    "text_encoder": {
        "vocab_size": 300,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 4096,
        "max_position_embeddings": 4096,
    },
    "scheduler": {
        "num_train_timesteps": 1000,
        "flow_shift": 3.0,
        "use_flow_sigmas": True,
        "prediction_type": "flow_prediction",
    },
}
"""The parts of a tiny Sana, under the names of a diffusers folder."""


def gemma_tokenizer():
    """A tokenizer of Gemma's kind that reads bytes."""
    from tokenizers.processors import TemplateProcessing
    from transformers import GemmaTokenizer

    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = GemmaTokenizer(vocab={word: place for place, word in enumerate(words)}, merges=[])
    first = [("<bos>", words.index("<bos>"))]
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=first)
    return tokenizer


def build_tiny_sana(seed: int = 0, **transformer):
    """A Sana with a transformer of four blocks, 64 x 64 images, random weights.

    Args:
        transformer: other settings of the transformer.
    """
    from controlkit.bases.sana import Sana

    torch.manual_seed(seed)
    configurations = {**SANA_PARTS, "transformer": {**SANA_PARTS["transformer"], **transformer}}
    parts = {one.name: one.build(configurations[one.name]) for one in Sana.components if one.is_network}
    return Sana(name="tiny-sana", scheduler_config=SANA_PARTS["scheduler"], tokenizer=gemma_tokenizer(), **parts)


QWEN_IMAGE_PARTS = {
    "transformer": {
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 4,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "axes_dims_rope": [4, 4, 8],
    },
    "vae": {
        "base_dim": 8,
        "z_dim": 4,
        "dim_mult": [1, 1, 1, 2],
        "num_res_blocks": 1,
        "latents_mean": [-0.2, 0.1, 0.3, 0.0],
        "latents_std": [0.5, 0.8, 1.2, 0.9],
    },
    "text_encoder": {
        "text_config": {
            "vocab_size": 300,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 1024,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
        },
        "vision_config": {
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 16,
        },
    },
    "scheduler": {
        "num_train_timesteps": 1000,
        "shift": 1.0,
        "use_dynamic_shifting": True,
        "base_shift": 0.5,
        "max_shift": 0.9,
        "max_image_seq_len": 8192,
        "shift_terminal": 0.02,
    },
}
"""The parts of a tiny Qwen-Image, under the names of a diffusers folder."""


def build_tiny_qwen_image(seed: int = 0, **transformer):
    """A base with a transformer of four double blocks, a language model as text encoder and an autoencoder of video,
    random weights.

    Args:
        transformer: other settings of the transformer.
    """
    from controlkit.bases.qwen_image import QwenImage

    torch.manual_seed(seed)
    configurations = {**QWEN_IMAGE_PARTS, "transformer": {**QWEN_IMAGE_PARTS["transformer"], **transformer}}
    parts = {one.name: one.build(configurations[one.name]) for one in QwenImage.components if one.is_network}
    with torch.no_grad():
        # Else images are almost gray, and prompts have almost no effect on them.
        parts["vae"].decoder.conv_out.weight.mul_(12)
        for block in parts["transformer"].transformer_blocks:
            for weight in (block.img_mod[1].weight, block.txt_mod[1].weight, block.attn.to_out[0].weight):
                weight.mul_(10)
    scheduler = QWEN_IMAGE_PARTS["scheduler"]
    base = QwenImage(name="tiny-qwen-image", scheduler_config=scheduler, tokenizer=qwen_tokenizer(), **parts)
    base._own_size = 64  # which none of its configurations has
    return base


FLUX2_PARTS = {
    "transformer": {
        "in_channels": 16,
        "num_layers": 4,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 48,
        "timestep_guidance_channels": 16,
        "axes_dims_rope": [4, 4, 4, 4],
    },
    "vae": {
        "block_out_channels": [8, 8, 8, 16],
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": 64,
    },
    "scheduler": {"num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": True},
}
"""Parts of tiny models of FLUX.2, under the names of a diffusers folder."""
FLUX2_DEV_PARTS = {
    **FLUX2_PARTS,
    "text_encoder": {
        "text_config": {
            "model_type": "mistral",
            "vocab_size": 300,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 31,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "max_position_embeddings": 1024,
            "sliding_window": None,
        },
        "vision_config": {
            "model_type": "pixtral",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "head_dim": 8,
            "image_size": 28,
        },
    },
}
FLUX2_KLEIN_PARTS = {
    **FLUX2_PARTS,
    "transformer": {**FLUX2_PARTS["transformer"], "guidance_embeds": False},
    "text_encoder": {**Z_IMAGE_PARTS["text_encoder"], "num_hidden_layers": 28},
}


def mistral_tokenizer():
    """A tokenizer of Mistral's kind that reads bytes, with the form of its chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {letter: place for place, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bytes_of_text = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    bytes_of_text.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_of_text.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_of_text,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        model_max_length=131072,
        additional_special_tokens=["[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]", "[IMG]"],
    )
    tokenizer.chat_template = (
        "{{ bos_token }}{% for message in messages %}{% set text = message.content[0].text %}"
        "{% if message.role == 'system' %}[SYSTEM_PROMPT]{{ text }}[/SYSTEM_PROMPT]"
        "{% else %}[INST]{{ text }}[/INST]{% endif %}{% endfor %}"
    )
    return tokenizer


def build_tiny_flux2(seed: int = 0, *, text_layers: int = 31, **transformer):
    """A FLUX.2 dev with a transformer of four double and two single blocks, 64 x 64 images, random weights.

    Args:
        text_layers: layers of its text encoder.
        transformer: other settings of the transformer.
    """
    from controlkit.bases.flux2 import Flux2

    encoder = FLUX2_DEV_PARTS["text_encoder"]
    encoder = {**encoder, "text_config": {**encoder["text_config"], "num_hidden_layers": text_layers}}
    parts = {**FLUX2_DEV_PARTS, "text_encoder": encoder}
    return _build_flux2(Flux2, parts, mistral_tokenizer(), seed, transformer)


def build_tiny_flux2_klein(seed: int = 0, *, is_distilled: bool = False, text_layers: int = 28, **transformer):
    """A FLUX.2 klein of the same size."""
    from controlkit.bases.flux2 import Flux2Klein

    settings = {"is_distilled": is_distilled}
    encoder = {**FLUX2_KLEIN_PARTS["text_encoder"], "num_hidden_layers": text_layers}
    parts = {**FLUX2_KLEIN_PARTS, "text_encoder": encoder}
    return _build_flux2(Flux2Klein, parts, qwen_tokenizer(), seed, transformer, **settings)


def _build_flux2(kind, parts, tokenizer, seed, transformer, **settings):
    torch.manual_seed(seed)
    configurations = {**parts, "transformer": {**parts["transformer"], **transformer}}
    networks = {one.name: one.build(configurations[one.name]) for one in kind.components if one.is_network}
    with torch.no_grad():
        # Else prompts have almost no effect on images.
        networks["transformer"].context_embedder.weight.mul_(4)
        for block in networks["transformer"].transformer_blocks:
            block.attn.to_out[0].weight.mul_(10)
        networks["vae"].bn.running_mean.normal_(0, 0.3)
        networks["vae"].bn.running_var.uniform_(0.3, 2)
    return kind(name="tiny-flux2", scheduler_config=parts["scheduler"], tokenizer=tokenizer, **networks, **settings)


def tiny_of_known(name: str):
    """The tiny base of the family of a known one."""
    builds = {
        "flux1": build_tiny_flux,
        "flux2-dev": build_tiny_flux2,
        "flux2-klein": build_tiny_flux2_klein,
        "z-image": build_tiny_z_image,
        "qwen-image": build_tiny_qwen_image,
        "sana": build_tiny_sana,
    }
    return next((build for start, build in builds.items() if name.startswith(start)), build_tiny_sd3)()


def parts_of(base):
    """Arguments of diffusers' pipeline of a rectified flow."""
    parts = {one.name: getattr(base, one.name) for one in base.components if not one.is_scheduler}
    scheduler = next(one for one in base.components if one.is_scheduler)
    return {**parts, "scheduler": scheduler.load_class()(**base.scheduler_config)}


def saved_pipeline(base, folder):
    """A Stable Diffusion 3 or a FLUX.1 as diffusers' folder."""
    import diffusers

    getattr(diffusers, base.pipeline)(**parts_of(base)).save_pretrained(folder)
    return folder
