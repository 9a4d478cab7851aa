"""Bases with a diffusers UNet: injection sites of residuals and points of taps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor

from controlkit.bases.base import Base
from controlkit.bases.latent_space import Latents
from controlkit.bases.residuals import Residuals
from controlkit.bases.taps import Point, Taps
from controlkit.bases.text import CLIP_TOKENS, Text

ARCHITECTURES = {768: "stable-diffusion-v1", 1024: "stable-diffusion-v2", 2048: "stable-diffusion-xl-v1-base"}
"""Width of the text in cross attention -> family of the base, in modelspec's terms."""


class UNetBase(Base):
    """A base whose denoiser is a UNet with cross attention."""

    required_settings: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "unet": ("block_out_channels", "in_channels", "cross_attention_dim", "sample_size"),
        "vae": ("block_out_channels",),
    }

    _unet: UNet2DConditionModel

    @property
    def unet(self) -> UNet2DConditionModel:
        """The denoiser."""
        return self._unet

    @unet.setter
    def unet(self, network: UNet2DConditionModel) -> None:
        self._unet = network

    @property
    def denoiser(self) -> UNet2DConditionModel:
        return self._unet

    @property
    def latents(self) -> Latents:
        """No patches: its UNet rounds up odd sizes when downsampling, as in diffusers."""
        return Latents(
            channels=self.vae.config.latent_channels,
            factor=2 ** (len(self.vae.config.block_out_channels) - 1),
            scale=self.vae.config.scaling_factor,
        )

    @property
    def architecture(self) -> str:
        return ARCHITECTURES.get(self.unet.config.cross_attention_dim, "unknown")

    @property
    def is_inpainting(self) -> bool:
        return bool(self.unet.config.in_channels == 2 * self.latent_channels + 1)

    @property
    def encoder_stages(self) -> tuple[tuple[int, int], ...]:
        """Shapes of `stage.N`; see `encoder_stages`."""
        return encoder_stages(dict(self.unet.config), self.factor)

    @cached_property
    def sites(self) -> dict[str, tuple[int, int]]:
        """Injection sites of residuals: site -> its channels and its downsampling factor relative to the image.

        `skip.N` are the decoder's skip connections, `middle` is the middle block's output, `stage.N` are the encoder
        stages of T2I-Adapters, and `encoder.N` is the output of the Nth encoder block (numbered as the original code's
        `input_blocks`). Later encoder blocks and the skips see additions at the last two.
        """
        return sites_of(dict(self.unet.config), self.factor)

    @cached_property
    def points(self) -> dict[str, Point]:
        """Points for taps: on the stream of hidden states, and on the time embedding.

        `encoder.N.in` and `encoder.N` are before and after the Nth encoder block, `middle.in` and `middle` before and
        after the middle block, and `decoder.N` is before the Nth decoder block concatenates its skip connection.
        `attention.N` is between self-attention and cross-attention of the Nth transformer block, `[B, h * w, C]`.
        `time` is the time embedding, `[B, D]`, before other conditioning is added; all blocks use what taps make of it.
        """
        return points_of(dict(self.unet.config))

    def sites_in_words(self) -> dict[str, str]:
        return {"where features of a T2I-Adapter enter": listed_stages(self.encoder_stages[:-1])}

    def predict(
        self,
        x_t: Tensor,
        t: Tensor,
        text: Text,
        residuals: Residuals | None = None,
        taps: Taps | None = None,
        *,
        masked: Tensor | None = None,
    ) -> Tensor:
        if masked is None:
            self.check_text_to_image("this call")
        added = Residuals() if residuals is None else residuals
        self.check_sites(added)
        hook_points = _hook_points(added, taps or {}, stage_points(dict(self.unet.config)))
        arguments = Residuals({site: tensor for site, tensor in added.items() if site not in hook_points})
        hooks = _sums_by_point(added, hook_points)
        with self.tapping(hooks, taps or {}) if hooks or taps else nullcontext():
            return self.unet(
                x_t if masked is None else torch.cat([x_t, masked], 1),
                t,
                timestep_cond=self._guidance_embedding(text),
                **unet_inputs(text),
                **_unet_arguments(arguments, x_t, self._skips),
                return_dict=False,
            )[0]

    @property
    def size(self) -> int:
        """That of the UNet, or of the autoencoder if the UNet has none."""
        side = self.unet.config.sample_size
        if side is None:
            return int(self.vae.config.sample_size)
        return int(min(side) if isinstance(side, list | tuple) else side) * self.factor

    @property
    def reads_guidance(self) -> bool:
        """Whether its UNet embeds the guidance scale beside the time, as latent consistency models do (Luo et al. 2023,
        arXiv 2310.04378)."""
        return self.unet.config.get("time_cond_proj_dim") is not None

    def guided(self, text: Text, guidance: float) -> Text:
        if not self.reads_guidance:
            return text
        # In float32: 1000 times the scale are angles.
        return Text(**text.named, guidance=text.tokens.new_full((len(text),), guidance, dtype=torch.float32))

    def _guidance_embedding(self, text: Text) -> Tensor | None:
        """Sinusoids of the guidance scale less 1, `[B, D]` (diffusers, `get_guidance_scale_embedding`); None for a UNet
        that does not read it. A text without a scale, as in training, has the default."""
        width = self.unet.config.get("time_cond_proj_dim")
        if width is None:
            return None
        default = text.tokens.new_full((len(text),), self.default_guidance, dtype=torch.float32)
        scale = text.named.get("guidance", default) - 1
        return get_timestep_embedding(1000 * scale, width, downscale_freq_shift=1).to(text.tokens.dtype)

    @cached_property
    def _skips(self) -> int:
        """Number of the decoder's skip connections."""
        return sum(site.startswith("skip.") for site in self.sites)

    def zero_text(self) -> Text:
        config = self.unet.config
        tokens = torch.zeros(1, CLIP_TOKENS, config["cross_attention_dim"])
        if config.get("addition_embed_type") != "text_time":
            return Text(tokens)
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        return Text(tokens, pooled=torch.zeros(1, pooled), time_ids=torch.zeros(1, 6))

    def embed_time(self, x_t: Tensor, t: Tensor, text: Text) -> Tensor:
        sinusoids = self.unet.get_time_embed(sample=x_t, timestep=t)
        embedded = self.unet.time_embedding(sinusoids, self._guidance_embedding(text))
        inputs = unet_inputs(text)
        extra = self.unet.get_aug_embed(
            emb=embedded,
            encoder_hidden_states=text.tokens,
            added_cond_kwargs=inputs.get("added_cond_kwargs", {}),
        )
        return embedded if extra is None else embedded + extra


