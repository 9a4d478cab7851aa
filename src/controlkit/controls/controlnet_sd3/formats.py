"""Files of ControlNets for Stable Diffusion 3: configs from shapes, and those of Stability AI.

Stability AI's own ControlNets for Stable Diffusion 3.5 have blocks over the image alone, and their files lack the
position embedding, which is the base's (Stability-AI/sd3.5, sd3_impls.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from diffusers import SD3ControlNetModel
from torch import Tensor

from controlkit.controls.control import Control
from controlkit.controls.file_format import (
    CONFIG_ERRORS,
    Checkpoint,
    FileFormat,
    Reference,
    TensorFile,
    check_names,
    on_one_line,
)
from controlkit.errors import UserError

HEAD_WIDTH = 64
"""Channels of an attention head in all Stable Diffusion 3."""
ZEROS = "force_zeros_for_pooled_projection"
"""diffusers' setting: whether zeros take the place of the pooled prompt."""


def _is_of_stability(tensors: Collection[str]) -> bool:
    """Whether names are those of Stability AI's files; diffusers' differ within the blocks."""
    return {"pos_embed_input.proj.weight", "transformer_blocks.0.adaLN_modulation.1.weight"} <= set(tensors)


def _detect_stability(file: TensorFile) -> str | None:
    return "a ControlNet of Stability AI for Stable Diffusion 3.5" if _is_of_stability(file.tensors) else None


def _lacks_positions(config: Mapping[str, Any]) -> bool:
    return config.get("_class_name") == SD3ControlNetModel.__name__ and config.get("use_pos_embed") is False


def _read_folder(kind: type[Control], file: TensorFile, reference: Reference, description: str) -> Checkpoint:
    """diffusers' folder without the position embedding, which its pipeline takes from the base, too."""
    config = {key: value for key, value in file.config.items() if not key.startswith("_")}
    return _with_positions(kind, file, dict(file.tensors), config, reference, description)


def _read_stability(kind: type[Control], file: TensorFile, reference: Reference, description: str) -> Checkpoint:
    tensors = dict(file.tensors)
    which = tensors.pop("control_type", None)
    try:
        own = _from_stability(tensors)
        config = {**config_of(own), ZEROS: False}
    except CONFIG_ERRORS as error:
        raise UserError(f"{file.path} looks like {description}, but {on_one_line(error)}", "damaged-file") from error
    checkpoint = _with_positions(kind, file, own, config, reference, description)
    condition = None if which is None else _STABILITY_CONDITIONS.get(round(float(which)))
    if condition is not None:
        checkpoint.metadata.setdefault("control.condition", condition)
        kind.settle_checkpoint(checkpoint, ())
    return checkpoint


_STABILITY_CONDITIONS = {0: "blur", 1: "canny", 2: "depth_midas"}
"""Value of `control_type` in a file -> condition (ComfyUI, comfy/controlnet.py, `load_controlnet_sd35`)."""
_STABILITY_NAMES = {
    "attn.proj": "attn.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
}
_IN_BLOCK = re.compile(r"(transformer_blocks\.\d+)\.(.+)\.(weight|bias)")


def _from_stability(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under Stability AI's names => under diffusers'; others keep their names.

    (diffusers, scripts/convert_sd3_controlnet_to_diffusers.py.)
    """
    own: dict[str, Tensor] = {}
    for name, value in tensors.items():
        match = _IN_BLOCK.fullmatch(name)
        if match is None:
            own[name] = value
        elif match[2] == "attn.qkv":
            for which, part in zip("qkv", value.chunk(3), strict=True):
                own[f"{match[1]}.attn.to_{which}.{match[3]}"] = part
        else:
            own[f"{match[1]}.{_STABILITY_NAMES.get(match[2], match[2])}.{match[3]}"] = value
    return own


def _with_positions(
    kind: type[Control],
    file: TensorFile,
    tensors: dict[str, Tensor],
    config: dict[str, Any],
    reference: Reference,
    description: str,
) -> Checkpoint:
    """The checkpoint of a file without a position embedding, completed by that of the base.

    Raises:
        UserError: there is no base of this family, or names or shapes do not fit.
    """
    base_config, weights = reference.transformer_config, reference.transformer_weights
    if base_config is None or weights is None:
        raise UserError(
            f"{file.path} is {description}, which shares the position embedding of its base; pass that base with its"
            " weights (--base)",
            "missing-setting",
        )
    shared = ("sample_size", "patch_size", "in_channels", "pos_embed_max_size")
    config |= {**{name: base_config[name] for name in shared}, "use_pos_embed": True, "pos_embed_type": "sincos"}
    dtype = next(iter(tensors.values())).dtype
    tensors |= {name: value.to(dtype) for name, value in weights.items() if name.startswith("pos_embed.")}
    try:
        expected = kind.shapes(config)
    except CONFIG_ERRORS as error:
        raise UserError(f"{file.path} looks like {description}, but {on_one_line(error)}", "damaged-file") from error
    check_names(file.path, description, expected, tensors, file.others)
    checkpoint = Checkpoint(kind.kind, config, tensors, dict(file.metadata), path=file.path)
    checkpoint.notes.append("its position embedding is not in the file and comes from the base")
    return checkpoint


FORMATS = (
    FileFormat(
        name="diffusers-sd35",
        description="diffusers' folder of Stability AI's ControlNets, without a position embedding",
        detect=lambda file: "a ControlNet for Stable Diffusion 3.5 as diffusers' folder",
        read=_read_folder,
        files=("config.json", "diffusion_pytorch_model.safetensors"),
        of_config=_lacks_positions,
        needs_base=True,
    ),
    FileFormat(
        name="original",
        description="the names of Stability AI's files",
        detect=_detect_stability,
        read=_read_stability,
        needs_base=True,
    ),
)


def config_of(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The config of a network with diffusers' names, inferred from shapes.

    Raises:
        KeyError, ValueError: a tensor is missing, or the width is no multiple of `HEAD_WIDTH`.
    """
    width = tensors["controlnet_blocks.0.weight"].shape[0]
    if width % HEAD_WIDTH:
        raise ValueError(f"its width {width} is no multiple of {HEAD_WIDTH}, the channels of an attention head")
    latent = tensors.get("pos_embed.proj.weight", tensors["pos_embed_input.proj.weight"])
    context = tensors.get("context_embedder.weight")
    positions = tensors.get("pos_embed.pos_embed")
    layers = len([name for name in tensors if re.fullmatch(r"controlnet_blocks\.\d+\.weight", name)])
    return {
        "patch_size": latent.shape[2],
        "in_channels": latent.shape[1],
        "num_layers": layers,
        "attention_head_dim": HEAD_WIDTH,
        "num_attention_heads": width // HEAD_WIDTH,
        "joint_attention_dim": None if context is None else context.shape[1],
        "caption_projection_dim": width,
        "pooled_projection_dim": tensors["time_text_embed.text_embedder.linear_1.weight"].shape[1],
        "pos_embed_max_size": None if positions is None else math.isqrt(positions.shape[1]),
        "extra_conditioning_channels": tensors["pos_embed_input.proj.weight"].shape[1] - latent.shape[1],
        "dual_attention_layers": [
            layer for layer in range(layers) if f"transformer_blocks.{layer}.attn2.to_q.weight" in tensors
        ],
        "qk_norm": "rms_norm" if "transformer_blocks.0.attn.norm_q.weight" in tensors else None,
        ZEROS: True,
    }
