"""The network itself, and which bases it is of."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from typing import Any

from diffusers import ControlNetModel

from controlkit.bases.base import Base
from controlkit.bases.unet import ARCHITECTURES, layers_of

HEADS = "attention_head_dim"
"""The one setting of a network that the shapes of its tensors do not tell."""
HINT_CHANNELS = {2: (16, 32), 4: (16, 32, 64), 8: (16, 32, 96, 256), 16: (16, 32, 96, 256, 256)}
"""Pixels of an image to one of its latent -> channels of a hint network that divides as much (at 8 as in
lllyasviel/ControlNet, cldm/cldm.py)."""
HINT_SETTINGS = (
    "conditioning_channels",
    "conditioning_embedding_out_channels",
    "controlnet_conditioning_channel_order",
    "global_pool_conditions",
)
"""Settings of diffusers' network that are about its hint network."""


def network_of(config: Mapping[str, Any]) -> ControlNetModel:
    """Encoder and middle, with fresh weights, of the UNet of `config` (its own, or that of a copy)."""
    known = inspect.signature(ControlNetModel.__init__).parameters
    kept = {key: value for key, value in config.items() if key in known and key not in HINT_SETTINGS}
    return ControlNetModel(**kept)


def plain_config(network: Any) -> dict[str, Any]:
    """The config of a network of diffusers, without what diffusers adds."""
    return {key: value for key, value in network.config.items() if not key.startswith("_")}


def says_heads(config: Mapping[str, Any]) -> bool:
    """Whether a config says how many attention heads there are."""
    return config.get(HEADS) is not None or config.get("num_attention_heads") is not None


def missing_heads(config: Mapping[str, Any]) -> str | None:
    """`Control.missing_setting` of such a network."""
    return None if says_heads(config) else "how many attention heads its network has"


def with_heads(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with some number of heads, for what does not depend on it, such as shapes."""
    return dict(config) if says_heads(config) else {**config, HEADS: config["block_out_channels"][0]}


def checked_config(config: Any) -> dict[str, Any]:
    """The config, if it is a mapping.

    Raises:
        ValueError: it is something else; diffusers takes a string for the name of a model and looks for it on the hub.
    """
    if not isinstance(config, Mapping):
        raise ValueError(f"the config is not a mapping but {config!r}")
    return dict(config)


def copy_incompatibility(config: Mapping[str, Any], base: Base) -> str | None:
    """`Control.incompatibility` of a network of `config`."""
    for key, what in (
        ("in_channels", "latent channels"),
        ("block_out_channels", "channels"),
        ("cross_attention_dim", "text width"),
    ):
        mine, theirs = config.get(key), base.unet.config.get(key)
        if json.dumps(mine) != json.dumps(theirs):
            return f"its {what}: {mine}, the base's: {theirs}"
    mine, theirs = layers_of(config), layers_of(base.unet.config)
    if mine != theirs:
        return f"its layers of each block: {mine}, the base's: {theirs}"
    return None


def base_needed(config: Mapping[str, Any]) -> str:
    """The base that it needs, in words."""
    width = config["cross_attention_dim"]
    family = f" ({ARCHITECTURES[width]})" if width in ARCHITECTURES else ""
    channels = ", ".join(map(str, config["block_out_channels"]))
    return f"a base whose UNet has {channels} channels and reads text of width {width}{family}"
