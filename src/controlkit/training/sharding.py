"""Weights that are split over processes (FSDP): what of a run has to see them whole, and how."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor with the parts that other processes hold; all of them have to ask for it at the same time."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def copy_whole(target: Tensor, source: Tensor) -> None:
    """Copy a whole tensor, which every process has, into one that may be split."""
    target.copy_(split_like(source, target))


def split_like(source: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which every process has, split as `like` is."""
    if not isinstance(like, DTensor):
        return source
    return distribute_tensor(source.to(like.device), like.device_mesh, like.placements)


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """A block in which all parameters are whole and plain, so that one process can run and save the network alone.

    All processes have to come here at the same time. What is changed in the block is lost.
    """
    split = [
        (owner, name, parameter)
        for owner in module.modules()
        for name, parameter in owner.named_parameters(recurse=False)
        if isinstance(parameter, DTensor)
    ]
    with torch.no_grad():
        plain = [nn.Parameter(whole(parameter), requires_grad=parameter.requires_grad) for _, _, parameter in split]
    for (owner, name, _), one in zip(split, plain, strict=True):
        setattr(owner, name, one)
    try:
        yield
    finally:
        for owner, name, kept in split:
            setattr(owner, name, kept)