def unet_inputs(text: Text) -> dict[str, Any]:
    """Encoded prompts as keyword arguments of diffusers' UNets and ControlNets."""
    inputs: dict[str, Any] = {"encoder_hidden_states": text.tokens}
    if "pooled" in text:
        inputs["added_cond_kwargs"] = {"text_embeds": text["pooled"], "time_ids": text["time_ids"]}
    return inputs


@dataclass(frozen=True, kw_only=True)
class Block:
    """One encoder block, numbered as the original code's `input_blocks`.

    It is the first convolution, a layer (ResNet block and transformer), or a downsampler.
    """

    first: str
    """Path of its first module."""
    last: str
    """Path of its last module."""
    channels: int
    """Channels of its output."""
    halvings: int
    """Downsamplings of the latent up to its output."""


def encoder_blocks(config: Mapping[str, Any]) -> list[Block]:
    """Encoder blocks of a UNet, from the outermost in."""
    channels, kinds = config["block_out_channels"], config["down_block_types"]
    blocks = [Block(first="conv_in", last="conv_in", channels=channels[0], halvings=0)]
    for place, (width, kind) in enumerate(zip(channels, kinds, strict=True)):
        path = f"down_blocks.{place}"
        for layer in range(layers_of(config)[place]):
            resnet = f"{path}.resnets.{layer}"
            last = f"{path}.attentions.{layer}" if "CrossAttn" in kind else resnet
            blocks.append(Block(first=resnet, last=last, channels=width, halvings=place))
        if place + 1 < len(channels):
            halving = f"{path}.downsamplers.0"
            blocks.append(Block(first=halving, last=halving, channels=width, halvings=place + 1))
    return blocks


