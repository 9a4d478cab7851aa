"""Floating-point operations, counted on the meta device: no weights, no memory, seconds.

The cost of a control is what the base costs under it less what the base costs alone. A multiplication and an addition
count as two, as torch's own counter has it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from controlkit.bases.base import Base
from controlkit.bases.meta import meta_text
from controlkit.controls.apply import predict_under
from controlkit.controls.control import Acts, Control, Reads, encode_images

_CALLED = {"unet": "UNet"}
"""Component -> what a table calls it, where that is not its name."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Operations of a control, for one condition and one half of guidance."""

    once: int
    """For a condition, however many steps and images."""
    step: int
    """For a step, however many images."""
    image: int
    """For every image at every step."""

    def to_json(self) -> dict[str, float]:
        """In units of 1e9, what is none left out."""
        named = {"once for a condition": self.once, "once a step": self.step, "each step of each image": self.image}
        return {name: giga(count) for name, count in named.items() if count} or {"once for a condition": 0.0}


def is_countable(control: Control | type[Control]) -> bool:
    """Whether a control needs images alone; what another costs depends on what it is given."""
    needed = [one for one in control.inputs if one.required]
    return bool(needed) and all(one.kind == "image" for one in needed)


@torch.no_grad()
def cost_of(control: Control, base: Base, side: int) -> Cost:
    """The cost of a control, for images of `side` x `side` pixels.

    Args:
        control: on the meta device, as `base`; `is_countable` holds of it. It is given what it needs, nothing optional.
    """
    x_t, t, text = _inputs(base, side)
    images = {one.name: torch.empty(1, 3, side, side, device="meta") for one in control.inputs if one.required}
    inputs: Any = next(iter(images.values())) if len(control.inputs) == 1 else images
    once = _count(lambda: control.encode(inputs, base))
    hint = control.encode(inputs, base)
    alone = _count(lambda: base.predict(x_t, t, text))
    ahead = _count(lambda: control(x_t, t, text, hint)) if Acts.RESIDUALS in control.acts else 0
    inside = _count(lambda: predict_under(control, base, x_t, t, text, hint)) - alone - ahead
    reads = control.reads
    return Cost(
        once=once + (0 if reads & (Reads.NOISE | Reads.TIME) else ahead),
        step=ahead if Reads.TIME in reads and Reads.NOISE not in reads else 0,
        image=inside + (ahead if Reads.NOISE in reads else 0),
    )


@torch.no_grad()
def cost_without_base(control: Control, side: int) -> Cost:
    """The cost of a control that reads nothing, whose base is not known: all of it is done once."""
    image = torch.empty(1, 3, side, side, device="meta")
    base: Any = None  # which it does not look at
    t = torch.ones(1, device="meta")
    return Cost(once=_count(lambda: control(None, t, None, encode_images(control, image, base))), step=0, image=0)


@torch.no_grad()
def base_flops(base: Base, side: int) -> dict[str, float]:
    """Of a base on the meta device, in units of 1e9: one call of its network, and encoding one image."""
    x_t, t, text = _inputs(base, side)
    image = torch.empty(1, 3, side, side, device="meta")
    own = base.denoiser_component().name
    return {
        f"{_CALLED.get(own, own)} call": giga(_count(lambda: base.predict(x_t, t, text))),
        "autoencoder, encoding": giga(_count(lambda: base.encode_image(image))),
    }


def giga(operations: int) -> float:
    """In units of 1e9."""
    return round(operations / 1e9, 3)


def _inputs(base: Base, side: int) -> tuple[Tensor, Tensor, Any]:
    latent = side // base.factor
    x_t = torch.empty(1, base.latent_channels, latent, latent, device="meta")
    return x_t, torch.ones(1, device="meta"), meta_text(base)


def _count(run: Callable[[], Any]) -> int:
    counter = FlopCounterMode(display=False)
    with counter:
        run()
    return counter.get_total_flops()
