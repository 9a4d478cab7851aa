"""The networks of ControlNet's soft edges and line art, with the parameter names of their files.

This module imports torch; import it inside functions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class HED(nn.Module):
    """Holistically nested edge detection (Xie and Tu 2015) as retrained for ControlNet: `ControlNetHED.pth`.

    `[B, 3, h, w]` RGB from 0 to 255 => edges `[B, 1, h, w]` in [0, 1]: the sigmoid of the mean of five side outputs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.zeros(1, 3, 1, 1))
        widths, depths = (3, 64, 128, 256, 512, 512), (2, 2, 3, 3, 3)
        for number, depth in enumerate(depths):
            setattr(self, f"block{number + 1}", _Stage(widths[number], widths[number + 1], depth))

    def forward(self, pixels: Tensor) -> Tensor:
        """The edges of `pixels`."""
        features, total = pixels - self.norm, torch.zeros_like(pixels[:, :1])
        for number in range(1, 6):
            if number > 1:
                features = functional.max_pool2d(features, 2)
            features, side = getattr(self, f"block{number}")(features)
            total = total + functional.interpolate(side, pixels.shape[-2:], mode="bilinear", align_corners=False)
        return torch.sigmoid(total / 5)


class _Stage(nn.Module):
    def __init__(self, in_width: int, width: int, depth: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(in_width if n == 0 else width, width, 3, padding=1) for n in range(depth))
        self.projection = nn.Conv2d(width, 1, 1)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        for convolution in self.convs:
            features = functional.relu(convolution(features))
        return features, self.projection(features)


class LineDrawing(nn.Module):
    """The generator of informative drawings (Chan, Durand and Isola 2022), three blocks: `sk_model.pth`.

    `[B, 3, h, w]` RGB in [0, 1], sides multiples of 4 => dark lines on white `[B, 1, h, w]` in [0, 1].
    """

    def __init__(self) -> None:
        super().__init__()
        self.model0 = nn.Sequential(nn.ReflectionPad2d(3), nn.Conv2d(3, 64, 7), nn.InstanceNorm2d(64), nn.ReLU())
        self.model1 = nn.Sequential(
            *(nn.Conv2d(64, 128, 3, stride=2, padding=1), nn.InstanceNorm2d(128), nn.ReLU()),
            *(nn.Conv2d(128, 256, 3, stride=2, padding=1), nn.InstanceNorm2d(256), nn.ReLU()),
        )
        self.model2 = nn.Sequential(*(_Residual(256) for _ in range(3)))
        self.model3 = nn.Sequential(*_upsample(256, 128), *_upsample(128, 64))
        self.model4 = nn.Sequential(nn.ReflectionPad2d(3), nn.Conv2d(64, 1, 7), nn.Sigmoid())

    def forward(self, pixels: Tensor) -> Tensor:
        """The drawing of `pixels`."""
        for part in (self.model0, self.model1, self.model2, self.model3):
            pixels = part(pixels)
        return self.model4(pixels)


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        first = (nn.ReflectionPad2d(1), nn.Conv2d(width, width, 3), nn.InstanceNorm2d(width))
        second = (nn.ReflectionPad2d(1), nn.Conv2d(width, width, 3), nn.InstanceNorm2d(width))
        self.conv_block = nn.Sequential(*first, nn.ReLU(), *second)

    def forward(self, features: Tensor) -> Tensor:
        return features + self.conv_block(features)


def _upsample(in_width: int, width: int) -> tuple[nn.Module, ...]:
    convolution = nn.ConvTranspose2d(in_width, width, 3, stride=2, padding=1, output_padding=1)
    return convolution, nn.InstanceNorm2d(width), nn.ReLU()
