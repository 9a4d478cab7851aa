"""Made-up systems outside the package that take more, or something else, than one image."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d

from controlkit.bases.residuals import Residuals
from controlkit.controls.control import Control, Reads
from controlkit.controls.inputs import Input
from controlkit.controls.registry import control


def not_boxes(value):
    """What is wrong with a value that should be boxes with phrases."""
    if isinstance(value, list) and all(isinstance(box, list) and len(box) == 5 for box in value):
        return None
    return f"must be a list of [left, top, right, bottom, phrase], not {value!r}"


class AddsToMiddle(Control):
    """What both have in common: a mean over the hint's tensors, times a weight for each channel of the middle."""

    reads = Reads.NOTHING
    enters = "middle"

    def __init__(self, config, condition=None):
        super().__init__()
        self.condition = condition
        self.side = config["side"]
        self.scale = nn.Parameter(torch.arange(config["channels"]) % 19 - 9.0)

    def forward(self, x_t, t, text, hint):
        total = sum(tensor.float().flatten(1).mean(1) * (place + 1) for place, tensor in enumerate(hint.values()))
        scale = self.scale[:, None, None].expand(-1, self.side, self.side)
        return Residuals({"middle": total[:, None, None, None] * scale})

    def trainable_parameters(self):
        return [self.scale]

    @classmethod
    def for_base(cls, base, condition=None, **options):
        channels, pixels = base.sites["middle"]
        return cls({"channels": channels, "side": base.size // pixels}, condition)

    def config(self):
        return {"channels": len(self.scale), "side": self.side}

    @classmethod
    def from_config(cls, config, condition=None):
        return cls(config, condition)


BOXES = Input(name="boxes", kind="value", check=not_boxes)


@control
class Scene(AddsToMiddle):
    """Two images, one of which may be left out, and boxes with phrases."""

    kind = "scene"
    title = "a scene"
    inputs = (Input(name="edges", condition="canny"), Input(name="colours", required=False), BOXES)

    def encode(self, inputs, base):
        self.given = {name: getattr(value, "shape", value) for name, value in inputs.items()}
        hint = {"edges": adaptive_avg_pool2d(inputs["edges"], 4), "boxes": boxes_of(inputs["boxes"])}
        return {**hint, "colours": inputs["colours"].mean((2, 3))} if "colours" in inputs else hint


@control
class Boxes(AddsToMiddle):
    """Boxes with phrases alone."""

    kind = "boxes"
    title = "a control of boxes"
    inputs = (BOXES,)

    def encode(self, inputs, base):
        return {"boxes": boxes_of(inputs["boxes"])}


@control
class Optional(AddsToMiddle):
    """One image, and a number that may be left out."""

    kind = "optional"
    title = "an optional"
    inputs = (Input(name="photo"), Input(name="strength", kind="value", required=False))
    hint_is_frozen = True

    def encode(self, inputs, base):
        assert isinstance(inputs, dict)
        strength = inputs["photo"].new_full((1, 1), float(inputs.get("strength", 1)))
        return {"strength": strength, "photo": inputs["photo"].mean((2, 3)), "large": (inputs["photo"] > 2).flatten(1)}


def boxes_of(boxes):
    """`[1, n, 5]`, of the phrases their lengths."""
    return torch.tensor([[[*box[:4], len(box[4])] for box in boxes]], dtype=torch.float32).view(1, -1, 5)
