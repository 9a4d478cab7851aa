"""T2I-Adapter (Mou et al., AAAI 2024, arXiv 2302.08453) on diffusers' `T2IAdapter`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import T2IAdapter
from torch import Tensor, nn

from controlkit.bases.base import Base, Text, encoder_stages
from controlkit.bases.residuals import Residuals
from controlkit.controls.control import Control, Reads, Site
from controlkit.errors import UserError

FULL, FULL_XL, LIGHT = "full_adapter", "full_adapter_xl", "light_adapter"
"""Names of the three networks, as diffusers' configs have them."""

_GREY = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in a grey picture (ITU-R BT.601), as Pillow's `convert("L")` has them."""
_RES_BLOCKS = {FULL: 2, FULL_XL: 2, LIGHT: 4}
"""Residual blocks of a stage, as in TencentARC/T2I-Adapter."""


class T2IAdapterControl(Control):
    """A small network of its own, from the condition image to one feature map for each stage of the base's encoder.

    It copies nothing of the base and sees neither noise nor time nor prompt, so it runs once for a condition. It has no
    zero convolutions: a new one starts from torch's random initialisation of convolutions, as the reference's does
    (TencentARC/T2I-Adapter, branch SD, ldm/modules/encoders/adapter.py), and changes pictures from the first step.
    """

    kind: ClassVar[str] = "t2i-adapter"
    reads: ClassVar[Reads] = Reads.NOTHING
    site: ClassVar[Site] = Site.ENCODER_STAGES

    def __init__(self, network: T2IAdapter, condition: str | None = None) -> None:
        super().__init__()
        self.network = network
        self.condition = condition

    @classmethod
    def for_base(
        cls, base: Base, condition: str | None = None, *, colours: int = 3, light: bool = False
    ) -> T2IAdapterControl:
        """A new one, of random weights; `condition`, `colours` and `light` as in `config_for`.

        Raises:
            UserError: no adapter has the shape of the base's encoder.
        """
        config = config_for(dict(base.unet.config), base.factor, colours=colours, light=light)
        return cls(nn.Module.to(T2IAdapter(**config), base.device, base.dtype), condition)

    def encode(self, condition_image: Tensor, base: Base) -> Tensor:
        """Condition images `[B, 3, H, W]` in [0, 1] => the same, or grey `[B, 1, H, W]` if the network takes that."""
        weight = next(self.network.parameters())
        image = condition_image.to(weight.device, weight.dtype)
        if self.network.config["in_channels"] == 3:
            return image
        return (image * image.new_tensor(_GREY)[:, None, None]).sum(1, keepdim=True)

    def forward(self, x_t: Tensor | None, t: Tensor, text: Text | None, hint: Tensor) -> Residuals:
        return Residuals(encoder=tuple(self.network(hint)))

    def misfit(self, base: Base) -> str | None:
        mine, theirs = feature_stages(self.network.config), base.encoder_stages
        colours = self.network.config["in_channels"]
        if colours not in (1, 3):
            return f"it takes condition images of {colours} colours, not of 3 or of 1 (grey)"
        if mine in (theirs, theirs[:-1]):
            return None
        return f"its features are {listed_stages(mine)}, the stages of the base's encoder {listed_stages(theirs[:-1])}"

    def trainable_parameters(self) -> list[nn.Parameter]:
        return list(self.parameters())

    def config(self) -> dict[str, Any]:
        return {key: value for key, value in self.network.config.items() if not key.startswith("_")}

    def to_diffusers(self) -> T2IAdapter:
        """diffusers' own network, the very one that is used here; saving it writes diffusers' layout."""
        return self.network

    def diffusers_state_dict(self) -> dict[str, Tensor]:
        """The weights under diffusers' names."""
        return dict(self.network.state_dict())


def feature_stages(config: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
    """What a network of `config` makes: for each feature its channels, and the pixels of a picture to one of it."""
    channels, first, kind = list(config["channels"]), config["downscale_factor"], config["adapter_type"]
    if kind == FULL_XL:
        return tuple((wide, first * (1 if place < 2 else 2)) for place, wide in enumerate(channels))
    if kind == LIGHT:
        channels.append(channels[-1])
    return tuple((wide, first * 2**place) for place, wide in enumerate(channels))


def config_for(unet_config: Mapping[str, Any], factor: int, *, colours: int = 3, light: bool = False) -> dict[str, Any]:
    """The config of diffusers' `T2IAdapter` whose features fit the encoder of a UNet.

    Args:
        factor: pixels of a picture to one of its latent, along each side.
        colours: of the condition image that the network takes: 3, or 1 for grey (sketch, canny).
        light: the small network with a quarter of the channels inside, where its shape fits.

    Raises:
        UserError: none has that shape.
    """
    stages = encoder_stages(unet_config, factor)
    channels = [wide for wide, _ in stages]
    # The last of `channels` is the middle's, which XL reaches too; a light network adds its last stage by itself.
    tried = (
        [(LIGHT, channels[:-2])] if light else [(FULL, channels[:-1]), (FULL_XL, channels), (FULL_XL, channels[:-1])]
    )
    for kind, wide in tried:
        config: dict[str, Any] = {
            "in_channels": colours,
            "channels": wide,
            "num_res_blocks": _RES_BLOCKS[kind],
            "downscale_factor": stages[0][1],
            "adapter_type": kind,
        }
        if wide and feature_stages(config) in (stages, stages[:-1]):
            return config
    raise UserError(
        f"no {'light ' if light else ''}T2I-Adapter has the shape of this base's encoder: {listed_stages(stages[:-1])}"
    )


def build_t2i_adapter(config: dict[str, Any], state: dict[str, Tensor], condition: str | None) -> T2IAdapterControl:
    """A `T2IAdapterControl` from diffusers' config and weights (strict: a missing or unknown key is an error)."""
    with torch.device("meta"):
        network = T2IAdapter.from_config(config)
    network.load_state_dict(state, strict=True, assign=True)
    return T2IAdapterControl(network.eval(), condition)


def listed_stages(stages: tuple[tuple[int, int], ...]) -> str:
    """Stages in words: `320 channels at 1/8, 640 at 1/16`."""
    first, *rest = (f"{wide}{{}} at 1/{pixels}" for wide, pixels in stages)
    return ", ".join([first.format(" channels"), *(one.format("") for one in rest)])