@dataclass(frozen=True, kw_only=True)
class AttentionBlock:
    """One transformer block: self-attention, cross-attention and a feed-forward network."""

    module: str
    """Its path."""
    channels: int
    heads: int
    """Of its self-attention."""


def attention_blocks(config: Mapping[str, Any]) -> list[AttentionBlock]:
    """Transformer blocks of a UNet in the order in which they run; `attention.N` is in the Nth."""
    channels, layers = config["block_out_channels"], layers_of(config)
    count = len(channels)
    heads = config.get("num_attention_heads") or config["attention_head_dim"]  # diffusers' misnomer
    heads = list(heads) if isinstance(heads, list | tuple) else [heads] * count
    depths = config.get("transformer_layers_per_block", 1)
    depths = list(depths) if isinstance(depths, list | tuple) else [depths] * count
    upwards = config.get("reverse_transformer_layers_per_block") or list(reversed(depths))
    blocks: list[AttentionBlock] = []

    def add(path: str, width: int, head_count: int, depth: Any, layer: int) -> None:
        for number in range(depth[layer] if isinstance(depth, list | tuple) else depth):
            blocks.append(
                AttentionBlock(
                    module=f"{path}.attentions.{layer}.transformer_blocks.{number}", channels=width, heads=head_count
                )
            )

    for place, kind in enumerate(config["down_block_types"]):
        for layer in range(layers[place]) if "CrossAttn" in kind else ():
            add(f"down_blocks.{place}", channels[place], heads[place], depths[place], layer)
    if "CrossAttn" in (config.get("mid_block_type", "UNetMidBlock2DCrossAttn") or ""):
        add("mid_block", channels[-1], heads[-1], depths[-1], 0)
    for place, kind in enumerate(config["up_block_types"]):
        mirror = count - 1 - place
        for layer in range(layers[mirror] + 1) if "CrossAttn" in kind else ():
            add(f"up_blocks.{place}", channels[mirror], heads[mirror], upwards[place], layer)
    return blocks


def layers_of(config: Mapping[str, Any]) -> list[int]:
    """Layers of each encoder block; the configuration may have one number for all."""
    layers = config["layers_per_block"]
    return list(layers) if isinstance(layers, list | tuple) else [layers] * len(config["block_out_channels"])


def points_of(config: Mapping[str, Any]) -> dict[str, Point]:
    """`Base.points` of a UNet."""
    points = {"time": Point(module="time_embedding")}
    for place, block in enumerate(encoder_blocks(config)):
        points[f"encoder.{place}.in"] = Point(module=block.first, side="input")
        points[f"encoder.{place}"] = Point(module=block.last)
    points["middle.in"] = Point(module="mid_block", side="input")
    points["middle"] = Point(module="mid_block")
    for place, (path, channels) in enumerate(_decoder_layers(config)):
        points[f"decoder.{place}"] = Point(module=path, side="input", channels=channels)
    for place, attention in enumerate(attention_blocks(config) if "up_block_types" in config else ()):
        points[f"attention.{place}"] = Point(module=f"{attention.module}.attn1", added_to=attention.module)
    return points


def sites_of(config: Mapping[str, Any], factor: int) -> dict[str, tuple[int, int]]:
    """`Base.sites` of a UNet behind an autoencoder that downsamples by `factor`."""
    shapes = [(block.channels, factor * 2**block.halvings) for block in encoder_blocks(config)]
    stages = encoder_stages(config, factor)
    return {
        **{f"skip.{place}": shape for place, shape in enumerate(shapes)},
        "middle": shapes[-1],
        **{f"stage.{place}": shape for place, shape in enumerate(stages)},
        **{f"encoder.{place}": shape for place, shape in enumerate(shapes)},
    }


