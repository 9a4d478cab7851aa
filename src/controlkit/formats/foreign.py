"""What else people bring: files that are no control, or one that is not read, told by their names and shapes."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from torch import Tensor

_TEXT_WIDTHS = ((768,), (1024,), (1280,))

CLASSES = {
    "UNetControlNetXSModel": "a UNet with a ControlNet-XS grown into it; a folder of the adapter alone is recognised",
    "ControlNetUnionModel": "a ControlNet Union (several conditions in one network), which is not read",
    "MultiAdapter": "several T2I-Adapters in one folder; give one of them",
    "UNet2DConditionModel": "a UNet (UNet2DConditionModel): part of a base, not a control",
    "AutoencoderKL": "an autoencoder: part of a base, not a control",
}
"""Class of a diffusers folder that is no control which is read -> what it is."""

_Test = Callable[[Collection[str]], bool]


@dataclass(frozen=True)
class _Rule:
    says: str
    test: _Test


def _has(*patterns: str) -> _Test:
    """A test that some name matches each of these patterns, from its beginning."""
    compiled = [re.compile(pattern) for pattern in patterns]
    return lambda names: all(any(pattern.match(name) for name in names) for pattern in compiled)


def _only(pattern: str) -> _Test:
    """A test that every name matches."""
    compiled = re.compile(pattern)
    return lambda names: bool(names) and all(compiled.match(name) for name in names)


_RELATIVES = (
    _Rule("a fuser of CoAdapters, which is not read", _has("spatial_feat_mapping", "task_embedding")),
    _Rule(
        "a ControlNet Union (several conditions in one network), which is not read",
        _has("task_embedding|.*control_add_embedding\\."),
    ),
    _Rule(
        "a ControlNet-XS in its original layout; only diffusers' folder of one is recognised",
        _has(".*enc_zero_convs_(in|out)"),
    ),
    _Rule("a UniControl checkpoint, which is not read", _has(".*(task_id_(hyper|layer)net|hint_block_list_moe)")),
    _Rule("a Uni-ControlNet checkpoint, which is not read", _has(".*(local|global)_(adapter|control)\\.")),
    _Rule("a ControlNet-LLLite, which is not read", _has(".*lllite")),
    _Rule(
        "a ControlNet of a diffusion transformer (SD3, Flux or a relative), which is not read",
        _has("controlnet_(blocks|x_embedder|single_blocks)|.*controlnet_blocks"),
    ),
    _Rule("a style adapter of the T2I-Adapter family, which is not read", _has("style_embedding", "transformer_layes")),
)
_RULES = (
    _Rule(
        "an IP-Adapter, which steers by a reference image through the base's attention",
        _has("(image_proj|ip_adapter)(\\.|$)"),
    ),
    _Rule("GLIGEN layers, which ground text in boxes", _has(".*position_net\\.", ".*fuser\\.")),
    _Rule("a motion module of AnimateDiff", _has(".*motion_modules\\.")),
    # LoRA before whole networks: its names contain theirs.
    _Rule(
        "a LoRA for the UNet, which changes the base and steers nothing",
        _has("(lora_unet_|unet\\..*lora|base_model\\.model\\.unet|lycoris_)"),
    ),
    _Rule("a LoRA for the text encoder", _has("(lora_te|text_encoder(_\\d)?\\..*lora)")),
    _Rule(
        "a LoRA for a diffusion transformer",
        _has("(diffusion_model|transformer)\\..*lora|.*(double|single)_blocks.*lora"),
    ),
    _Rule("a LoRA, of no network that is known here", _has(".*lora[._]?(A|B|up|down|layer)\\b")),
    # Bases.
    _Rule(
        "a whole Stable Diffusion XL checkpoint: a base, not a control",
        _has("model\\.diffusion_model\\.input_blocks", "conditioner\\.embedders"),
    ),
    _Rule(
        "a whole Stable Diffusion checkpoint: a base, not a control",
        _has("model\\.diffusion_model\\.input_blocks", "(first_stage_model|cond_stage_model)\\."),
    ),
    _Rule(
        "a Stable Diffusion UNet without a control",
        _has("(model\\.diffusion_model\\.)?input_blocks\\.", "(model\\.diffusion_model\\.)?output_blocks\\."),
    ),
    _Rule(
        "a UNet in diffusers' names: part of a base, not a control",
        _has("down_blocks\\.", "up_blocks\\.", "conv_norm_out\\.", "mid_block\\.", "time_embedding\\."),
    ),
    _Rule(
        "a diffusion transformer (SD3, Flux or a relative): a base, not a control",
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
    # Small things.
    _Rule(
        "a textual inversion (learned words for the text encoder)",
        _has("(string_to_param|string_to_token|emb_params|clip_[gl]|<.*>)$"),
    ),
    _Rule(
        "the state of an optimizer or of a training run, not its weights",
        _has("(optimizer|optimizer_states|param_groups|exp_avg|state)(\\.|$)"),
    ),
    _Rule("an upscaler or another network of convolutions", _only("(model|body|conv_|upconv|HRconv|RRDB)")),
)


def relative(names: Collection[str]) -> str | None:
    """What a file is if it is a relative of the controls that are read, with which it shares names."""
    return next((rule.says for rule in _RELATIVES if rule.test(names)), None)


def seems(tensors: Mapping[str, Tensor], others: Collection[str]) -> str:
    """What a file seems to hold that is no control, in a few words that follow "it seems to be".

    Args:
        others: names of entries that are no tensors.
    """
    names = [*tensors, *others]
    for rule in _RULES:
        if rule.test(names):
            return rule.says
    if len(tensors) == 1 and next(iter(tensors.values())).shape[-1:] in _TEXT_WIDTHS:
        return "a textual inversion (learned words for the text encoder)"
    if not names:
        return "nothing: it has no tensors"
    kinds = f"{len(tensors)} tensors" if tensors else "no tensors"
    return f"nothing that is known here ({kinds}, such as {min(names)})"
