"""Bases with a UNet of diffusers, and where controls act on it: sites of residuals, and points of taps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from controlkit.bases.base import Base, Latents
from controlkit.bases.residuals import Residuals
from controlkit.bases.taps import Point, Taps
from controlkit.bases.text import CLIP_TOKENS, Text

ARCHITECTURES = {768: "stable-diffusion-v1", 1024: "stable-diffusion-v2", 2048: "stable-diffusion-xl-v1-base"}
"""Width of the text that a UNet's cross attention reads -> the base's family, under modelspec's names."""


class UNetBase(Base):
    """A base whose denoising network is a UNet with cross attention."""

    _unet: UNet2DConditionModel

    @property
    def unet(self) -> UNet2DConditionModel:
        """The denoising network."""
        return self._unet

    @unet.setter
    def unet(self, network: UNet2DConditionModel) -> None:
        self._unet = network

    @property
    def denoiser(self) -> UNet2DConditionModel:
        return self._unet

    @property
    def latents(self) -> Latents:
        """Its UNet rounds up what it halves unevenly, as in diffusers, so it packs nothing."""
        return Latents(
            channels=self.unet.config.in_channels,
            factor=2 ** (len(self.vae.config.block_out_channels) - 1),
            scale=self.vae.config.scaling_factor,
        )

    @property
    def architecture(self) -> str:
        return ARCHITECTURES.get(self.unet.config.cross_attention_dim, "unknown")

    @property
    def encoder_stages(self) -> tuple[tuple[int, int], ...]:
        """What its UNet takes at each stage of the encoder; see the function of this name."""
        return encoder_stages(dict(self.unet.config), self.factor)

    @cached_property
    def sites(self) -> dict[str, tuple[int, int]]:
        """Where residuals may enter: site -> its channels, and the pixels of an image to one of it, along a side.

        `skip.N` are the decoder's skip connections, `middle` is the middle's output, `stage.N` are the encoder's stages
        where T2I-Adapters enter, and `encoder.N` is what follows the Nth block of the encoder (numbered as the original
        code's `input_blocks`); what comes after in the encoder, its skips too, sees the last two.
        """
        return sites_of(dict(self.unet.config), self.factor)

    @cached_property
    def points(self) -> dict[str, Point]:
        """Where taps may hang: on the stream of hidden states, and on the embedding of the time.

        `encoder.N.in` and `encoder.N` are before and after the Nth block of the encoder, `middle.in` and `middle` are
        before and after the middle, and `decoder.N` is before the Nth block of the decoder takes its skip connection.
        `time` is the embedding of the time, `[B, D]`, before that of what else the UNet is told is added to it; all
        blocks see what taps make of it.
        """
        return points_of(dict(self.unet.config))

    def sites_in_words(self) -> dict[str, str]:
        return {"where features of a T2I-Adapter enter": listed_stages(self.encoder_stages[:-1])}

    def predict(
        self, x_t: Tensor, t: Tensor, text: Text, residuals: Residuals | None = None, taps: Taps | None = None
    ) -> Tensor:
        given = Residuals() if residuals is None else residuals
        self.check_sites(given)
        hooked = _hooked(given, taps or {}, stage_points(dict(self.unet.config)))
        left = Residuals({site: tensor for site, tensor in given.items() if site not in hooked})
        streams = _streams(given, hooked)
        with self.tapping(streams, taps or {}) if streams or taps else nullcontext():
            return self.unet(x_t, t, **unet_inputs(text), **_additions(left, x_t, self._skips), return_dict=False)[0]

    @cached_property
    def _skips(self) -> int:
        """How many skip connections the decoder has."""
        return sum(site.startswith("skip.") for site in self.sites)

    def zero_text(self) -> Text:
        config = self.unet.config
        tokens = torch.zeros(1, CLIP_TOKENS, config["cross_attention_dim"])
        if config.get("addition_embed_type") != "text_time":
            return Text(tokens)
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        return Text(tokens, pooled=torch.zeros(1, pooled), time_ids=torch.zeros(1, 6))

    def embed_time(self, x_t: Tensor, t: Tensor, text: Text) -> Tensor:
        embedded = self.unet.time_embedding(self.unet.get_time_embed(sample=x_t, timestep=t))
        inputs = unet_inputs(text)
        told = self.unet.get_aug_embed(
            emb=embedded,
            encoder_hidden_states=text.tokens,
            added_cond_kwargs=inputs.get("added_cond_kwargs", {}),
        )
        return embedded if told is None else embedded + told


