"""ControlNet-XS (Zavadski, Feiden and Rother 2023, arXiv 2312.06573) on diffusers' `ControlNetXSAdapter`.

A small encoder runs beside the base's and exchanges features with it at every block: the base's are concatenated to the
control's stream, and the control's are added to the base's (`guiding: encoder_double` in vislearn/ControlNet-XS,
sgm/modules/diffusionmodules/twoStreamControl.py). diffusers fuses both networks into one (`UNetControlNetXSModel`);
here the control hooks into the unchanged base.
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
    base_needed,
    checked_config,
    copy_incompatibility,
    hint_channels_for,
    hint_incompatibility,
    plain_config,
)
from controlkit.controls.hints import Hint
from controlkit.controls.registry import control
from controlkit.errors import UserError

LAYERS = "layers_per_block"
"""controlkit's own setting: layers of each base block, if they are not `DIFFUSERS_LAYERS`."""
DIFFUSERS_LAYERS = 2
"""Layers per block in diffusers' network, which supports Stable Diffusion only."""
LATENT_CHANNELS = 4
"""Latent channels of diffusers' network."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a ControlNet-XS."""

    size_ratio: float = 0.2
    """Channels of the control as a fraction of the base's, rounded to multiples of the base's norm groups."""
    learn_time_embedding: bool = False
    """Whether the control has its own time embedding, which the base then uses too."""
    time_embedding_mix: float = 1.0
    """Mix of the control's time embedding with the base's, from 0 (the base's) to 1 (the control's): the fraction of
    the control's is this to the power of 0.3. Below 1 only with `learn_time_embedding`."""

    def __post_init__(self) -> None:
        if not 0 <= self.time_embedding_mix <= 1:
            raise UserError(
                f"time_embedding_mix is {self.time_embedding_mix}; it must be between 0 and 1", "out-of-range"
            )
        if self.time_embedding_mix < 1 and not self.learn_time_embedding:
            raise UserError(
                f"time_embedding_mix is {self.time_embedding_mix}, and learn_time_embedding false; set it true, or"
                " time_embedding_mix to 1",
                "contradiction",
            )