def encoder_stages(config: Mapping[str, Any], factor: int) -> tuple[tuple[int, int], ...]:
    """Shapes of `stage.N`: channels and downsampling factor relative to the image, for each encoder stage.

    Features are added after a stage's layers: before its downsampler where the stage has cross attention, after it
    where it has none (diffusers' `down_intrablock_additional_residuals`). The last entry is the middle block's output,
    which takes features only if they follow those of all stages.

    Args:
        factor: downsampling factor of the autoencoder.
    """
    channels, kinds = config["block_out_channels"], config["down_block_types"]
    last = len(channels) - 1
    stages = [
        (width, factor * 2 ** (place if "CrossAttn" in kind else min(place + 1, last)))
        for place, (width, kind) in enumerate(zip(channels, kinds, strict=True))
    ]
    return (*stages, (channels[last], factor * 2**last))


def listed_stages(stages: tuple[tuple[int, int], ...]) -> str:
    """Stages as text: `320 channels at 1/8, 640 at 1/16`."""
    (width, pixels), *rest = stages
    return ", ".join([f"{width} channels at 1/{pixels}", *(f"{width} at 1/{pixels}" for width, pixels in rest)])


def stage_points(config: Mapping[str, Any]) -> dict[str, str]:
    """Site `stage.N` -> the point where it is added."""
    points: dict[str, str] = {}
    block = 0
    kinds = config["down_block_types"]
    for place, (kind, layers) in enumerate(zip(kinds, layers_of(config), strict=True)):
        block += layers
        halved = place + 1 < len(kinds)
        points[f"stage.{place}"] = f"encoder.{block + (halved and 'CrossAttn' not in kind)}"
        block += halved
    return {**points, f"stage.{len(kinds)}": "middle"}


def _decoder_layers(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Path of each decoder ResNet block, and the channels of its stream without the skip."""
    channels = list(reversed(config["block_out_channels"]))
    width = channels[0]
    for place, (out_width, layers) in enumerate(zip(channels, reversed(layers_of(config)), strict=True)):
        for layer in range(layers + 1):
            yield f"up_blocks.{place}.resnets.{layer}", width
            width = out_width


def _hook_points(residuals: Residuals, taps: Taps, stages: Mapping[str, str]) -> dict[str, str]:
    """Site -> point of the residuals that need a hook: those without a UNet argument, and those at a tap, which must
    see them. The UNet takes stages by order alone, so a gap before one needs hooks too."""
    points = {site: site for site in residuals if site.startswith("encoder.")}
    stage_sites = [site for site in residuals if site in stages]
    if taps or points or len(stage_sites) > len(residuals.family("stage")):
        points |= {site: stages.get(site, site) for site in residuals if site == "middle" or site in stage_sites}
    return points


def _sums_by_point(residuals: Residuals, hook_points: Mapping[str, str]) -> dict[str, Tensor]:
    """Point -> sum of the residuals that are hooked there."""
    sums: dict[str, Tensor] = {}
    for site, point in hook_points.items():
        sums[point] = sums[point] + residuals[site] if point in sums else residuals[site]
    return sums


def _unet_arguments(residuals: Residuals, x_t: Tensor, skips: int) -> dict[str, Any]:
    """Residuals as keyword arguments of diffusers' UNet, which has `skips` skip connections, for latents `x_t`."""
    arguments: dict[str, Any] = {}
    if "middle" in residuals or any(site.startswith("skip.") for site in residuals):
        zero = x_t.new_zeros(())
        arguments["down_block_additional_residuals"] = tuple(
            residuals.get(f"skip.{place}", zero) for place in range(skips)
        )
        arguments["mid_block_additional_residual"] = residuals.get("middle", zero)
    if stages := residuals.family("stage"):
        # The UNet pops them in order, and its middle ignores one whose batch is not that of x_t.
        arguments["down_intrablock_additional_residuals"] = [
            tensor.expand(len(x_t), *tensor.shape[1:]) for tensor in stages
        ]
    return arguments
