"""ControlNet (Zhang, Rao and Agrawala, ICCV 2023, arXiv 2302.05543) on diffusers' `ControlNetModel`."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers import ControlNetModel
from torch import Tensor, nn

from controlkit.bases.base import Base, Text
from controlkit.bases.residuals import Residuals
from controlkit.controls.control import Control, Reads, Site, copy_misfit

HINT_CHANNELS = {2: (16, 32), 4: (16, 32, 64), 8: (16, 32, 96, 256), 16: (16, 32, 96, 256, 256)}


class ControlNet(Control):
    """A trainable copy of the base's encoder and middle, joined to it by zero convolutions.

    The hint network (convolutions from the condition image to the size of the latent) is held apart from
    diffusers' network, because what it makes depends on the condition alone: it runs once, not at every step.
    """

    kind: ClassVar[str] = "controlnet"
    reads: ClassVar[Reads] = Reads.NOISE | Reads.TIME | Reads.TEXT
    site: ClassVar[Site] = Site.DECODER_SKIPS

    def __init__(self, network: ControlNetModel, condition: str | None = None) -> None:
        super().__init__()
        self.hint_network: nn.Module = network.controlnet_cond_embedding
        network.controlnet_cond_embedding = nn.Identity()
        self.channel_order = network.config["controlnet_conditioning_channel_order"]
        network.register_to_config(controlnet_conditioning_channel_order="rgb")  # the picture is turned, in `encode`
        self.network = network
        self.condition = condition

    @classmethod
    def for_base(cls, base: Base, condition: str | None = None) -> ControlNet:
        """A new one: encoder and middle copied from `base`, zero convolutions, a fresh hint network.

        The hint network has one halving for each of the autoencoder's (at factor 8: 16, 32, 96, 256 channels, as
        in lllyasviel/ControlNet, cldm/cldm.py).
        """
        network = ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=HINT_CHANNELS[base.factor])
        return cls(nn.Module.to(network, base.device, base.dtype), condition)

    def to_diffusers(self) -> ControlNetModel:
        """diffusers' own network with the same weights, sharing memory; saving it writes diffusers' layout."""
        network = ControlNetModel.from_config(self.config())
        network.load_state_dict(self.diffusers_state_dict(), assign=True)
        return network.eval()

    def diffusers_state_dict(self) -> dict[str, Tensor]:
        """The weights under diffusers' names."""
        hint = {f"controlnet_cond_embedding.{k}": v for k, v in self.hint_network.state_dict().items()}
        return {**self.network.state_dict(), **hint}

    def encode(self, condition_image: Tensor, base: Base) -> Tensor:
        weight = next(self.hint_network.parameters())
        if self.channel_order == "bgr":
            condition_image = condition_image.flip(1)
        return self.hint_network(condition_image.to(weight.device, weight.dtype))

    def forward(self, x_t: Tensor | None, t: Tensor, text: Text | None, hint: Tensor) -> Residuals:
        assert x_t is not None and text is not None
        down, mid = self.network(
            x_t,
            t,
            **text.inputs(),
            controlnet_cond=hint,
            return_dict=False,
        )
        return Residuals(tuple(down), mid)

    def misfit(self, base: Base) -> str | None:
        if (colours := self.network.config["conditioning_channels"]) != 3:
            return f"it takes condition images of {colours} channels, not of 3 (RGB)"
        halvings = len(self.network.config["conditioning_embedding_out_channels"]) - 1
        if 2**halvings != base.factor:
            apart = f"its hint network divides the picture by {2**halvings}, the base's autoencoder by {base.factor}"
        else:
            apart = None
        return copy_misfit(self.config(), base) or apart

    def trainable_parameters(self) -> list[nn.Parameter]:
        return list(self.parameters())

    def config(self) -> dict[str, Any]:
        plain = {key: value for key, value in self.network.config.items() if not key.startswith("_")}
        return {**plain, "controlnet_conditioning_channel_order": self.channel_order}

    @property
    def conditional_only(self) -> bool:
        # diffusers' pipelines do so for a network that pools (shuffle): it is conditioned on no places.
        return bool(self.network.config["global_pool_conditions"])


def build_controlnet(config: dict[str, Any], state: dict[str, Tensor], condition: str | None) -> ControlNet:
    """A `ControlNet` from diffusers' config and weights (strict: a missing or unknown key is an error)."""
    if not isinstance(config, dict):
        # diffusers takes a string for the name of a model and looks for it on the hub.
        raise ValueError(f"the config is not a mapping but {config!r}")
    with torch.device("meta"):
        network = ControlNetModel.from_config(config)
    network.load_state_dict(state, strict=True, assign=True)
    return ControlNet(network.eval(), condition)
