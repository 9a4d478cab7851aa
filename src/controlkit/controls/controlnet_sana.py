"""ControlNet for Sana on diffusers' `SanaControlNetModel` (NVlabs/Sana, asset/docs/sana_controlnet.md).

The first blocks of the transformer, copied, run beside it on the noisy latent plus that of the condition. The output of
its first block is added after the second of the base's blocks, and so on: seven outputs after blocks 1 to 7, counted
from 0 (diffusers, models/transformers/sana_transformer.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import SanaControlNetModel, SanaTransformer2DModel
from diffusers.models.embeddings import PatchEmbed
from torch import Tensor

from controlkit.bases.base import Base
from controlkit.bases.residuals import Residuals
from controlkit.bases.sana import SANA_600M_TRANSFORMER, SANA_1600M_TRANSFORMER, prompt_of
from controlkit.bases.text import Text
from controlkit.controls.control import OneImage, Reads, Training
from controlkit.controls.encoder_copy.network import checked_config, plain_config
from controlkit.controls.hints import Hint
from controlkit.controls.inputs import check_range
from controlkit.controls.registry import control
from controlkit.controls.transformer_control import TransformerCopy, count_of, with_weights_of
from controlkit.errors import UserError

_HEADS = ("num_attention_heads", "attention_head_dim", "num_cross_attention_heads", "cross_attention_head_dim")
_COMPARED = ("in_channels", "out_channels", *_HEADS, "cross_attention_dim", "caption_channels", "mlp_ratio")
"""Settings that the control's network has as that of its base, and that are compared with it."""
_COPIED = (
    "attention_bias",
    "sample_size",
    "patch_size",
    "norm_elementwise_affine",
    "norm_eps",
    "interpolation_scale",
)
_RELEASED = {
    config["cross_attention_dim"]: {name: config[name] for name in _HEADS}
    for config in (SANA_600M_TRANSFORMER, SANA_1600M_TRANSFORMER)
}
"""Channels of a token -> the attention heads of the released model, which no tensor shows."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a ControlNet for Sana."""

    num_layers: int = 7
    """Blocks copied from the base, from the first on (7 in NVIDIA's); fewer if the base has no more."""

    def __post_init__(self) -> None:
        if self.num_layers < 1:
            raise UserError(f"num_layers is {self.num_layers}; expected 1 or more", "out-of-range")


@dataclass(frozen=True, kw_only=True)
class Start(Options):
    """Recipe settings of a ControlNet for Sana."""

    start: str | None = None
    """Initial weights: such a ControlNet in any format. Default: a copy of the base's first blocks."""
    prompt_drop: float = 0.5
    """Fraction of prompts replaced by the empty prompt."""


