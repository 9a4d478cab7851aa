"""Offset transfer of a control to another base of the same architecture.

control of B = control of A + (B - A), on the weights that a control copies from its base (lllyasviel/ControlNet,
tool_transfer_control.py), or makes from them (`Control.copied_from`). Zero convolutions and hint networks have no
counterpart in a base and are kept.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import TypeVar

import torch

from controlkit.bases.base import Base
from controlkit.controls.control import Control
from controlkit.controls.file_format import Checkpoint
from controlkit.errors import UserError
from controlkit.formats.metadata import OF_TENSORS

LIMITS = (
    "Transfer assumes that training moved the control little from its base; after long training the unchanged control"
    " may be better. Try both: it also runs on the other base. Differences in style between the bases remain. A"
    " different text encoder is not corrected for, nor is a decoder that was trained along with the control"
    " but is not in its file (ControlNet 1.0)."
)
"""Shown with every transferred control."""

Transferable = TypeVar("Transferable", bound=Control)


@dataclass(frozen=True, kw_only=True)
class Offset:
    """Distance between two bases, on the weights that a control copies."""

    moved: int
    """Number of shifted tensors."""
    kept: int
    """Number of the control's other tensors, which have no counterpart in the bases."""
    distance: float
    """Norm of B - A over norm of A, on the shifted tensors."""


def kept_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """Metadata of a control's file that is true of the transferred control, too, such as author and licence."""
    ours = ("control.", *OF_TENSORS)
    return {key: value for key, value in metadata.items() if not key.startswith(ours)}


def dtype_of(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype in which a file holds a control: the most precise one of several, and float16 for 8 bits."""
    dtypes = {value.dtype for value in checkpoint.tensors.values() if value.is_floating_point()}
    return reduce(torch.promote_types, (dtype if dtype.itemsize > 1 else torch.float16 for dtype in dtypes))


@torch.no_grad()
def transfer(control: Transferable, source: Base, target: Base) -> tuple[Transferable, Offset]:
    """A copy of `control`, trained on `source`, for `target`.

    A base control's adapters still load on the copy, although its fingerprint changes. The method assumes that the
    change made by training has the same effect on the other base, for adapters as for the control; check the images.

    Raises:
        UserError: the bases have different shapes, or the control does not fit them.
    """
    transferred = copy.deepcopy(control)
    network = transferred.copied_network()
    if network is None:
        raise UserError(
            f"{transferred.title} contains no copy of its base, so there is nothing to transfer; use it on the"
            " other base as it is",
            "unsupported",
        )
    transferred.mark_transferred()
    a, b = transferred.copied_from(source), transferred.copied_from(target)
    shifted = 0
    offset_squared = source_squared = 0.0
    for name, value in network.state_dict().items():
        if name not in a:
            continue
        if name not in b or a[name].shape != b[name].shape or a[name].shape != value.shape:
            target_shape = list(b[name].shape) if name in b else "none"
            raise UserError(
                f"{name} is {list(value.shape)} in the control, {list(a[name].shape)} in {source.name} and"
                f" {target_shape} in {target.name}; transfer needs equal shapes in all three",
                "incompatible",
            )
        offset = b[name].float() - a[name].float()
        value.copy_(value.float() + offset.to(value.device))
        offset_squared += float(offset.pow(2).sum())
        source_squared += float(a[name].float().pow(2).sum())
        shifted += 1
    if not shifted:
        raise UserError(
            f"the control shares no tensor with {source.name}: it was made for another architecture", "incompatible"
        )
    kept = len(transferred.file_state()) - shifted
    return transferred, Offset(
        moved=shifted, kept=kept, distance=(offset_squared / source_squared) ** 0.5 if source_squared else 0.0
    )
