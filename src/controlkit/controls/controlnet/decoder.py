"""The base's decoder, trained along with a ControlNet (`sd_locked: false`).

lllyasviel/ControlNet, cldm/cldm.py, `configure_optimizers`: with `sd_locked` false, the UNet's `output_blocks` and
`out` train as well; encoder, middle block and time embedding stay frozen. Here they are a copy that belongs to the
control, so that the base is unchanged and one file holds all that was trained.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from controlkit.controls.encoder_copy.names import RESNET_NAMES
from controlkit.controls.encoder_copy.network import with_heads

PREFIX = "unet_decoder."
"""Prefix of its tensors in a control's file; the rest of a name is diffusers' in the UNet."""
MODULES = ("up_blocks", "conv_norm_out", "conv_out")
"""Its paths in diffusers' UNet."""
_SHARED = (
    "in_channels",
    "flip_sin_to_cos",
    "freq_shift",
    "down_block_types",
    "mid_block_type",
    "only_cross_attention",
    "block_out_channels",
    "layers_per_block",
    "downsample_padding",
    "mid_block_scale_factor",
    "act_fn",
    "norm_num_groups",
    "norm_eps",
    "cross_attention_dim",
    "transformer_layers_per_block",
    "attention_head_dim",
    "num_attention_heads",
    "use_linear_projection",
    "upcast_attention",
    "resnet_time_scale_shift",
)
"""Settings that diffusers' ControlNet and UNet have in common and a decoder depends on."""


def decoder_of(unet: UNet2DConditionModel) -> nn.ModuleDict:
    """A copy of a UNet's decoder, by its paths in the UNet."""
    return nn.ModuleDict({path: copy.deepcopy(getattr(unet, path)) for path in MODULES})


def decoder_for(config: Mapping[str, Any]) -> nn.ModuleDict:
    """The decoder, with random weights, of the UNet that a ControlNet of `config` copies.

    It mirrors the encoder, as in every Stable Diffusion; `decoder_shapes` tells whether a UNet's does.
    """
    settings = {key: value for key, value in with_heads(config).items() if key in _SHARED}
    mirrored = [kind.replace("Down", "Up") for kind in reversed(config["down_block_types"])]
    unet = UNet2DConditionModel(**settings, out_channels=settings["in_channels"], up_block_types=mirrored)
    return nn.ModuleDict({path: getattr(unet, path) for path in MODULES})


def decoder_shapes(config: Mapping[str, Any]) -> dict[str, torch.Size]:
    """Names (without the prefix) and shapes of the tensors of `decoder_for(config)`."""
    with torch.device("meta"):
        return shapes_of_decoder(decoder_for(config))


def shapes_of_decoder(modules: nn.ModuleDict | UNet2DConditionModel) -> dict[str, torch.Size]:
    """Names and shapes of a decoder's tensors, from the decoder or its UNet."""
    return {name: value.shape for name, value in modules.state_dict().items() if name.partition(".")[0] in MODULES}


def original_names(names: Collection[str]) -> dict[str, str]:
    """diffusers' name of each of a decoder's tensors -> the original code's (`output_blocks.*`, `out.*`).

    Args:
        names: of all its tensors, from which the number of layers of each block follows.

    Raises:
        ValueError: they are not those of a UNet's decoder.
    """
    parts = [_PART.fullmatch(name) for name in names]
    layers = {(int(match["block"]), int(match["layer"])) for match in parts if match and match["part"] == "resnets"}
    numbers = {place: number for number, place in enumerate(sorted(layers))}
    last = {block: max(layer for other, layer in layers if other == block) for block, _ in layers}
    attended = {int(match["block"]) for match in parts if match and match["part"] == "attentions"}
    renamed: dict[str, str] = {}
    for name, match in zip(names, parts, strict=True):
        if match is None:
            path, _, rest = name.partition(".")
            if path not in _LAST:
                raise ValueError(f"{name} is no tensor of a UNet's decoder")
            renamed[name] = f"{_LAST[path]}.{rest}"
            continue
        block, part, rest = int(match["block"]), match["part"], match["rest"]
        layer = last.get(block, 0) if part == "upsamplers" else int(match["layer"])
        if (block, layer) not in numbers:
            raise ValueError(f"{name} belongs to no layer of a UNet's decoder")
        if part == "resnets":
            inner, _, tail = rest.partition(".")
            rest = f"0.{RESNET_NAMES[inner]}.{tail}"
        else:
            rest = f"{1 if part == 'attentions' or block not in attended else 2}.{rest}"
        renamed[name] = f"output_blocks.{numbers[block, layer]}.{rest}"
    return renamed


_PART = re.compile(r"up_blocks\.(?P<block>\d+)\.(?P<part>resnets|attentions|upsamplers)\.(?P<layer>\d+)\.(?P<rest>.+)")
_LAST = {"conv_norm_out": "out.0", "conv_out": "out.2"}


def is_original_name(name: str) -> bool:
    """Whether the original code's name of a UNet's tensor is one of its decoder."""
    return name.startswith(("output_blocks.", "out."))


def split(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors of a control's file => those of the control, and those of the decoder without their prefix."""
    decoder = {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}
    return {name: value for name, value in state.items() if not name.startswith(PREFIX)}, decoder
