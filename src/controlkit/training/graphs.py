"""The base's denoiser as CUDA graphs: one launch for its forward pass, one for its backward pass.

At the batch sizes of training, a step is bound by launching kernels, most of which are the base's. A graph replays
them all in one launch, from fixed buffers into which inputs are copied.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from controlkit.bases.base import Base
from controlkit.bases.residuals import Residuals
from controlkit.bases.taps import Taps
from controlkit.bases.text import Text
from controlkit.errors import UserError

_MOST_SHAPES = 8
"""Limit of the graphs of one function, one for each set of shapes; each keeps its activations in memory."""

Function = Callable[..., Tensor]


class Capture(Protocol):
    """The signature of `torch.cuda.make_graphed_callables`, as it is used here."""

    def __call__(self, function: Any, inputs: tuple[Tensor, ...], *, allow_unused_input: bool) -> Function: ...


class Graphs:
    """Runs functions as graphs, or eagerly if the recipe, the device or the function does not allow graphs.

    Args:
        setting: the recipe's `graphs`: `auto`, `on` or `off`.
        device: of the inputs.
        bf16: whether steps run under autocast to bf16.
        unsuitable: why the base cannot run as a graph; empty if it can.
        capture: another than CUDA's, for tests.

    Raises:
        UserError: graphs are required and impossible.
    """

    def __init__(
        self, setting: str, device: torch.device, *, bf16: bool, unsuitable: str = "", capture: Capture | None = None
    ) -> None:
        reason = "graphs is off" if setting == "off" else unsuitable
        if not reason and capture is None and device.type != "cuda":
            reason = f"CUDA graphs need a CUDA device, and the device is {device.type}"
        if setting == "on" and reason:
            raise UserError(f"graphs is on, but {reason}; set graphs=auto", "unsupported")
        self.reason = reason
        """Why functions run eagerly; empty if they run as graphs."""
        self.required = setting == "on"
        self.bf16 = bf16
        self.device = device
        self.capture: Capture = capture or torch.cuda.make_graphed_callables  # type: ignore[assignment]

    @property
    def words(self) -> str:
        """`graph`, or `eager` with the reason."""
        return f"eager: {self.reason}" if self.reason else "graph"

    def fall_back(self, reason: str) -> None:
        """Record and print why a function runs eagerly after all.

        Raises:
            UserError: graphs are required.
        """
        if self.required:
            raise UserError(f"graphs is on, but {reason}; set graphs=auto", "unsupported")
        if not self.reason:
            self.reason = reason
            print(f"note: the base runs without a CUDA graph: {reason}", file=sys.stderr, flush=True)

    def function(self, function: Function) -> Function:
        """Wrap `function` so that it runs as one graph for each set of input shapes.

        Args:
            function: takes and returns tensors. It must launch the same kernels for inputs of the same shapes and must
                not read tensors on the CPU. If its weights train, it must be a module.
        """
        return function if self.reason else _Graphed(self, function)

    def base(self, base: Base) -> Callable[..., Tensor]:
        """`base.predict` for training, as graphs; without taps, masked images or replaced modules."""
        return base.predict if self.reason else _GraphedBase(self, base).predict


class _Graphed:
    """A function as one graph for each set of shapes; the first call with a set captures it."""

    def __init__(self, graphs: Graphs, function: Function) -> None:
        self._graphs = graphs
        self._function = function
        self._captured: dict[tuple[Any, ...], Function] = {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return self._function(*inputs)
        key = tuple((tensor.shape, tensor.dtype, tensor.requires_grad) for tensor in inputs)
        if key not in self._captured:
            if len(self._captured) == _MOST_SHAPES:
                self._graphs.fall_back(f"inputs have more than {_MOST_SHAPES} different shapes")
                return self._function(*inputs)
            self._captured[key] = self._capture(inputs)
        return self._captured[key](*inputs)

    def _capture(self, inputs: tuple[Tensor, ...]) -> Function:
        graphs, device = self._graphs, self._graphs.device.type
        function = _Uncached(self._function, device, graphs.bf16)
        buffers = tuple(tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in inputs)
        trains = isinstance(self._function, nn.Module)
        try:
            # A cast that autocast cached before the capture would be replayed from memory that is freed.
            autocast = torch.autocast(device, torch.bfloat16, enabled=graphs.bf16, cache_enabled=False)
            with _own_stream(device), autocast:
                return graphs.capture(function if trains else function.forward, buffers, allow_unused_input=True)
        except RuntimeError as error:  # also out of memory: graphs take some more
            graphs.fall_back(f"the capture failed ({' '.join(str(error).split())[:200]})")
            return self._function


def _own_stream(device: str) -> AbstractContextManager[Any]:
    """A context after which the current stream is the one before; a capture that fails leaves its own."""
    return torch.cuda.stream(torch.cuda.current_stream()) if device == "cuda" else nullcontext()


class _Uncached(nn.Module):
    """A function under autocast without its cache; holds the weights of the function, if it is a module."""

    def __init__(self, function: Function, device: str, bf16: bool) -> None:
        super().__init__()
        self.function = function
        self._autocast = {"device_type": device, "dtype": torch.bfloat16, "enabled": bf16, "cache_enabled": False}

    def forward(self, *inputs: Tensor) -> Tensor:
        with torch.autocast(**self._autocast):  # type: ignore[arg-type]
            return self.function(*inputs)


class _GraphedBase:
    """`Base.predict` as graphs, with a function for each set of names of text tensors and residuals."""

    def __init__(self, graphs: Graphs, base: Base) -> None:
        self._graphs = graphs
        self._base = base
        self._functions: dict[tuple[tuple[str, ...], tuple[str, ...]], Function] = {}

    def predict(
        self,
        x_t: Tensor,
        t: Tensor,
        text: Text,
        residuals: Mapping[str, Tensor] | None = None,
        taps: Taps | None = None,
    ) -> Tensor:
        if taps:
            raise ValueError("a base under taps runs eagerly, because they change what a call launches")
        added = residuals or {}
        names = tuple(text.named), tuple(added)
        if names not in self._functions:
            self._functions[names] = self._graphs.function(self._of_tensors(*names))
        return self._functions[names](x_t, t, *text.tensors(), *added.values())

    def _of_tensors(self, texts: tuple[str, ...], sites: tuple[str, ...]) -> Function:
        def predict(x_t: Tensor, t: Tensor, *others: Tensor) -> Tensor:
            text = Text(**dict(zip(texts, others[: len(texts)], strict=True)))
            residuals = Residuals(dict(zip(sites, others[len(texts) :], strict=True)))
            return self._base.predict(x_t, t, text, residuals)

        return predict