def unet_inputs(text: Text) -> dict[str, Any]:
    """Encoded prompts as keyword arguments of diffusers' UNets and ControlNets."""
    inputs: dict[str, Any] = {"encoder_hidden_states": text.tokens}
    if "pooled" in text:
        inputs["added_cond_kwargs"] = {"text_embeds": text["pooled"], "time_ids": text["time_ids"]}
    return inputs


@dataclass(frozen=True, kw_only=True)
class Block:
    """One block of the encoder, as the original code counts `input_blocks`.

    It is the first convolution, a layer (ResNet block and transformer), or a halving.
    """

    first: str
    """Path of the module that it begins with."""
    last: str
    """Path of the module that it ends with."""
    channels: int
    """Of its output."""
    halvings: int
    """How often the latent has been halved at its output."""


def encoder_blocks(config: Mapping[str, Any]) -> list[Block]:
    """The blocks of the encoder of the UNet of `config`, from the outermost in."""
    channels, kinds = config["block_out_channels"], config["down_block_types"]
    made = [Block(first="conv_in", last="conv_in", channels=channels[0], halvings=0)]
    for place, (wide, kind) in enumerate(zip(channels, kinds, strict=True)):
        here = f"down_blocks.{place}"
        for layer in range(layers_of(config)[place]):
            resnet = f"{here}.resnets.{layer}"
            last = f"{here}.attentions.{layer}" if "CrossAttn" in kind else resnet
            made.append(Block(first=resnet, last=last, channels=wide, halvings=place))
        if place + 1 < len(channels):
            halving = f"{here}.downsamplers.0"
            made.append(Block(first=halving, last=halving, channels=wide, halvings=place + 1))
    return made


def layers_of(config: Mapping[str, Any]) -> list[int]:
    """Layers of each block of the encoder; the configuration may have one number for all."""
    layers = config["layers_per_block"]
    return list(layers) if isinstance(layers, list | tuple) else [layers] * len(config["block_out_channels"])


def points_of(config: Mapping[str, Any]) -> dict[str, Point]:
    """`Base.points` of the UNet of `config`."""
    points = {"time": Point(module="time_embedding")}
    for place, block in enumerate(encoder_blocks(config)):
        points[f"encoder.{place}.in"] = Point(module=block.first, side="input")
        points[f"encoder.{place}"] = Point(module=block.last)
    points["middle.in"] = Point(module="mid_block", side="input")
    points["middle"] = Point(module="mid_block")
    for place, (path, channels) in enumerate(_decoder_layers(config)):
        points[f"decoder.{place}"] = Point(module=path, side="input", channels=channels)
    return points


def sites_of(config: Mapping[str, Any], factor: int) -> dict[str, tuple[int, int]]:
    """`Base.sites` of the UNet of `config`, behind an autoencoder that divides sides by `factor`."""
    blocks = [(block.channels, factor * 2**block.halvings) for block in encoder_blocks(config)]
    stages = encoder_stages(config, factor)
    return {
        **{f"skip.{place}": shape for place, shape in enumerate(blocks)},
        "middle": blocks[-1],
        **{f"stage.{place}": shape for place, shape in enumerate(stages)},
        **{f"encoder.{place}": shape for place, shape in enumerate(blocks)},
    }


