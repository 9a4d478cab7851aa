"""Weights sharded over processes (FSDP): gather them to save and preview, shard them to restore."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor with the shards of all processes; a collective call, so every process must make it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def copy_full(target: Tensor, source: Tensor) -> None:
    """Copy a full tensor, which every process has, into one that may be sharded."""
    target.copy_(shard_like(source, target))


def shard_like(source: Tensor, like: Tensor) -> Tensor:
    """A full tensor, which every process has, sharded as `like` is."""
    if not isinstance(like, DTensor):
        return source
    return distribute_tensor(source.to(like.device), like.device_mesh, like.placements)


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Replace sharded parameters by full ones within a block, so that one process can run and save the network.

    A collective call: every process must enter. Changes made in the block are lost.
    """
    sharded = [
        (owner, name, parameter)
        for owner in module.modules()
        for name, parameter in owner.named_parameters(recurse=False)
        if isinstance(parameter, DTensor)
    ]
    with torch.no_grad():
        full = [nn.Parameter(full_tensor(shard), requires_grad=shard.requires_grad) for _, _, shard in sharded]
    for (owner, name, _), parameter in zip(sharded, full, strict=True):
        setattr(owner, name, parameter)
    try:
        yield
    finally:
        for owner, name, shard in sharded:
            setattr(owner, name, shard)
