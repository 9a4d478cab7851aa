"""Floating-point operations of one call, counted on the meta device: no weights, no memory, seconds.

A multiplication and an addition count as two, as torch's own counter has it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, T2IAdapter, UNet2DConditionModel
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding
from torch.utils.flop_counter import FlopCounterMode

from controlkit.controls.base_control import network_of

_TOKENS = 77


def unet_flops(config: Mapping[str, Any], height: int, width: int) -> int:
    """Of a UNet for one latent of `height` x `width`."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**_plain(config))
        x, inputs = _inputs(config, height, width)
    return _count(lambda: unet(x, 1, **inputs))


def call_flops(config: Mapping[str, Any], height: int, width: int) -> int:
    """Of one call of a control that copies a UNet's encoder, for one latent, without its hint network.

    Args:
        config: the UNet's, or the control's own.
    """
    with torch.device("meta"):
        control = network_of(config)
        x, inputs = _inputs({"in_channels": 4, **config}, height, width)
        hint = torch.empty(1, config["block_out_channels"][0], height, width)
    control.controlnet_cond_embedding = torch.nn.Identity()
    return _count(lambda: control(x, 1, controlnet_cond=hint, **inputs))


def hint_flops(channels: Sequence[int], into: int, height: int, width: int) -> int:
    """Of a ControlNet's hint network for one condition image of `height` x `width` pixels.

    Args:
        channels: of its convolutions, such as 16, 32, 96, 256.
        into: channels of the latent that it is added to.
    """
    with torch.device("meta"):
        network = ControlNetConditioningEmbedding(into, 3, tuple(channels))
        image = torch.empty(1, 3, height, width)
    return _count(lambda: network(image))


def adapter_flops(config: Mapping[str, Any], height: int, width: int) -> int:
    """Of diffusers' `T2IAdapter` of `config` for one condition image of `height` x `width` pixels."""
    with torch.device("meta"):
        network = T2IAdapter(**_plain(config))
        image = torch.empty(1, config["in_channels"], height, width)
    return _count(lambda: network(image))


def encode_flops(config: Mapping[str, Any], height: int, width: int) -> int:
    """Of an autoencoder that encodes one picture of `height` x `width` pixels."""
    with torch.device("meta"):
        vae = AutoencoderKL(**_plain(config))
        picture = torch.empty(1, 3, height, width)
    return _count(lambda: vae.encode(picture))


def _count(run: Callable[[], Any]) -> int:
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        run()
    return counter.get_total_flops()


def _inputs(config: Mapping[str, Any], height: int, width: int) -> tuple[torch.Tensor, dict[str, Any]]:
    """A latent, and what the network is told besides it."""
    inputs: dict[str, Any] = {"encoder_hidden_states": torch.empty(1, _TOKENS, config["cross_attention_dim"])}
    if config.get("addition_embed_type") == "text_time":
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        inputs["added_cond_kwargs"] = {"text_embeds": torch.empty(1, pooled), "time_ids": torch.empty(1, 6)}
    return torch.empty(1, config["in_channels"], height, width), inputs


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith("_")}
