"""Residuals kept from one call to the next."""

from __future__ import annotations

import hashlib
import itertools
from collections import OrderedDict
from collections.abc import Hashable

import torch
from torch import Tensor

from controlkit.bases.residuals import Residuals
from controlkit.controls.control import Control
from controlkit.controls.hints import Hint, named

_MARKS = itertools.count()


class ResidualCache:
    """Residuals of controls that do not read the noisy latent, for a second batch under the same condition.

    Bounded; what was used least recently goes first. It holds on to the controls whose residuals it keeps, and sees
    when a weight was changed in place.

    Args:
        megabytes: the most that the kept tensors take (at SD1.5, 512 x 512, one step of one prompt takes 13.4 MB in
            fp16).
    """

    def __init__(self, megabytes: float = 1024) -> None:
        self.limit = int(megabytes * 2**20)
        self.bytes = 0
        self.hits = 0
        self.misses = 0
        self._kept: OrderedDict[Hashable, tuple[Control, Residuals, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Hashable) -> Residuals | None:
        """What was kept under `key`."""
        entry = self._kept.get(key)
        if entry is None:
            self.misses += 1
            return None
        self.hits += 1
        self._kept.move_to_end(key)
        return entry[1]

    def put(self, key: Hashable, control: Control, residuals: Residuals) -> None:
        """Keep `residuals` of `control`; more than the limit is not kept at all."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in residuals.tensors())
        if size > self.limit or key in self._kept:
            return
        # A slice of a larger batch would keep all of it in memory.
        own = residuals.map(torch.clone)
        self._kept[key] = (control, own, size)
        self.bytes += size
        while self.bytes > self.limit:
            _, (_, _, dropped) = self._kept.popitem(last=False)
            self.bytes -= dropped

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()
        self.bytes = 0


def identity_of(control: Control) -> Hashable:
    """What changes when another control is used, or this one's state, or a weight of it in place, by another or moved.

    What is written through `parameter.data` is not seen, as autograd does not see it: clear the cache after it.
    """
    weights = list(control.weights())
    states = tuple((_mark(parameter), parameter._version) for parameter in weights)
    return id(control), control.state(), states, *((str(weights[0].device), weights[0].dtype) if weights else ())


def _mark(parameter: Tensor) -> int:
    """A number that no other parameter ever has; addresses are used again."""
    mark: int | None = getattr(parameter, "_controlkit_mark", None)
    if mark is None:
        mark = parameter._controlkit_mark = next(_MARKS)  # type: ignore[attr-defined]
    return mark


def digest(hint: Hint) -> str:
    """Hash of a tensor, or of named ones: their names, values, shapes and types."""
    made = hashlib.sha256()
    for name, tensor in named(hint).items():
        data = tensor.detach().to("cpu").contiguous()
        made.update(f"{name} {data.dtype} {tuple(data.shape)} ".encode())
        made.update(data.view(torch.uint8).numpy().tobytes())
    return made.hexdigest()
