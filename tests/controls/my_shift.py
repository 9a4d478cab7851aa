"""A made-up system outside the package that acts by residuals and says nothing but what it has to."""

from __future__ import annotations

from torch import nn
from torch.nn.functional import adaptive_avg_pool2d

from controlkit.bases.residuals import Residuals
from controlkit.controls.control import OneImage, Reads
from controlkit.controls.registry import control


@control
class Shift(OneImage):
    """Mean colours around a place and the prompt -> an addition to the middle of the base."""

    kind = "shift"
    title = "a shift"
    enters = "middle"
    reads = Reads.TEXT

    def __init__(self, config, condition=None):
        super().__init__()
        self.condition = condition
        self.settings = dict(config)
        self.shift = nn.Conv2d(3, config["channels"], 1)
        self.gate = nn.Linear(config["text_width"], config["channels"])
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def encode(self, condition_image, base):
        side = base.sites["middle"][1]
        size = [length // side for length in condition_image.shape[2:]]
        return adaptive_avg_pool2d(condition_image, size).to(self.gate.weight)

    def forward(self, x_t, t, text, hint):
        gate = self.gate(text.tokens.mean(1))[:, :, None, None]
        return Residuals({"middle": self.shift(hint) * gate})

    def trainable_parameters(self):
        return list(self.parameters())

    @classmethod
    def for_base(cls, base, condition=None, **options):
        config = {"channels": base.sites["middle"][0], "text_width": base.unet.config.cross_attention_dim}
        return cls(config, condition).to(base.device, base.dtype)

    def config(self):
        return dict(self.settings)

    @classmethod
    def from_config(cls, config, condition=None):
        return cls(config, condition)
