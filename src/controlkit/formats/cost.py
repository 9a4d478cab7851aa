"""FLOPs, counted on the meta device: no weights, no memory, a few seconds.

The cost of a control is that of the base with it minus that of the base alone. A multiplication and an addition count
as two operations, as in torch's counter.
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
from controlkit.controls.control import Acts, Control, Reads
from controlkit.controls.inputs import Input, encode_images

_LABELS = {"unet": "UNet"}
"""Component -> label in tables, if it is not the name."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Operations of a control, for one condition image and one branch of CFG."""

    once: int
    """Per condition image, for any number of steps and images."""
    step: int
    """Per step, for any number of images."""
    image: int
    """Per image and step."""

    def to_json(self) -> dict[str, float]:
        """In units of 1e9, without zeros."""
        counts = {"once for a condition": self.once, "once a step": self.step, "each step of each image": self.image}
        return {name: giga(count) for name, count in counts.items() if count} or {"once for a condition": 0.0}


def is_countable(control: Control | type[Control]) -> bool:
    """Whether a control needs only images; the cost of others depends on their inputs."""
    counted = _counted_inputs(control)
    return bool(counted) and all(entry.kind == "image" for entry in counted)


@torch.no_grad()
def cost_of(control: Control, base: Base, side: int) -> Cost:
    """The cost of a control, for images of `side` x `side` pixels.

    Args:
        control: on the meta device, as `base`; it must be countable (`is_countable`). Optional inputs are left out,
            unless it has no others.
    """
    x_t, t, text = _inputs(base, side)
    inputs = _meta_images(control, side)
    once = _count(lambda: control.encode(inputs, base))
    hint = control.encode(inputs, base)
    base_only = _count(lambda: base.predict(x_t, t, text))
    residuals = _count(lambda: control(x_t, t, text, hint)) if Acts.RESIDUALS in control.acts else 0
    tokens = _count(lambda: control.tokens(hint)) if Acts.TOKENS in control.acts else 0
    taps = _count(lambda: predict_under(control, base, x_t, t, text, hint)) - base_only - residuals - tokens
    reads = control.reading
    return Cost(
        once=once + tokens + (0 if reads & (Reads.NOISE | Reads.TIME) else residuals),
        step=residuals if Reads.TIME in reads and Reads.NOISE not in reads else 0,
        image=taps + (residuals if Reads.NOISE in reads else 0),
    )


@torch.no_grad()
def residual_sites_of(control: Control, base: Base) -> tuple[str, ...]:
    """Sites of the residuals of a control, in order.

    Args:
        control: as of `cost_of`.
    """
    x_t, t, text = _inputs(base, base.size)
    return tuple(control(x_t, t, text, control.encode(_meta_images(control, base.size), base)))


def _meta_images(control: Control, side: int) -> Any:
    """Counted inputs of a control, on the meta device."""
    names = [entry.name for entry in _counted_inputs(control)]
    images = {name: torch.empty(1, 3, side, side, device="meta") for name in names}
    return next(iter(images.values())) if len(control.inputs) == 1 else images


def _counted_inputs(control: Control | type[Control]) -> list[Input]:
    """The required inputs; all images if none is."""
    required = [entry for entry in control.inputs if entry.required]
    return required or [entry for entry in control.inputs if entry.kind == "image"]


@torch.no_grad()
def cost_without_base(control: Control, side: int) -> Cost:
    """The cost of a control that reads nothing and whose base is unknown: all of it is computed once."""
    image = torch.empty(1, 3, side, side, device="meta")
    base: Any = None  # not used by such a control
    t = torch.ones(1, device="meta")
    return Cost(once=_count(lambda: control(None, t, None, encode_images(control, image, base))), step=0, image=0)


@torch.no_grad()
def base_flops(base: Base, side: int) -> dict[str, float]:
    """GFLOPs of a base on the meta device: one call of its denoiser, and encoding one image."""
    x_t, t, text = _inputs(base, side)
    image = torch.empty(1, 3, side, side, device="meta")
    denoiser = base.denoiser_component().name
    return {
        f"{_LABELS.get(denoiser, denoiser)} call": giga(_count(lambda: base.predict(x_t, t, text))),
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
