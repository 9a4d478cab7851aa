"""ControlNet-XS (Zavadski, Feiden and Rother 2023, arXiv 2312.06573) on diffusers' `ControlNetXSAdapter`.

A small encoder runs beside the base's own and talks with it at every block: what the base has computed is concatenated
to the control's stream, and what the control has computed is added to the base's (`guiding: encoder_double` in
vislearn/ControlNet-XS, sgm/modules/diffusionmodules/twoStreamControl.py). diffusers fuses both networks into one
(`UNetControlNetXSModel`); here the control hangs on points of the base as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import Any, ClassVar

import torch
from diffusers import ControlNetXSAdapter
from diffusers.models.controlnets.controlnet_xs import UpBlockControlNetXSAdapter, find_largest_factor, make_zero_conv
from torch import Tensor, nn

from controlkit.bases.base import Base
from controlkit.bases.taps import Tap, TapFunction
from controlkit.bases.text import Text
from controlkit.bases.unet import encoder_blocks, layers_of, points_of
from controlkit.controls.control import Acts, OneImage, Reads
from controlkit.controls.encoder_copy.network import (
    HINT_CHANNELS,
    base_needed,
    checked_config,
    copy_incompatibility,
    plain_config,
)
from controlkit.controls.hints import Hint
from controlkit.controls.registry import control
from controlkit.errors import UserError

LAYERS = "layers_per_block"
"""Our own setting beside diffusers': layers of each block of the base, where they are not `DIFFUSERS_LAYERS`."""
DIFFUSERS_LAYERS = 2
"""Layers of each block in diffusers' network, which knows Stable Diffusion alone."""
LATENT_CHANNELS = 4
"""Channels of the latents that diffusers' network takes."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a ControlNet-XS."""

    size_ratio: float = 0.2
    """Channels of the control, as a share of the base's; rounded to multiples of the base's norm groups."""
    learn_time_embedding: bool = False
    """Whether the control has an embedding of the time of its own, which the base then uses, too."""
    time_embedding_mix: float = 1.0
    """How its own embedding of the time is mixed with the base's, from 0 (the base's) to 1 (its own): the share of its
    own is this to the power of 0.3. Below 1 only with `learn_time_embedding`."""