@control
class ControlNetSana(TransformerCopy, OneImage):
    """A trainable copy of the first blocks of the base's transformer, joined to it by zero-initialised linear
    layers."""

    kind: ClassVar[str] = "controlnet-sana"
    title: ClassVar[str] = "a ControlNet for Sana"
    paper: ClassVar[str] = "Zhang, Rao and Agrawala 2023, arXiv 2302.05543; Xie et al. 2024, arXiv 2410.10629"
    transformer = SanaTransformer2DModel
    family_title: ClassVar[str] = "Sana"
    reads: ClassVar[Reads] = Reads.NOISE | Reads.TIME | Reads.TEXT
    enters: ClassVar[str] = "after the transformer's blocks"
    Options = Options
    diffusers_class: ClassVar[str | None] = "SanaControlNetModel"
    trainings = (
        Training(
            system="controlnet-sana",
            also=("controlnet-sana-pairs",),
            options=Start,
            doc="A ControlNet for Sana, one condition.",
        ),
    )

    def __init__(self, network: SanaControlNetModel, condition: str | None = None) -> None:
        super().__init__()
        self.network = network
        self.condition = condition

    @classmethod
    def for_base(
        cls, base: Base, condition: str | None = None, *, num_layers: int = 7, **options: Any
    ) -> ControlNetSana:
        """A new one: the base's first blocks and embeddings copied, all that joins them to the base zero. The options
        are those of `Options`.

        Raises:
            UserError: the base has another network, or one block, or `num_layers` is below 1.
        """
        transformer = cls.transformer_of(base)
        Options(num_layers=num_layers)  # refuses wrong ones
        if reason := _not_copied(transformer):
            raise UserError(f"{cls.title} cannot be made for {base.name}: {reason}", "incompatible")
        blocks = len(transformer.transformer_blocks)
        if blocks < 2:
            raise UserError(
                f"{cls.title} needs a transformer of two blocks or more; that of {base.name} has one", "incompatible"
            )
        of_base = plain_config(transformer)
        config = {name: of_base[name] for name in (*_COMPARED, *_COPIED)}
        network = SanaControlNetModel(**config, num_layers=min(num_layers, blocks - 1))
        return cls(with_weights_of(network, transformer, base), condition)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], condition: str | None = None) -> ControlNetSana:
        return cls(SanaControlNetModel.from_config(checked_config(config)).eval(), condition)

    def config(self) -> dict[str, Any]:
        return plain_config(self.network)

    @classmethod
    def config_of(cls, tensors: Mapping[str, Tensor], unet_config: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The config of a released model's size.

        Raises:
            KeyError, ValueError: a tensor is missing, or the width is none of the released models'.
        """
        width, channels = tensors["patch_embed.proj.weight"].shape[:2]
        if width not in _RELEASED:
            expected = " or ".join(map(str, _RELEASED))
            raise ValueError(f"its width is {width}, whose attention heads are unknown; expected {expected}")
        return {
            **_RELEASED[width],
            "in_channels": channels,
            "out_channels": channels,
            "num_layers": count_of(tensors, "controlnet_blocks"),
            "cross_attention_dim": width,
            "caption_channels": tensors["caption_projection.linear_1.weight"].shape[1],
            "mlp_ratio": tensors["transformer_blocks.0.ff.conv_point.weight"].shape[1] / width,
        }

    def load_file_state(self, state: Mapping[str, Tensor]) -> None:
        super().load_file_state(state)
        # Its positions are in no file: those of a network that was built on the meta device have no values.
        own = self.network.patch_embed
        if own.pos_embed is not None and own.pos_embed.is_meta:
            config = self.network.config
            with torch.device("cpu"):
                made = PatchEmbed(
                    height=config.sample_size,
                    width=config.sample_size,
                    patch_size=config.patch_size,
                    in_channels=config.in_channels,
                    embed_dim=_width(config),
                    interpolation_scale=config.interpolation_scale,
                )
            own.pos_embed = made.pos_embed

    @classmethod
    def is_native(cls, tensors: Mapping[str, Tensor]) -> bool:
        return {"input_block.weight", "controlnet_blocks.0.weight", "caption_norm.weight"} <= set(tensors)

    # Computation

    @torch.no_grad()
    def encode(self, condition_image: Tensor, base: Base) -> Tensor:
        """Condition images `[B, 3, H, W]` in [0, 1] => latents `[B, C, h, w]`.

        Raises:
            ValueError: a value is outside [0, 1].
            UserError: the size does not fit the base.
        """
        base.check_size(condition_image.shape[-1], condition_image.shape[-2])
        check_range(condition_image)
        return base.encode_image(condition_image * 2 - 1).to(self.network.input_block.weight)

    def forward(self, x_t: Tensor | None, t: Tensor, text: Text | None, hint: Hint) -> Residuals:
        assert x_t is not None and text is not None
        outputs = self.network(
            x_t, controlnet_cond=hint, timestep=t.expand(len(x_t)), **prompt_of(text), return_dict=False
        )[0]
        return Residuals({f"block.{place}": output for place, output in enumerate(outputs, 1)})

    def difference(self, transformer: Any) -> str | None:
        layers, blocks = self.network.config["num_layers"], len(transformer.transformer_blocks)
        if layers >= blocks:
            return f"it acts after {layers} blocks but the first; the base has {blocks}"
        return _not_copied(transformer) or super().difference(transformer)

    def sizes_beside(self, transformer: Any) -> Mapping[str, tuple[Any, Any]]:
        own, of_base = self.network.config, transformer.config
        # Positions depend on the size for which they are made.
        positions = ("interpolation_scale", "sample_size") if own["interpolation_scale"] else ("interpolation_scale",)
        return {name.replace("_", " "): (own[name], of_base[name]) for name in (*_COMPARED, *positions)}

    # Description

    @classmethod
    def needs(cls, config: Mapping[str, Any]) -> str:
        return f"a Sana whose transformer has blocks of {_width(config)} channels"

    @classmethod
    def facts(cls, config: Mapping[str, Any]) -> dict[str, str]:
        return {"blocks": f"{config['num_layers']}"}


def _width(config: Mapping[str, Any]) -> int:
    return int(config["num_attention_heads"] * config["attention_head_dim"])


def _not_copied(transformer: Any) -> str | None:
    """What of a base's transformer diffusers' network for controls does not have; None if there is nothing."""
    if transformer.config.qk_norm is not None:
        return "its attention normalises queries and keys (qk_norm), as Sana 1.5's, for which there are no controls yet"
    if transformer.config.timestep_scale != 1:
        return f"its times are scaled by {transformer.config.timestep_scale} (timestep_scale); expected 1, as Sana's"
    return None
