"""Where controls act on a UNet of diffusers: sites of residuals, and points of taps, from its configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from controlkit.bases.taps import Point


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