@control
class ControlNetXS(OneImage):
    """A small encoder beside the base's, in step with it: each sees the other's features at every block.

    It has no residuals: all of it runs inside of the base's pass, at every step. A new one copies nothing of the base
    but the embedding of the time, where it learns one: diffusers draws that at random, which would change images from
    the start.
    """

    kind: ClassVar[str] = "controlnet-xs"
    title: ClassVar[str] = "a ControlNet-XS"
    paper: ClassVar[str] = "Zavadski, Feiden and Rother 2023, arXiv 2312.06573"
    reads: ClassVar[Reads] = Reads.NOTHING
    acts: ClassVar[Acts] = Acts.TAPS
    enters: ClassVar[str] = "encoder blocks, middle and decoder, whose features it reads at every step"
    Options = Options
    diffusers_class: ClassVar[str | None] = "ControlNetXSAdapter"

    def __init__(self, network: ControlNetXSAdapter, condition: str | None = None) -> None:
        super().__init__()
        self.network = network
        self.condition = condition

    @classmethod
    def for_base(
        cls,
        base: Base,
        condition: str | None = None,
        *,
        size_ratio: float = 0.2,
        learn_time_embedding: bool = False,
        time_embedding_mix: float = 1.0,
        **options: Any,
    ) -> ControlNetXS:
        """A new one, of random weights and zero convolutions; the options are those of `Options`.

        It has the settings of diffusers' `ControlNetXSAdapter.from_unet`.

        Raises:
            UserError: no network has the shape of this base, or of this ratio, or the options contradict each other.
        """
        config = config_for(dict(base.unet.config), HINT_CHANNELS[base.factor], size_ratio)
        config |= {"learn_time_embedding": learn_time_embedding, "time_embedding_mix": time_embedding_mix}
        try:
            network = network_of(config)
        except ValueError as error:
            raise UserError(f"no ControlNet-XS can be made for the base {base.name}: {error}") from error
        network = nn.Module.to(network, base.device, base.dtype)
        if learn_time_embedding:
            theirs = base.unet.time_embedding.state_dict()
            network.time_embedding.load_state_dict({name: theirs[name] for name in network.time_embedding.state_dict()})
        return cls(network, condition)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], condition: str | None = None) -> ControlNetXS:
        return cls(network_of(config).eval(), condition)

    @classmethod
    def config_of(cls, tensors: Mapping[str, Tensor], unet_config: Mapping[str, Any] | None = None) -> dict[str, Any]:
        raise ValueError(
            "its shapes do not tell how many attention heads it has, and the file does not say it; give the folder of"
            " diffusers with its config.json"
        )

    @classmethod
    def is_native(cls, tensors: Mapping[str, Tensor]) -> bool:
        families = {name.partition(".")[0] for name in tensors}
        return {"control_to_base_for_conv_in", "up_connections"} <= families

    def config(self) -> dict[str, Any]:
        config, layers = plain_config(self.network), _layers_of(self.network)
        if set(layers) == {DIFFUSERS_LAYERS}:
            return config
        return {**config, LAYERS: layers}

    def file_state(self) -> dict[str, Tensor]:
        return dict(self.network.state_dict())

    def load_file_state(self, state: Mapping[str, Tensor]) -> None:
        self.network.load_state_dict(dict(state), strict=True, assign=True)

    def encode(self, condition_image: Tensor, base: Base) -> Tensor:
        hint_network = self.network.controlnet_cond_embedding
        weight = next(hint_network.parameters())
        if self.network.config["conditioning_channel_order"] == "bgr":
            condition_image = condition_image.flip(1)
        return hint_network(condition_image.to(weight.device, weight.dtype))

    def taps(self, base: Base, x_t: Tensor, t: Tensor, text: Text, hint: Hint) -> Mapping[str, TapFunction | Tap]:
        """The two streams of one call: at `encoder.N.in` the control's Nth block runs, on what the base's Nth block is
        given; at `encoder.N` what it made is added to what the base's block made; `decoder.N` takes the control's own
        skip connections. The middle is one block more."""
        network = self.network
        embedded, shift = base.embed_time(x_t, t, text), self._time_shift(base, x_t, t)
        if shift is not None:
            embedded = embedded + shift
        # The control's stream after its first convolution, each block of its encoder, and its middle. A block that runs
        # again in the backward pass finds what it was given the first time, and writes the same in its own place.
        streams: dict[int, Tensor] = {}

        def begin(stream: Tensor) -> Tensor:
            streams[0] = network.conv_in(x_t) + hint
            return network.control_to_base_for_conv_in(streams[0])

        def run(place: int, block: _Block, stream: Tensor) -> None:
            given = torch.cat([streams[place - 1], block.from_base(stream)], 1)
            streams[place] = block.run(given, embedded, text.tokens)

        def add(place: int, convolution: nn.Module, stream: Tensor) -> Tensor:
            return convolution(streams[place])

        made: dict[str, TapFunction | Tap] = {"encoder.0": begin}
        if shift is not None:
            made["time"] = Tap(function=lambda stream: shift, weighted=False)
        for place, block in enumerate(_blocks(network), 1):
            made[f"{block.point}.in"] = partial(run, place, block)
            made[block.point] = partial(add, place, block.to_base)
        skips = [convolution for block in network.up_connections for convolution in block.ctrl_to_base]
        for place, convolution in enumerate(skips):
            made[f"decoder.{place}"] = partial(add, len(skips) - 1 - place, convolution)
        return made

    def _time_shift(self, base: Base, x_t: Tensor, t: Tensor) -> Tensor | None:
        """What the base's embedding of the time lacks to the mix with the control's own, `[B, D]`; None without one.

        diffusers mixes them for both streams, whatever the control's weight (`UNetControlNetXSModel.forward`); the
        original took the weight for the mix (vislearn/ControlNet-XS, sgm/modules/diffusionmodules/twoStreamControl.py).
        """
        own = self.network.time_embedding
        if own is None:
            return None
        waves = base.unet.get_time_embed(sample=x_t, timestep=t)
        return (own(waves) - base.unet.time_embedding(waves)) * self.network.config["time_embedding_mix"] ** 0.3

    def incompatibility(self, base: Base) -> str | None:
        config = self.network.config
        if (colours := config["conditioning_channels"]) != 3:
            return f"it takes condition images of {colours} channels, not of 3 (RGB)"
        halvings = len(config["conditioning_embedding_out_channels"]) - 1
        if 2**halvings != base.factor:
            return f"its hint network divides the image by {2**halvings}, the base's autoencoder by {base.factor}"
        return copy_incompatibility(_shape_of_base(self.config()), base)

    def trainable_parameters(self) -> list[nn.Parameter]:
        return list(self.parameters())

    @classmethod
    def needs(cls, config: Mapping[str, Any]) -> str:
        return base_needed(_shape_of_base(config))


