"""Offset transfer: a control of one base, moved to another of the same shape.

control of B = control of A + (B - A), on the weights that a control copies from its base (lllyasviel/ControlNet,
tool_transfer_control.py). Zero convolutions and hint networks have no counterpart in a base and stay.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TypeVar

import torch

from controlkit.bases.base import Base
from controlkit.controls.control import Control
from controlkit.errors import UserError

LIMITS = (
    "Transfer assumes that the control moved little from its base; after long training it may do worse than the"
    " control as it is. Try both: a control also runs on the other base unchanged. What a base draws differently"
    " (its style) it draws differently under control too. A text encoder that differs between the bases is not"
    " corrected for, nor is a decoder that was trained along with the control (ControlNet 1.0)."
)
"""Said whenever a control was transferred."""

Transferable = TypeVar("Transferable", bound=Control)


@dataclass(frozen=True, kw_only=True)
class Offset:
    """How far two bases are apart, where a control copies them."""

    moved: int
    """Tensors that were shifted."""
    kept: int
    """Tensors of the control that no base has."""
    distance: float
    """Norm of B - A over the norm of A, on the shifted tensors."""


@torch.no_grad()
def transfer(control: Transferable, source: Base, target: Base) -> tuple[Transferable, Offset]:
    """A copy of `control`, which was trained on `source`, for `target`.

    A base control's adapters go along unchanged: they are taken on the copy too, though its fingerprint is another.
    That what training changed does the same on the other base is the assumption of the offset itself, for the adapters
    as for the control; it is not a fact, so look at the images.

    Raises:
        UserError: the two bases have different shapes, or the control does not fit them.
    """
    a, b = source.denoiser.state_dict(), target.denoiser.state_dict()
    made = copy.deepcopy(control)
    network = made.copied_network()
    if network is None:
        raise UserError(f"{made.title} has no copy of a base, which is what is moved")
    made.mark_transferred()
    moved = kept = 0
    change = size = 0.0
    for name, value in network.state_dict().items():
        if name not in a:
            kept += 1
            continue
        if name not in b or a[name].shape != b[name].shape or a[name].shape != value.shape:
            theirs = list(b[name].shape) if name in b else "none"
            raise UserError(
                f"{name} has the shape {list(value.shape)} in the control, {list(a[name].shape)} in {source.name} and"
                f" {theirs} in {target.name}; transfer needs one shape in all three"
            )
        offset = b[name].float() - a[name].float()
        value.copy_(value.float() + offset.to(value.device))
        change += float(offset.pow(2).sum())
        size += float(a[name].float().pow(2).sum())
        moved += 1
    if not moved:
        raise UserError(f"the control shares no tensor with {source.name}; it was not made for a base of this shape")
    return made, Offset(moved=moved, kept=kept, distance=(change / size) ** 0.5 if size else 0.0)
