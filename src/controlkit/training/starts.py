"""What training a control starts from: a copy of the base's encoder, or a control that there is."""

from __future__ import annotations

from pathlib import Path

import torch

from controlkit.bases.base import Base
from controlkit.checkpoints.controls import load_control
from controlkit.controls.base_control import BaseControl
from controlkit.controls.controlnet import ControlNet
from controlkit.errors import UserError


def controlnet_from(start: str | Path | None, base: Base, condition: str, seed: int) -> ControlNet:
    """A ControlNet that is ready to train: the one called `start`, or a new one.

    A copy of the base's encoder draws its fresh hint network from `seed`.

    Raises:
        UserError: `start` is another kind of control, or does not fit the base.
    """
    if start is None:
        torch.manual_seed(seed)
        return ControlNet.for_base(base, condition).train()
    control = load_control(start, base)
    if not isinstance(control, ControlNet):
        raise UserError(f"{start} is a {control.kind}, and a ControlNet goes on from a ControlNet alone")
    control.condition = condition
    return control.requires_grad_(True).train()


def load_base_control(name: str | Path, base: Base) -> BaseControl:
    """The base control called `name`.

    Raises:
        UserError: it is another kind of control, or does not fit the base.
    """
    control = load_control(name, base)
    if not isinstance(control, BaseControl):
        raise UserError(
            f"{name} is a {control.kind}, not a base control that adapters are made on; nano's is called nano/base"
        )
    return control
