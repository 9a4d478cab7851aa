"""Networks that copy a UNet's encoder, their configs, and the bases that they fit."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from diffusers import ControlNetModel, UNet2DConditionModel

from controlkit.bases.base import Base
from controlkit.bases.unet import ARCHITECTURES, layers_of
from controlkit.errors import UserError

HEADS = "attention_head_dim"
"""The one setting of a network that the shapes of its tensors do not determine."""
HINT_CHANNELS = {2: (16, 32), 4: (16, 32, 64), 8: (16, 32, 96, 256), 16: (16, 32, 96, 256, 256)}
"""Downsampling factor of the autoencoder -> channels of a hint network with the same factor (at 8 as in
lllyasviel/ControlNet, cldm/cldm.py)."""
HINT_SETTINGS = (
    "conditioning_channels",
    "conditioning_embedding_out_channels",
    "controlnet_conditioning_channel_order",
    "global_pool_conditions",
)
"""Settings of diffusers' network that concern its hint network."""


def copied_encoder(unet: UNet2DConditionModel, **options: Any) -> ControlNetModel:
    """diffusers' `ControlNetModel.from_unet`, also of a UNet that embeds the guidance scale; its copy does not."""
    embedding = unet.time_embedding
    projection, embedding.cond_proj = embedding.cond_proj, None
    try:
        return ControlNetModel.from_unet(unet, **options)
    finally:
        embedding.cond_proj = projection


def hint_channels_for(base: Base, title: str) -> tuple[int, ...]:
    """Channels of a hint network with the downsampling factor of the base's autoencoder.

    Args:
        title: of the control, for errors.

    Raises:
        UserError: none is known.
    """
    if base.factor not in HINT_CHANNELS:
        known = ", ".join(map(str, HINT_CHANNELS))
        raise UserError(
            f"{title} has no hint network for {base.name}: the autoencoder downsamples by {base.factor},"
            f" expected {known}",
            "incompatible",
        )
    return HINT_CHANNELS[base.factor]


def hint_incompatibility(channels: Sequence[int], base: Base) -> str | None:
    """`Control.incompatibility` of a hint network.

    Args:
        channels: of its stages; each but the first halves the image.
    """
    factor = 2 ** (len(channels) - 1)
    if factor == base.factor:
        return None
    return f"its hint network divides the image by {factor}, the base's autoencoder by {base.factor}"


def network_of(config: Mapping[str, Any]) -> ControlNetModel:
    """Encoder and middle block with random weights, from a UNet's config or a copy's."""
    known = inspect.signature(ControlNetModel.__init__).parameters
    settings = {key: value for key, value in config.items() if key in known and key not in HINT_SETTINGS}
    return ControlNetModel(**settings)


def plain_config(network: Any) -> dict[str, Any]:
    """A diffusers network's config without private entries."""
    return {key: value for key, value in network.config.items() if not key.startswith("_")}


def has_heads(config: Mapping[str, Any]) -> bool:
    """Whether a config has the number of attention heads."""
    return config.get(HEADS) is not None or config.get("num_attention_heads") is not None


def missing_heads(config: Mapping[str, Any]) -> str | None:
    """`Control.missing_setting` of such a network."""
    return None if has_heads(config) else "how many attention heads its network has"


def with_heads(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with some number of heads, for results that do not depend on it, such as shapes."""
    # Each block's channels must be a multiple of it.
    return dict(config) if has_heads(config) else {**config, HEADS: math.gcd(*config["block_out_channels"])}


def checked_config(config: Any) -> dict[str, Any]:
    """A config as a dict.

    Raises:
        ValueError: it is not a mapping; diffusers would look up a string on the hub.
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
        own = config.get(key)
        # Inpainting models take more channels; controls do not read those.
        of_base = base.latent_channels if key == "in_channels" else base.unet.config.get(key)
        if json.dumps(own) != json.dumps(of_base):
            return f"its {what}: {own}, the base's: {of_base}"
    own, of_base = layers_of(config), layers_of(base.unet.config)
    if own != of_base:
        return f"its layers of each block: {own}, the base's: {of_base}"
    return None


def base_needed(config: Mapping[str, Any]) -> str:
    """The base that it needs, as text."""
    width = config["cross_attention_dim"]
    family = f" ({ARCHITECTURES[width]})" if width in ARCHITECTURES else ""
    channels = ", ".join(map(str, config["block_out_channels"]))
    return f"a base whose UNet has {channels} channels and reads text of width {width}{family}"
