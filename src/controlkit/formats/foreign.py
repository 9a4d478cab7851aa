"""Identify files that are not supported controls (LoRAs, base models, IP-Adapters, ...) so that errors can name
them."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from torch import Tensor

_TEXT_WIDTHS = ((768,), (1024,), (1280,))

CLASSES = {
    "UNetControlNetXSModel": "a UNet fused with a ControlNet-XS; only a folder of the adapter alone is supported",
    "MultiAdapter": "several T2I-Adapters in one folder; pass one of them",
    "UNet2DConditionModel": "a UNet (UNet2DConditionModel): part of a base, not a control",
    "AutoencoderKL": "an autoencoder: part of a base, not a control",
}
"""Class of a diffusers folder that is not a supported control -> description."""

_Test = Callable[[Collection[str]], bool]


@dataclass(frozen=True)
class _Rule:
    description: str
    test: _Test


def _has(*patterns: str) -> _Test:
    """Test that each pattern matches the beginning of some name."""
    compiled = [re.compile(pattern) for pattern in patterns]
    return lambda names: all(any(pattern.match(name) for name in names) for pattern in compiled)


def _only(pattern: str) -> _Test:
    """Test that the pattern matches every name."""
    compiled = re.compile(pattern)
    return lambda names: bool(names) and all(compiled.match(name) for name in names)


_UNSUPPORTED_CONTROLS = (
    _Rule("a fuser of CoAdapters, which is not supported", _has("spatial_feat_mapping", "task_embedding")),
    _Rule(
        "a ControlNet Union under the original code's names; only diffusers' names are supported",
        _has(".*control_add_embedding\\.", ".*input_blocks\\."),
    ),
    _Rule(
        "a ControlNet-XS in its original layout; only diffusers' folder is supported",
        _has(".*enc_zero_convs_(in|out)"),
    ),
    _Rule(
        "a ControlNet-LLLite of another network than a UNet (Anima), which is not supported",
        _has(".*lllite_(?!unet_)"),
    ),
    _Rule(
        "a style adapter of the T2I-Adapter family, which is not supported",
        _has("style_embedding", "transformer_layes"),
    ),
)
_RULES = (
    _Rule(
        "a Sana with its control in one file, as NVIDIA's, which is not supported; diffusers' folder of the control is",
        _has(".*\\.copied_block\\."),
    ),
    _Rule(
        "a ControlNet of a diffusion transformer (HunyuanDiT or similar, or FLUX.1 under XLabs' original names), which"
        " is not supported; of Stable Diffusion 3, FLUX.1, Z-Image, Qwen-Image and Sana those in diffusers' format are,"
        " of FLUX.2 and Qwen-Image alibaba-pai's",
        _has("controlnet_(blocks|x_embedder|single_blocks)|.*controlnet_blocks"),
    ),
    _Rule(
        "an IP-Adapter, which conditions on a reference image through cross attention",
        _has("(image_proj|ip_adapter)(\\.|$)"),
    ),
    _Rule(
        "GLIGEN layers of other inputs than boxes with phrases (images, keypoints, maps), which are not supported",
        _has(".*position_net\\.", ".*fuser\\."),
    ),
    _Rule("a motion module of AnimateDiff", _has(".*motion_modules\\.")),
    # LoRA before whole networks: its names contain theirs.
    _Rule("a LoHa or LoKr (LyCORIS): it changes the base and is not supported", _has(".*\\.(hada|lokr)_w[12]")),
    _Rule(
        "a LoRA for the UNet: it changes the base and is not a control (pass it with --lora)",
        _has("(lora_unet_|unet\\..*lora|base_model\\.model\\.unet|lycoris_)"),
    ),
    _Rule("a LoRA for the text encoder", _has("(lora_te|text_encoder(_\\d)?\\..*lora)")),
    _Rule(
        "a LoRA for a diffusion transformer",
        _has("(diffusion_model|transformer)\\..*lora|.*(double|single)_blocks.*lora"),
    ),
    _Rule("a LoRA for an unknown network", _has(".*lora[._]?(A|B|up|down|layer)\\b")),
    # Bases.
    _Rule(
        "a full Stable Diffusion XL checkpoint: a base, not a control",
        _has("model\\.diffusion_model\\.input_blocks", "conditioner\\.embedders"),
    ),
    _Rule(
        "a full Stable Diffusion checkpoint: a base, not a control",
        _has("model\\.diffusion_model\\.input_blocks", "(first_stage_model|cond_stage_model)\\."),
    ),
    _Rule(
        "a Stable Diffusion UNet without a control",
        _has("(model\\.diffusion_model\\.)?input_blocks\\.", "(model\\.diffusion_model\\.)?output_blocks\\."),
    ),
    _Rule(
        "a UNet with diffusers' names: part of a base, not a control",
        _has("down_blocks\\.", "up_blocks\\.", "conv_norm_out\\.", "mid_block\\.", "time_embedding\\."),
    ),
    _Rule(
        "a diffusion transformer (SD3, FLUX or similar): a base, not a control",
        _has("(model\\.diffusion_model\\.)?(double_blocks|joint_blocks|(single_)?transformer_blocks)\\."),
    ),
    _Rule(
        "an autoencoder (VAE): part of a base, not a control",
        _has("(first_stage_model\\.)?encoder\\.", "(first_stage_model\\.)?decoder\\.(conv_in|mid|up)"),
    ),
    _Rule("an image encoder (CLIP vision)", _has("(vision_model|visual)\\.")),
    _Rule(
        "a text encoder: part of a base, not a control",
        _has("(cond_stage_model\\..*)?(text_model|transformer)\\.|encoder\\.block\\.|embeddings\\.token_embedding"),
    ),
    # Others.
    _Rule(
        "a textual inversion (learned token embeddings; pass it with --embedding)",
        _has("(string_to_param|string_to_token|emb_params|clip_[gl]|<.*>)$"),
    ),
    _Rule(
        "an optimizer or training state, without weights",
        _has("(optimizer|optimizer_states|param_groups|exp_avg|state)(\\.|$)"),
    ),
    _Rule("an upscaler or another convolutional network", _only("(model|body|conv_|upconv|HRconv|RRDB)")),
)


def unsupported_control(names: Collection[str]) -> str | None:
    """Describes a control of an unsupported kind, which shares names with supported ones; None otherwise."""
    return next((rule.description for rule in _UNSUPPORTED_CONTROLS if rule.test(names)), None)


def identify(tensors: Mapping[str, Tensor], others: Collection[str]) -> str:
    """Describes a file that is not a control, to follow "it appears to be".

    Args:
        others: names of entries that are not tensors.
    """
    names = [*tensors, *others]
    for rule in _RULES:
        if rule.test(names):
            return rule.description
    if len(tensors) == 1 and next(iter(tensors.values())).shape[-1:] in _TEXT_WIDTHS:
        return "a textual inversion (learned token embeddings; pass it with --embedding)"
    if not names:
        return "empty: it has no tensors"
    count = f"{len(tensors)} tensors" if tensors else "no tensors"
    return f"unknown ({count}, such as {min(names)})"