@control
class ControlNetXS(OneImage):
    """A small encoder in step with the base's: each uses the other's features at every block.

    It has no residuals: all of it runs inside the base's forward pass, at every step. A new one copies nothing of the
    base but the time embedding, if it learns one: diffusers initialises that at random, which would change images from
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
        """A new one, with random weights and zero convolutions; the options are those of `Options`.

        Its settings are those of diffusers' `ControlNetXSAdapter.from_unet`.

        Raises:
            UserError: no network fits this base or this ratio, or the options contradict each other.
        """
        config = config_for(dict(base.unet.config), hint_channels_for(base, cls.title), size_ratio)
        config |= {"learn_time_embedding": learn_time_embedding, "time_embedding_mix": time_embedding_mix}
        try:
            network = network_of(config)
        except ValueError as error:
            raise UserError(f"no ControlNet-XS fits the base {base.name}: {error}", "incompatible") from error
        network = nn.Module.to(network, base.device, base.dtype)
        if learn_time_embedding:
            state = base.unet.time_embedding.state_dict()
            network.time_embedding.load_state_dict({name: state[name] for name in network.time_embedding.state_dict()})
        return cls(network, condition)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], condition: str | None = None) -> ControlNetXS:
        return cls(network_of(config).eval(), condition)

    @classmethod
    def config_of(cls, tensors: Mapping[str, Tensor], unet_config: Mapping[str, Any] | None = None) -> dict[str, Any]:
        raise ValueError(
            "its number of attention heads is not in the file and cannot be inferred from shapes; pass diffusers'"
            " folder with its config.json"
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
        """The two streams of one call: at `encoder.N.in` the control's Nth block runs on the input of the base's Nth
        block; at `encoder.N` its output is added to the base's; `decoder.N` adds the control's skip connections. The
        middle block is one more."""
        network = self.network
        embedded, shift = base.embed_time(x_t, t, text), self._time_shift(base, x_t, t)
        if shift is not None:
            embedded = embedded + shift
        # The control's stream after its first convolution, each encoder block, and its middle block. A block that
        # gradient checkpointing recomputes reads the same entry as before and overwrites its own with equal values.
        streams: dict[int, Tensor] = {}

        def begin(stream: Tensor) -> Tensor:
            streams[0] = network.conv_in(x_t) + hint
            return network.control_to_base_for_conv_in(streams[0])

        def run(place: int, block: _Block, stream: Tensor) -> None:
            both = torch.cat([streams[place - 1], block.from_base(stream)], 1)
            streams[place] = block.run(both, embedded, text.tokens)

        def add(place: int, convolution: nn.Module, stream: Tensor) -> Tensor:
            return convolution(streams[place])

        taps: dict[str, TapFunction | Tap] = {"encoder.0": begin}
        if shift is not None:
            taps["time"] = Tap(function=lambda stream: shift, weighted=False)
        for place, block in enumerate(_blocks(network), 1):
            taps[f"{block.point}.in"] = partial(run, place, block)
            taps[block.point] = partial(add, place, block.to_base)
        skips = [convolution for block in network.up_connections for convolution in block.ctrl_to_base]
        for place, convolution in enumerate(skips):
            taps[f"decoder.{place}"] = partial(add, len(skips) - 1 - place, convolution)
        return taps

    def _time_shift(self, base: Base, x_t: Tensor, t: Tensor) -> Tensor | None:
        """Difference of the mixed time embedding from the base's, `[B, D]`; None without an own embedding.

        diffusers uses the mix in both streams, whatever the conditioning scale (`UNetControlNetXSModel.forward`); the
        original used the scale as the mix (vislearn/ControlNet-XS, sgm/modules/diffusionmodules/twoStreamControl.py).
        """
        embedding = self.network.time_embedding
        if embedding is None:
            return None
        sinusoids = base.unet.get_time_embed(sample=x_t, timestep=t)
        return (embedding(sinusoids) - base.unet.time_embedding(sinusoids)) * self.network.config[
            "time_embedding_mix"
        ] ** 0.3

    def incompatibility(self, base: Base) -> str | None:
        config = self.network.config
        if (channels := config["conditioning_channels"]) != 3:
            return f"it takes condition images of {channels} channels, not 3 (RGB)"
        of_hint = hint_incompatibility(config["conditioning_embedding_out_channels"], base)
        return of_hint or copy_incompatibility(_shape_of_base(self.config()), base)

    def trainable_parameters(self) -> list[nn.Parameter]:
        return list(self.parameters())

    @classmethod
    def needs(cls, config: Mapping[str, Any]) -> str:
        return base_needed(_shape_of_base(config))


def network_of(config: Mapping[str, Any]) -> ControlNetXSAdapter:
    """diffusers' network of `config`, with `layers_per_block` layers.

    Raises:
        ValueError, TypeError, KeyError: the config is invalid.
    """
    config = checked_config(config)
    layers = config.pop(LAYERS, DIFFUSERS_LAYERS)
    network = ControlNetXSAdapter.from_config(config)
    mix = network.config["time_embedding_mix"]
    if not 0 <= mix <= 1:
        raise ValueError(f"time_embedding_mix is {mix}; expected 0 to 1")
    if mix < 1 and not network.config["learn_time_embedding"]:
        raise ValueError(f"time_embedding_mix {mix} needs learn_time_embedding, which adds the embedding to mix with")
    _set_layers(network, layers_of({**network.config, LAYERS: layers}))
    _set_norms(network)
    return network


def config_for(unet_config: Mapping[str, Any], hint_channels: Sequence[int], size_ratio: float) -> dict[str, Any]:
    """The config of a network for a UNet, as in diffusers' `ControlNetXSAdapter.from_unet`.

    It has as many attention heads as the base.

    Args:
        hint_channels: of the hint network, one more than its downsamplings.
        size_ratio: as in `control_channels`.

    Raises:
        UserError: the number of latent channels is not that of diffusers' network, or the ratio does not fit.
    """
    if unet_config["in_channels"] != LATENT_CHANNELS:
        raise UserError(
            f"a ControlNet-XS takes latents of {LATENT_CHANNELS} channels; this base has {unet_config['in_channels']}",
            "incompatible",
        )
    shared = ("cross_attention_dim", "down_block_types", "sample_size", "transformer_layers_per_block")
    return {
        **{key: unet_config[key] for key in (*shared, "upcast_attention", "use_linear_projection")},
        "base_block_out_channels": list(unet_config["block_out_channels"]),
        "block_out_channels": control_channels(unet_config, size_ratio),
        "num_attention_heads": unet_config["attention_head_dim"],  # diffusers' misnomer for the number of heads
        "max_norm_num_groups": unet_config["norm_num_groups"],
        "conditioning_embedding_out_channels": list(hint_channels),
        LAYERS: layers_of(unet_config),
    }


def control_channels(unet_config: Mapping[str, Any], size_ratio: float) -> list[int]:
    """Channels of each control block: the base's times the ratio, rounded to multiples of the norm groups.

    All norms then have as many groups as the base's. diffusers accepts any number of channels, with any number of
    groups that divides it.

    Raises:
        UserError: a block would have no channels, or fewer than its attention heads.
    """
    widths, groups = unet_config["block_out_channels"], unet_config["norm_num_groups"]
    heads = unet_config["attention_head_dim"]
    heads = list(heads) if isinstance(heads, list | tuple) else [heads] * len(widths)
    if not 0 < size_ratio <= 1:
        raise UserError(f"size_ratio is {size_ratio}; it must be above 0 and at most 1", "out-of-range")
    channels = [int(wide * size_ratio / groups + 0.5) * groups for wide in widths]
    if any(wide < max(1, head) for wide, head in zip(channels, heads, strict=True)):
        blocks = zip(widths, heads, strict=True)
        minimum = max((ceil(max(1, head) / groups) - 0.5) * groups / wide for wide, head in blocks)
        raise UserError(
            f"size_ratio {size_ratio} gives blocks of"
            f" {', '.join(f'{wide * size_ratio:g}' for wide in widths)} channels; these must be multiples of"
            f" the base's {groups} norm groups and at least its attention heads"
            f" ({', '.join(map(str, heads))}): use a size_ratio of {ceil(minimum * 1000) / 1000} or more",
            "out-of-range",
        )
    return channels


_Run = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Stream `[B, C, h, w]`, time embedding `[B, D]` and prompt tokens `[B, L, D]` => stream."""


