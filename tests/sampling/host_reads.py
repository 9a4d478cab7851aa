"""Which operations make the CPU wait for the device: counted on the meta device, which stands for one."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_NUMBERS = ("_local_scalar_dense", "item", "is_nonzero", "equal", "allclose")
"""Operations that return a number to Python."""
_SHAPES = ("nonzero", "nonzero_numpy", "masked_select", "unique", "_unique2", "unique_consecutive")
"""Operations whose shape Python needs."""


class HostReads(TorchDispatchMode):
    """Lists operations that read tensors on the meta device. Those that would fail there give ones."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        on_device = any(each.is_meta for each in given)
        if on_device and name in _NUMBERS:
            self.reads.append(name)
            return 1.0 if given[0].is_floating_point() else 1
        if on_device and name in _SHAPES:
            self.reads.append(name)
        try:
            return func(*args, **(kwargs or {}))
        except NotImplementedError:  # out of the meta device there is nothing to copy
            self.reads.append("copy to the CPU")
            return torch.ones(given[0].shape)
