"""Devices and precisions by name."""

from __future__ import annotations

import os

import torch

from controlkit.errors import UserError

PRECISIONS = {"auto": None, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""Name -> dtype of the weights for inference."""


def choose_device(name: str) -> torch.device:
    """`auto` => CUDA, then MPS, then the CPU; else the torch device of that name.

    With several processes on a machine, each gets its own GPU before anything is loaded.

    Raises:
        UserError: torch does not know the device.
    """
    if name in ("auto", "cuda") and torch.cuda.is_available():
        return _local_gpu()
    if name == "auto":
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise UserError(
            f"device {name!r} is unknown to torch; expected cpu, cuda, cuda:1, mps or auto", "device-unavailable"
        ) from error


def _local_gpu() -> torch.device:
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return torch.device("cuda")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype for inference: `auto` => float16 on CUDA, float32 elsewhere.

    Raises:
        UserError: it is none of `PRECISIONS`.
    """
    if precision not in PRECISIONS:
        raise UserError(f"precision is {precision!r}; expected one of {', '.join(PRECISIONS)}", "unknown-name")
    return PRECISIONS[precision] or (torch.float16 if device.type == "cuda" else torch.float32)


def check_device(device: str | torch.device) -> None:
    """Check that tensors can be made on a device.

    Raises:
        UserError: they cannot.
    """
    try:
        if torch.empty(0, device=device).device.type == "meta":
            raise RuntimeError("it has shapes but no data")
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device {device} cannot be used here ({reason}); try cpu", "device-unavailable") from error
