"""ControlNet-mlp: a pixel-wise multilayer perceptron in the place of ControlNet's copy of the encoder, from scratch.

From the author's ablation in lllyasviel/ControlNet, discussion 188: an MLP on each pixel, which is a stack of 1 x 1
convolutions, with average pooling for halvings, and the channels of Stable Diffusion's own encoder. The discussion
shows the rest in a drawing alone. It is read here as the skeleton of the paper's ControlNet-lite: one layer in place of
each block and of the middle, each followed by ControlNet's zero convolution, into the decoder's skips and the middle.
Before them stand layers of the hint network's channels (16, 32, 96, 256), pixel-wise too, one for each size
from the image's to the latent's. So a value depends on the square of the image below it and on nothing else. The noisy
latent is not given to it: a perceptron of one pixel's noise sees no content in it, and would run at every step.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar

from torch import Tensor, nn

from controlkit.bases.base import Base
from controlkit.bases.residuals import Residuals
from controlkit.bases.text import Text
from controlkit.controls.control import OneImage, Reads
from controlkit.controls.controlnet_lite import (
    Blocks,
    block_incompatibility,
    blocks_of,
    checked_blocks,
    hint_channels_for,
    initialise_for_relu,
    listed_blocks,
    zero_convolution,
)
from controlkit.controls.encoder_copy.network import checked_config
from controlkit.controls.hints import Hint
from controlkit.controls.registry import control

_SITES = "skip"


@control
class ControlNetMLP(OneImage):
    """1 x 1 convolutions and average pooling from the condition image to zero convolutions: once for a condition.

    Args:
        blocks: of the base's encoder.
        hint_channels: of the layers before them, one more than the autoencoder has halvings.
    """

    kind: ClassVar[str] = "controlnet-mlp"
    title: ClassVar[str] = "a ControlNet-mlp"
    paper: ClassVar[str] = "Zhang 2023, lllyasviel/ControlNet, discussion 188"
    reads: ClassVar[Reads] = Reads.NOTHING
    enters: ClassVar[str] = "decoder skips and middle"
    not_elsewhere: ClassVar[str] = "no other tool has such a network"

    def __init__(self, *, blocks: Blocks, hint_channels: Sequence[int], condition: str | None = None) -> None:
        super().__init__()
        self.encoder_blocks, self.hint_channels = checked_blocks(blocks), list(hint_channels)
        self.condition = condition
        first, last = self.encoder_blocks[0][0], self.encoder_blocks[-1][0]
        hints = [nn.Sequential(OrderedDict(conv=nn.Conv2d(3, hint_channels[0], 1)))]
        hints += [_layer(wide, out, halving=True) for wide, out in pairwise(hint_channels)]
        layers = [_layer(hint_channels[-1], first, halving=False)]
        for (wide, before), (out, after) in pairwise(self.encoder_blocks):
            layers.append(_layer(wide, out, halving=after > before))
        self.hint_network = nn.Sequential(*hints)
        self.blocks = nn.ModuleList(layers)
        self.middle = _layer(last, last, halving=False)
        initialise_for_relu([self.hint_network, self.blocks, self.middle])
        self.zero_convs = nn.ModuleList(zero_convolution(channels) for channels, _ in self.encoder_blocks)
        self.middle_zero_conv = zero_convolution(last)

    @classmethod
    def for_base(cls, base: Base, condition: str | None = None, **options: Any) -> ControlNetMLP:
        """A new one, of random weights and zero convolutions.

        Raises:
            UserError: the base has no encoder that it fits.
        """
        made = cls(
            blocks=blocks_of(base, _SITES, cls.title),
            hint_channels=hint_channels_for(base, cls.title),
            condition=condition,
        )
        return made.to(base.device, base.dtype)

    def encode(self, condition_image: Tensor, base: Base) -> Tensor:
        """Condition images `[B, 3, H, W]` in [0, 1] => features `[B, hint_channels[-1], h, w]`."""
        weight = self.middle_zero_conv.weight
        return self.hint_network(condition_image.to(weight.device, weight.dtype))

    def forward(self, x_t: Tensor | None, t: Tensor, text: Text | None, hint: Hint) -> Residuals:
        assert isinstance(hint, Tensor)
        made = []
        stream = hint
        for layer, zero_conv in zip(self.blocks, self.zero_convs, strict=True):
            stream = layer(stream)
            made.append(zero_conv(stream))
        return Residuals.numbered(_SITES, made, middle=self.middle_zero_conv(self.middle(stream)))

    def incompatibility(self, base: Base) -> str | None:
        return block_incompatibility(self.encoder_blocks, self.hint_channels, base, _SITES)

    def trainable_parameters(self) -> list[nn.Parameter]:
        return list(self.parameters())

    def config(self) -> dict[str, Any]:
        return {"blocks": [list(block) for block in self.encoder_blocks], "hint_channels": self.hint_channels}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], condition: str | None = None) -> ControlNetMLP:
        return cls(**checked_config(config), condition=condition).eval()

    @classmethod
    def needs(cls, config: Mapping[str, Any]) -> str:
        return f"a base whose encoder has blocks of {listed_blocks(config['blocks'], config['hint_channels'])}"


def _layer(channels: int, out: int, *, halving: bool) -> nn.Sequential:
    """One layer of the perceptron; neighbours meet in the pooling alone."""
    parts: OrderedDict[str, nn.Module] = OrderedDict(act=nn.ReLU())
    if halving:
        parts["pool"] = nn.AvgPool2d(2, ceil_mode=True)  # the base rounds up, too
    parts["conv"] = nn.Conv2d(channels, out, 1)
    return nn.Sequential(parts)
