"""Cache of residuals across calls."""

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
    """LRU cache of residuals that do not depend on the noisy latent, for further batches under the same condition.

    It keeps references to the controls whose residuals it holds, and notices in-place changes of their weights.

    Args:
        megabytes: limit of the cached tensors (at SD1.5, 512 x 512, one step of one prompt takes 13.4 MB in fp16).
    """

    def __init__(self, megabytes: float = 1024) -> None:
        self.limit = int(megabytes * 2**20)
        self.bytes = 0
        self.hits = 0
        self.misses = 0
        self._entries: OrderedDict[Hashable, tuple[Control, Residuals, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Hashable) -> Residuals | None:
        """The residuals under `key`, or None."""
        entry = self._entries.get(key)
        if entry is None:
            self.misses += 1
            return None
        self.hits += 1
        self._entries.move_to_end(key)
        return entry[1]

    def put(self, key: Hashable, control: Control, residuals: Residuals) -> None:
        """Store `residuals` of `control`, unless they alone exceed the limit."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in residuals.tensors())
        if size > self.limit or key in self._entries:
            return
        # A slice would keep the larger batch in memory.
        self._entries[key] = (control, residuals.map(torch.clone), size)
        self.bytes += size
        while self.bytes > self.limit:
            _, (_, _, dropped) = self._entries.popitem(last=False)
            self.bytes -= dropped

    def clear(self) -> None:
        """Remove all entries."""
        self._entries.clear()
        self.bytes = 0


def identity_of(control: Control) -> Hashable:
    """A key that changes with the control, its state, and its weights: replaced, moved, or changed in place.

    Writes through `parameter.data` go unnoticed, as they do in autograd: clear the cache after them.
    """
    weights = list(control.weights())
    # Those of `torch.inference_mode` cannot be changed in place outside of it, and have no version.
    versions = (0 if parameter.is_inference() else parameter._version for parameter in weights)
    states = tuple(zip(map(mark_of, weights), versions, strict=True))
    return id(control), control.state(), states, *((str(weights[0].device), weights[0].dtype) if weights else ())


def mark_of(parameter: Tensor) -> int:
    """A number unique to this parameter; addresses are reused."""
    mark: int | None = getattr(parameter, "_controlkit_mark", None)
    if mark is None:
        mark = parameter._controlkit_mark = next(_MARKS)  # type: ignore[attr-defined]
    return mark


def digest(hint: Hint) -> str:
    """Hash of a tensor or of named tensors: names, values, shapes and dtypes."""
    made = hashlib.sha256()
    for name, tensor in named(hint).items():
        data = tensor.detach().to("cpu").contiguous()
        made.update(f"{name} {data.dtype} {tuple(data.shape)} ".encode())
        made.update(data.view(torch.uint8).numpy().tobytes())
    return made.hexdigest()