@dataclass(frozen=True)
class _Block:
    """A block of the control's encoder, or its middle block."""

    point: str
    """Point where its output is added to the base; with `.in`, where it reads the base."""
    from_base: nn.Module
    run: _Run
    """The layers after the concatenation."""
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
    """Change a network from diffusers' two layers per block to the base's.

    Raises:
        ValueError: a number of layers is not supported, or their count is not that of the blocks.
    """
    if len(layers) != len(network.down_blocks) or not set(layers) <= {1, DIFFUSERS_LAYERS}:
        raise ValueError(f"{LAYERS} is {list(layers)}; a ControlNet-XS has one or two layers per block")
    if list(layers) == _layers_of(network):
        return
    for down, count in zip(network.down_blocks, layers, strict=True):
        kept = [*range(count), *range(DIFFUSERS_LAYERS, len(down.base_to_ctrl))]  # the last is the downsampler's
        down.resnets = down.resnets[:count]
        down.attentions = None if down.attentions is None else down.attentions[:count]
        for name in ("base_to_ctrl", "ctrl_to_base"):
            setattr(down, name, nn.ModuleList(getattr(down, name)[place] for place in kept))
    # Each decoder layer takes one skip connection, in reverse order.
    shape = {**network.config, LAYERS: list(layers)}
    points = points_of({**shape, "block_out_channels": network.config["base_block_out_channels"]})
    widths = (point.channels for name, point in points.items() if name.startswith("decoder."))
    skips = reversed(encoder_blocks(shape))
    convolutions = [make_zero_conv(skip.channels, stream) for skip, stream in zip(skips, widths, strict=True)]
    network.up_connections = nn.ModuleList(
        UpBlockControlNetXSAdapter(nn.ModuleList(convolutions.pop(0) for _ in range(count + 1)))
        for count in reversed(layers)
    )


def _set_norms(network: ControlNetXSAdapter) -> None:
    """Give norms the groups that they have once diffusers has fused the network with a base.

    There no norm of a block has more groups than the block's first (`ControlNetXSCrossAttnDownBlock2D.from_modules`),
    which matters if channels are not multiples of the groups.
    """
    for down in network.down_blocks:
        max_groups = down.resnets[0].norm1.num_groups
        for module in down.modules():
            if isinstance(module, nn.GroupNorm):
                module.num_groups = find_largest_factor(module.num_channels, max_groups)


def _shape_of_base(config: Mapping[str, Any]) -> dict[str, Any]:
    """The base of a network of `config`, as `copy_incompatibility` and `base_needed` take it."""
    return {
        "in_channels": LATENT_CHANNELS,
        "block_out_channels": config["base_block_out_channels"],
        "cross_attention_dim": config["cross_attention_dim"],
        LAYERS: config.get(LAYERS, DIFFUSERS_LAYERS),
    }