def network_of(config: Mapping[str, Any]) -> ControlNetXSAdapter:
    """diffusers' network of `config`, with the layers of each block that `layers_per_block` says.

    Raises:
        ValueError, TypeError, KeyError: the config is not one of such a network.
    """
    config = checked_config(config)
    layers = config.pop(LAYERS, DIFFUSERS_LAYERS)
    network = ControlNetXSAdapter.from_config(config)
    mix = network.config["time_embedding_mix"]
    if not 0 <= mix <= 1:
        raise ValueError(f"time_embedding_mix is {mix}; it must be from 0 to 1")
    if mix < 1 and not network.config["learn_time_embedding"]:
        raise ValueError(f"time_embedding_mix {mix} mixes with an embedding that only learn_time_embedding gives it")
    _set_layers(network, layers_of({**network.config, LAYERS: layers}))
    _set_norms(network)
    return network


def config_for(unet_config: Mapping[str, Any], hint_channels: Sequence[int], size_ratio: float) -> dict[str, Any]:
    """The config of a network for the UNet of `unet_config`, as diffusers' `ControlNetXSAdapter.from_unet` makes it.

    It has as many attention heads as the base.

    Args:
        hint_channels: of the hint network, one more than it has halvings.
        size_ratio: as in `control_channels`.

    Raises:
        UserError: the latents have another number of channels than diffusers' network takes, or the ratio does not fit.
    """
    if unet_config["in_channels"] != LATENT_CHANNELS:
        raise UserError(
            f"a ControlNet-XS takes latents of {LATENT_CHANNELS} channels; those of this base have"
            f" {unet_config['in_channels']}"
        )
    same = ("cross_attention_dim", "down_block_types", "sample_size", "transformer_layers_per_block")
    return {
        **{key: unet_config[key] for key in (*same, "upcast_attention", "use_linear_projection")},
        "base_block_out_channels": list(unet_config["block_out_channels"]),
        "block_out_channels": control_channels(unet_config, size_ratio),
        "num_attention_heads": unet_config["attention_head_dim"],  # which is their number, as diffusers has it
        "max_norm_num_groups": unet_config["norm_num_groups"],
        "conditioning_embedding_out_channels": list(hint_channels),
        LAYERS: layers_of(unet_config),
    }


def control_channels(unet_config: Mapping[str, Any], size_ratio: float) -> list[int]:
    """Channels of each block of the control of a UNet: the ratio times the base's, rounded to the norms' groups.

    Then all norms have as many groups as the base's. diffusers takes any number of channels, and norms have whatever
    groups divide it.

    Raises:
        UserError: nothing is left of a block, or less than its attention heads need.
    """
    widths, groups = unet_config["block_out_channels"], unet_config["norm_num_groups"]
    heads = unet_config["attention_head_dim"]
    heads = list(heads) if isinstance(heads, list | tuple) else [heads] * len(widths)
    if not 0 < size_ratio <= 1:
        raise UserError(f"size_ratio is {size_ratio}; it must be above 0 and at most 1")
    made = [int(wide * size_ratio / groups + 0.5) * groups for wide in widths]
    if any(wide < max(1, head) for wide, head in zip(made, heads, strict=True)):
        blocks = zip(widths, heads, strict=True)
        least = max((ceil(max(1, head) / groups) - 0.5) * groups / wide for wide, head in blocks)
        raise UserError(
            f"size_ratio {size_ratio} makes blocks of {', '.join(f'{wide * size_ratio:g}' for wide in widths)}"
            f" channels; they must be multiples of the base's {groups} norm groups, and no fewer than its attention"
            f" heads ({', '.join(map(str, heads))}). Give a size_ratio of {ceil(least * 1000) / 1000} or more."
        )
    return made


_Run = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Stream `[B, C, h, w]`, embedded time `[B, D]` and tokens of the prompt `[B, L, D]` => stream."""


@dataclass(frozen=True)
class _Block:
    """A block of the control's encoder, or its middle."""

    point: str
    """Where what it makes is added to the base; with `.in` behind, where it reads the base."""
    from_base: nn.Module
    run: _Run
    """What follows the concatenation."""
    to_base: nn.Module


