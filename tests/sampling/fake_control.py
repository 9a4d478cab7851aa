"""A control whose residuals are known, and which writes down when it runs."""

from __future__ import annotations

import torch
from torch import nn

from controlkit.bases.residuals import Residuals
from controlkit.controls.control import Control, Reads

SHAPES = [(16, 16), (16, 16), (16, 8), (32, 8)]
"""Channels and side of the tiny base's skips at 64 x 64; its middle is as the last."""


class FakeControl(Control):
    """Residuals from time, text and hint by a sine; writes down the size of each of its batches."""

    kind = "fake"
    title = "a fake control"
    enters = "decoder skips and middle"
    condition = None

    def __init__(self, reads: Reads) -> None:
        super().__init__()
        self.reads = reads
        self.uses = reads
        self.batches: list[int] = []
        self.weight = nn.Parameter(torch.linspace(-1, 1, 32), requires_grad=False)

    def pretending_to_read(self, reads: Reads) -> FakeControl:
        """The same function, declared to read more than it does."""
        self.reads = reads
        return self

    def encode(self, condition_image, base):
        return condition_image.mean((1, 2, 3))[:, None]

    def forward(self, x_t, t, text, hint):
        batch = len(t)
        self.batches.append(batch)
        assert len(hint) in (1, batch)
        assert (x_t is not None) == (Reads.NOISE in self.reads)
        value = hint[:, 0].expand(batch).clone()
        if Reads.TIME in self.uses:
            value = value + torch.sin(t / 100)
        if Reads.TEXT in self.uses:
            value = value + text.tokens.abs().mean((1, 2))
        value = value[:, None, None, None] * 2
        down = tuple(value * self.weight[:c, None, None].expand(c, side, side) for c, side in SHAPES)
        return Residuals.numbered("skip", down, middle=value * self.weight[:, None, None].expand(32, 8, 8))

    def trainable_parameters(self):
        return list(self.parameters())

    def config(self):
        return {}

    @classmethod
    def from_config(cls, config, condition=None):
        return cls(Reads.NOTHING)

    @classmethod
    def for_base(cls, base, condition=None, **options):
        return cls(Reads.NOTHING)
