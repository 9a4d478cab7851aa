"""ControlNet on diffusers' `ControlNetModel`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from diffusers import ControlNetModel
from torch import Tensor, nn

from controlkit.bases.base import Base
from controlkit.bases.residuals import Residuals
from controlkit.bases.text import Text
from controlkit.bases.unet import unet_inputs
from controlkit.controls.control import Control, OneImage, Reads, Training
from controlkit.controls.controlnet.formats import FORMATS
from controlkit.controls.encoder_copy.names import config_of
from controlkit.controls.encoder_copy.network import (
    HINT_CHANNELS,
    base_needed,
    checked_config,
    copy_incompatibility,
    missing_heads,
    plain_config,
    with_heads,
)
from controlkit.controls.file_format import Checkpoint
from controlkit.controls.hints import Hint
from controlkit.controls.registry import control

_POOLS = "global_pool_conditions"


@dataclass(frozen=True, kw_only=True)
class Start:
    """Recipe settings of a ControlNet."""

    start: str | None = None
    """Initial weights: a ControlNet file or folder in any format, or the name of a shipped one. Default: a copy of the
    base's encoder."""
    prompt_drop: float = 0.5
    """Fraction of prompts replaced by the empty prompt."""


@control
class ControlNet(OneImage):
    """A trainable copy of the base's encoder and middle block, joined to it by zero convolutions.

    The hint network (convolutions from the condition image to the size of the latent) is separate from diffusers'
    network, because its output depends on the condition image alone: it runs once, not at every step.
    """

    kind: ClassVar[str] = "controlnet"
    title: ClassVar[str] = "a ControlNet"
    paper: ClassVar[str] = "Zhang, Rao and Agrawala 2023, arXiv 2302.05543"
    architecture: ClassVar[str | None] = "control-net"
    reads: ClassVar[Reads] = Reads.NOISE | Reads.TIME | Reads.TEXT
    enters: ClassVar[str] = "decoder skips and middle"
    formats = FORMATS
    convert_flags: ClassVar[tuple[str, ...]] = ("pooled",)
    diffusers_class: ClassVar[str | None] = "ControlNetModel"
    trainings = (
        Training(
            system="controlnet",
            also=("controlnet-pairs",),
            options=Start,
            doc="A ControlNet, one condition. Half the prompts are dropped (Zhang et al. 2023, section 3.3).",
        ),
    )

    def __init__(self, network: ControlNetModel, condition: str | None = None) -> None:
        super().__init__()
        self.hint_network: nn.Module = network.controlnet_cond_embedding
        network.controlnet_cond_embedding = nn.Identity()
        self.channel_order = network.config["controlnet_conditioning_channel_order"]
        network.register_to_config(controlnet_conditioning_channel_order="rgb")  # `encode` reorders the image
        self.network = network
        self.condition = condition

    @classmethod
    def for_base(cls, base: Base, condition: str | None = None, **options: Any) -> ControlNet:
        """A new one: encoder and middle block copied from `base`, zero convolutions, a random hint network.

        The hint network downsamples as often as the autoencoder (at factor 8: 16, 32, 96, 256 channels, as in
        lllyasviel/ControlNet, cldm/cldm.py).
        """
        network = ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=HINT_CHANNELS[base.factor])
        return cls(nn.Module.to(network, base.device, base.dtype), condition)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], condition: str | None = None) -> ControlNet:
        return cls(ControlNetModel.from_config(with_heads(checked_config(config))).eval(), condition)

    @classmethod
    def config_of(cls, tensors: Mapping[str, Tensor], unet_config: Mapping[str, Any] | None = None) -> dict[str, Any]:
        return config_of(tensors, unet_config)

    @classmethod
    def is_native(cls, tensors: Mapping[str, Tensor]) -> bool:
        families = {name.partition(".")[0] for name in tensors}
        return {"controlnet_down_blocks", "controlnet_cond_embedding"} <= families

    @classmethod
    def missing_setting(cls, config: Mapping[str, Any]) -> str | None:
        return missing_heads(config)

    def config(self) -> dict[str, Any]:
        return {**plain_config(self.network), "controlnet_conditioning_channel_order": self.channel_order}

    def file_state(self) -> dict[str, Tensor]:
        hint = {f"controlnet_cond_embedding.{k}": v for k, v in self.hint_network.state_dict().items()}
        return {**self.network.state_dict(), **hint}

    def load_file_state(self, state: Mapping[str, Tensor]) -> None:
        prefix = "controlnet_cond_embedding."
        hint = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        rest = {name: value for name, value in state.items() if not name.startswith(prefix)}
        self.hint_network.load_state_dict(hint, strict=True, assign=True)
        self.network.load_state_dict(rest, strict=True, assign=True)

    def to_diffusers(self) -> ControlNetModel:
        """diffusers' network with the same weights, sharing memory; saving it writes diffusers' folder."""
        network = ControlNetModel.from_config(self.config())
        network.load_state_dict(self.file_state(), assign=True)
        return network.eval()

    def encode(self, condition_image: Tensor, base: Base) -> Tensor:
        weight = next(self.hint_network.parameters())
        if self.channel_order == "bgr":
            condition_image = condition_image.flip(1)
        return self.hint_network(condition_image.to(weight.device, weight.dtype))

    def forward(self, x_t: Tensor | None, t: Tensor, text: Text | None, hint: Hint) -> Residuals:
        assert x_t is not None and text is not None
        down, middle = self.network(x_t, t, **unet_inputs(text), controlnet_cond=hint, return_dict=False)
        return Residuals.numbered("skip", down, middle=middle)

    def incompatibility(self, base: Base) -> str | None:
        if (channels := self.network.config["conditioning_channels"]) != 3:
            return f"it takes condition images of {channels} channels, not 3 (RGB)"
        halvings = len(self.network.config["conditioning_embedding_out_channels"]) - 1
        if 2**halvings != base.factor:
            reason = f"its hint network divides the image by {2**halvings}, the base's autoencoder by {base.factor}"
        else:
            reason = None
        return copy_incompatibility(self.config(), base) or reason

    @property
    def conditional_only(self) -> bool:
        # As in diffusers' pipelines for a network that pools its residuals (shuffle).
        return bool(self.network.config[_POOLS])

    def trainable_parameters(self) -> list[nn.Parameter]:
        return list(self.parameters())

    @classmethod
    def for_training(
        cls,
        base: Base,
        conditions: Sequence[str],
        options: Mapping[str, Any],
        *,
        name: str,
        seed: int,
        start: Control | None = None,
        companion: Control | None = None,
    ) -> Control:
        settings = {key: value for key, value in options.items() if key != "start"}
        return super().for_training(base, conditions, settings, name=name, seed=seed, start=start)

    def copied_network(self) -> nn.Module:
        return self.network

    @classmethod
    def settle_checkpoint(cls, checkpoint: Checkpoint, flags: Collection[str]) -> None:
        """Record that it pools its residuals, which no tensor shows: with `pooled`, or if the condition is `shuffle`
        and the file has no such entry."""
        pooled = "pooled" in flags
        if not pooled and checkpoint.condition == "shuffle" and _POOLS not in checkpoint.config:
            checkpoint.notes.append("it is written with pooled residuals, as in ControlNet 1.1's shuffle")
            pooled = True
        if pooled:
            checkpoint.config[_POOLS] = True

    @classmethod
    def needs(cls, config: Mapping[str, Any]) -> str:
        return base_needed(config)