def _blocks(network: ControlNetXSAdapter) -> Iterator[_Block]:
    """The blocks in the order of the base's points, from `encoder.1` to `middle`."""
    number = 1
    for down in network.down_blocks:
        attentions = down.attentions or [None] * len(down.resnets)
        runs: list[_Run] = [
            partial(_layer, resnet, attention) for resnet, attention in zip(down.resnets, attentions, strict=True)
        ]
        if down.downsamplers is not None:
            runs.append(partial(_halving, down.downsamplers))
        for from_base, run, to_base in zip(down.base_to_ctrl, runs, down.ctrl_to_base, strict=True):
            yield _Block(f"encoder.{number}", from_base, run, to_base)
            number += 1
    middle = network.mid_block
    yield _Block("middle", middle.base_to_ctrl, partial(_middle, middle.midblock), middle.ctrl_to_base)


def _layer(resnet: nn.Module, attention: nn.Module | None, hidden: Tensor, embedded: Tensor, tokens: Tensor) -> Tensor:
    hidden = resnet(hidden, embedded)
    return hidden if attention is None else attention(hidden, encoder_hidden_states=tokens, return_dict=False)[0]


def _halving(convolution: nn.Module, hidden: Tensor, embedded: Tensor, tokens: Tensor) -> Tensor:
    return convolution(hidden)


def _middle(block: nn.Module, hidden: Tensor, embedded: Tensor, tokens: Tensor) -> Tensor:
    return block(hidden, embedded, encoder_hidden_states=tokens)


def _layers_of(network: ControlNetXSAdapter) -> list[int]:
    return [len(down.resnets) for down in network.down_blocks]


def _set_layers(network: ControlNetXSAdapter, layers: Sequence[int]) -> None:
    """Give a network of diffusers' two layers a block those of a base that may have one.

    Raises:
        ValueError: there are more, or not as many as blocks.
    """
    if len(layers) != len(network.down_blocks) or not set(layers) <= {1, DIFFUSERS_LAYERS}:
        raise ValueError(f"{LAYERS} is {list(layers)}; a ControlNet-XS has one or two layers in each block")
    if list(layers) == _layers_of(network):
        return
    for down, count in zip(network.down_blocks, layers, strict=True):
        kept = [*range(count), *range(DIFFUSERS_LAYERS, len(down.base_to_ctrl))]  # the last is the halving's
        down.resnets = down.resnets[:count]
        down.attentions = None if down.attentions is None else down.attentions[:count]
        for name in ("base_to_ctrl", "ctrl_to_base"):
            setattr(down, name, nn.ModuleList(getattr(down, name)[place] for place in kept))
    # Each layer of the decoder takes one skip connection, the last one made first.
    shape = {**network.config, LAYERS: list(layers)}
    points = points_of({**shape, "block_out_channels": network.config["base_block_out_channels"]})
    wide = (point.channels for name, point in points.items() if name.startswith("decoder."))
    skips = reversed(encoder_blocks(shape))
    made = [make_zero_conv(skip.channels, stream) for skip, stream in zip(skips, wide, strict=True)]
    network.up_connections = nn.ModuleList(
        UpBlockControlNetXSAdapter(nn.ModuleList(made.pop(0) for _ in range(count + 1))) for count in reversed(layers)
    )


def _set_norms(network: ControlNetXSAdapter) -> None:
    """Give the norms the groups that they have once diffusers has fused the network with a base.

    There no norm of a block has more groups than the block's first (`ControlNetXSCrossAttnDownBlock2D.from_modules`),
    which makes a difference where channels are no multiples of the groups.
    """
    for down in network.down_blocks:
        most = down.resnets[0].norm1.num_groups
        for module in down.modules():
            if isinstance(module, nn.GroupNorm):
                module.num_groups = find_largest_factor(module.num_channels, most)


def _shape_of_base(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of the base that a network of `config` is for, what `copy_incompatibility` and `base_needed` look at."""
    return {
        "in_channels": LATENT_CHANNELS,
        "block_out_channels": config["base_block_out_channels"],
        "cross_attention_dim": config["cross_attention_dim"],
        LAYERS: config.get(LAYERS, DIFFUSERS_LAYERS),
    }
