"""ControlNet-mlp: ControlNet with the encoder copy replaced by a pixel-wise MLP, trained from scratch.

From the author's ablation in lllyasviel/ControlNet, discussion 188: an MLP per pixel, i.e. a stack of 1 x 1
convolutions, with average pooling for downsampling and the channels of Stable Diffusion's encoder. The rest is only in
a figure there. It is read here as the paper's ControlNet-lite: one layer per block and for the middle block, each
followed by a zero convolution, added to the decoder's skips and the middle. Pixel-wise layers with the hint network's
channels (16, 32, 96, 256), one per resolution from the image to the latent, come first. So each value depends only on
the square of the image below it. The noisy latent is not an input: one pixel of noise shows an MLP no content, and
would make it run at every step.
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
    initialise_for_relu,
    listed_blocks,
    zero_convolution,
)
from controlkit.controls.encoder_copy.network import checked_config, hint_channels_for
from controlkit.controls.hints import Hint
from controlkit.controls.registry import control

_SITES = "skip"


@control
class ControlNetMLP(OneImage):
    """1 x 1 convolutions and average pooling from the condition image to zero convolutions: runs once per condition
    image.

    Args:
        blocks: of the base's encoder.
        hint_channels: of the layers before them, one more than the autoencoder's downsamplings.
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
        hint_layers = [nn.Sequential(OrderedDict(conv=nn.Conv2d(3, hint_channels[0], 1)))]
        hint_layers += [_layer(width, out_width, halving=True) for width, out_width in pairwise(hint_channels)]
        layers = [_layer(hint_channels[-1], first, halving=False)]
        for (width, depth), (out_width, out_depth) in pairwise(self.encoder_blocks):
            layers.append(_layer(width, out_width, halving=out_depth > depth))
        self.hint_network = nn.Sequential(*hint_layers)
        self.blocks = nn.ModuleList(layers)
        self.middle = _layer(last, last, halving=False)
        initialise_for_relu([self.hint_network, self.blocks, self.middle])
        self.zero_convs = nn.ModuleList(zero_convolution(channels) for channels, _ in self.encoder_blocks)
        self.middle_zero_conv = zero_convolution(last)

    @classmethod
    def for_base(cls, base: Base, condition: str | None = None, **options: Any) -> ControlNetMLP:
        """A new one, with random weights and zero convolutions.

        Raises:
            UserError: the base's encoder does not fit.
        """
        new = cls(
            blocks=blocks_of(base, _SITES, cls.title),
            hint_channels=hint_channels_for(base, cls.title),
            condition=condition,
        )
        return new.to(base.device, base.dtype)

    def encode(self, condition_image: Tensor, base: Base) -> Tensor:
        """Condition images `[B, 3, H, W]` in [0, 1] => features `[B, hint_channels[-1], h, w]`."""
        weight = self.middle_zero_conv.weight
        return self.hint_network(condition_image.to(weight.device, weight.dtype))

    def forward(self, x_t: Tensor | None, t: Tensor, text: Text | None, hint: Hint) -> Residuals:
        assert isinstance(hint, Tensor)
        residuals = []
        stream = hint
        for layer, zero_conv in zip(self.blocks, self.zero_convs, strict=True):
            stream = layer(stream)
            residuals.append(zero_conv(stream))
        return Residuals.numbered(_SITES, residuals, middle=self.middle_zero_conv(self.middle(stream)))

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
    """One layer of the MLP; neighbouring pixels mix only in the pooling."""
    parts: OrderedDict[str, nn.Module] = OrderedDict(act=nn.ReLU())
    if halving:
        parts["pool"] = nn.AvgPool2d(2, ceil_mode=True)  # rounds up, as the base does
    parts["conv"] = nn.Conv2d(channels, out, 1)
    return nn.Sequential(parts)
