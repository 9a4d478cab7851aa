"""A ControlNet as its difference from the base's UNet, marked by a scalar `difference`.

(Mikubill/sd-webui-controlnet, extract_controlnet_diff.py; kohya-ss/ControlNet-diff-modules.) A tool that reads it adds
the UNet of the current checkpoint to every shared tensor, so one file serves a family of checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from controlkit.controls.control import Control
from controlkit.controls.encoder_copy.original import PREFIX, from_original, to_original
from controlkit.controls.file_format import Checkpoint, Reference, TensorFile, Written
from controlkit.errors import UserError

MARK = "difference"
"""Name of the scalar that marks such a file."""


def read(kind: type[Control], file: TensorFile, reference: Reference, description: str) -> Checkpoint:
    """The ControlNet: the difference plus the base's UNet."""
    if reference.unet_weights is None:
        raise UserError(
            f"{file.path} is only the difference of a ControlNet from its base; pass that base with its"
            " weights (--base)",
            "missing-setting",
        )
    prefix = PREFIX if any(name.startswith(PREFIX) for name in file.tensors) else ""
    others = [*file.others]
    inside: dict[str, Tensor] = {}
    for name, value in file.tensors.items():
        if name.startswith(prefix) and name != MARK:
            inside[name.removeprefix(prefix)] = value
        elif name != MARK:
            others.append(name)
    checkpoint = from_original(kind, file, description, inside, reference, others=tuple(others), prefix=prefix)
    check_base(file.path, checkpoint, reference.unet_weights)
    checkpoint.tensors = {
        name: value if name not in reference.unet_weights else _sum(wider(value), reference.unet_weights[name])
        for name, value in checkpoint.tensors.items()
    }
    return checkpoint


def write(checkpoint: Checkpoint, reference: Reference) -> Written:
    """The difference from the base's UNet."""
    if reference.unet_weights is None:
        raise UserError("writing a difference needs the base with its weights (--base)", "missing-setting")
    unet = reference.unet_weights
    check_base("the control", checkpoint, unet)
    differences = {name: _sum(value, -unet[name]) for name, value in checkpoint.tensors.items() if name in unet}
    inexact = [
        not torch.equal(_sum(value, unet[name]), checkpoint.tensors[name]) for name, value in differences.items()
    ]
    reduced = Checkpoint(checkpoint.kind, checkpoint.config, {**checkpoint.tensors, **differences}, checkpoint.metadata)
    tensors = {**to_original(reduced, PREFIX), MARK: torch.tensor(1.0)}
    notes = (
        f"differences are rounded: {sum(inexact)} of {len(differences)} tensors differ in the last digits when the base"
        " is added again",
    )
    return Written(tensors=tensors, notes=notes if any(inexact) else ())


def check_base(path: Path | str, checkpoint: Checkpoint, unet: Mapping[str, Tensor]) -> None:
    """Check that a base's UNet has the shapes of a control.

    Raises:
        UserError: a tensor differs.
    """
    shared = [name for name in checkpoint.tensors if name in unet]
    if "conv_in.weight" not in shared:
        raise UserError(f"{path}: the base has no UNet with the architecture of Stable Diffusion", "incompatible")
    for name in shared:
        if checkpoint.tensors[name].shape != unet[name].shape:
            raise UserError(
                f"{path} was not made for this base: {name} is {tuple(checkpoint.tensors[name].shape)} in the"
                f" control and {tuple(unet[name].shape)} in the base",
                "incompatible",
            )


def wider(value: Tensor) -> Tensor:
    """A tensor of float8 in float16, else itself: float8 holds a small change, but not a weight together with it."""
    return value.half() if value.itemsize == 1 else value


def _sum(value: Tensor, other: Tensor) -> Tensor:
    """value + other, rounded once, in the dtype of `value`."""
    return (value.double() + other.to(value.device).double()).to(value.dtype)