def encoder_stages(config: Mapping[str, Any], factor: int) -> tuple[tuple[int, int], ...]:
    """The shapes of `stage.N`: for each stage of the encoder its channels, and the pixels of an image to one of it.

    Features are added after a stage's layers: before it is halved where the stage has cross attention, after that
    where it has none (diffusers' `down_intrablock_additional_residuals`). The last entry is the middle block's output,
    which takes features only if they follow those of all stages.

    Args:
        factor: pixels of an image to one of its latent, along each side.
    """
    channels, kinds = config["block_out_channels"], config["down_block_types"]
    last = len(channels) - 1
    stages = [
        (wide, factor * 2 ** (place if "CrossAttn" in kind else min(place + 1, last)))
        for place, (wide, kind) in enumerate(zip(channels, kinds, strict=True))
    ]
    return (*stages, (channels[last], factor * 2**last))


def listed_stages(stages: tuple[tuple[int, int], ...]) -> str:
    """Stages in words: `320 channels at 1/8, 640 at 1/16`."""
    first, *rest = (f"{wide}{{}} at 1/{pixels}" for wide, pixels in stages)
    return ", ".join([first.format(" channels"), *(one.format("") for one in rest)])


def stage_points(config: Mapping[str, Any]) -> dict[str, str]:
    """Site `stage.N` -> the point where it enters."""
    made: dict[str, str] = {}
    number = 0
    kinds = config["down_block_types"]
    for place, (kind, layers) in enumerate(zip(kinds, layers_of(config), strict=True)):
        number += layers
        halved = place + 1 < len(kinds)
        made[f"stage.{place}"] = f"encoder.{number + (halved and 'CrossAttn' not in kind)}"
        number += halved
    return {**made, f"stage.{len(kinds)}": "middle"}


def _decoder_layers(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Path of each ResNet block of the decoder, and the channels of the stream that it takes beside its skip."""
    channels = list(reversed(config["block_out_channels"]))
    wide = channels[0]
    for place, (out, layers) in enumerate(zip(channels, reversed(layers_of(config)), strict=True)):
        for layer in range(layers + 1):
            yield f"up_blocks.{place}.resnets.{layer}", wide
            wide = out


def _hooked(residuals: Residuals, taps: Taps, stages: Mapping[str, str]) -> dict[str, str]:
    """Site -> point of the residuals that enter by a hook: those the UNet has no argument for, and those that meet a
    tap, which is to see them. It takes stages by their order alone, so not if one before them has nothing."""
    hooked = {site: site for site in residuals if site.startswith("encoder.")}
    staged = [site for site in residuals if site in stages]
    if taps or hooked or len(staged) > len(residuals.family("stage")):
        hooked |= {site: stages.get(site, site) for site in residuals if site == "middle" or site in staged}
    return hooked


def _streams(residuals: Residuals, hooked: Mapping[str, str]) -> dict[str, Tensor]:
    """Point -> the sum of the residuals that enter there by a hook."""
    made: dict[str, Tensor] = {}
    for site, point in hooked.items():
        made[point] = made[point] + residuals[site] if point in made else residuals[site]
    return made


def _additions(residuals: Residuals, x_t: Tensor, skips: int) -> dict[str, Any]:
    """Residuals as keyword arguments of diffusers' UNet for the noisy latents `x_t`; it has so many `skips`."""
    made: dict[str, Any] = {}
    if "middle" in residuals or any(site.startswith("skip.") for site in residuals):
        zero = x_t.new_zeros(())
        made["down_block_additional_residuals"] = tuple(residuals.get(f"skip.{place}", zero) for place in range(skips))
        made["mid_block_additional_residual"] = residuals.get("middle", zero)
    if stages := residuals.family("stage"):
        # The UNet takes them off the list one by one, and leaves out at its middle what has another batch than x_t.
        made["down_intrablock_additional_residuals"] = [tensor.expand(len(x_t), *tensor.shape[1:]) for tensor in stages]
    return made
