"""Taps: functions that a control hangs on named points of a base for the length of one call.

A point lies on the base's residual stream. At each, in this order: residuals are added; every tap sees the same value,
the one before any tap; what they return is summed up, or takes the value's place. Hooks are gone when the call ends,
and are put back for the length of a block that gradient checkpointing runs again (`checkpoint_with_taps`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from controlkit.errors import UserError

TapFunction = Callable[[Tensor], Tensor | None]
"""The stream at a point, own rows alone: `[B, C, h, w]` in a UNet, `[B, h * w, C]` in a transformer, `[B, D]` at
`time` => what is added to it, of the same shape; None is nothing."""


@dataclass(frozen=True, kw_only=True)
class Tap:
    """One function at one point."""

    function: TapFunction
    rows: tuple[int, int] | None = None
    """First and last row (not included) of the batch that it sees and changes; the others stay exactly as they are.
    None is all of them."""
    replaces: bool = False
    """Whether what it returns takes the value's place. Then no other tap may act at this point."""
    weighted: bool = True
    """Whether the weight of the control's use scales it. A control whose published form has parts that no weight scales
    says so here."""


Taps = Mapping[str, Sequence[Tap]]
"""Point -> its taps, in the order of the request."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """Where a point lies in a network."""

    module: str
    """Path of the module whose input or output it is."""
    side: Literal["input", "output"] = "output"
    channels: int | None = None
    """How many channels, from the first, belong to the stream, where the module's input has others beside them."""
    place: int = 0
    """Which of several outputs of the module it is."""


@contextmanager
def tapped(
    network: nn.Module, points: Mapping[str, Point], residuals: Mapping[str, Tensor], taps: Taps
) -> Iterator[None]:
    """A block in which calls of `network` get residuals and taps at its points.

    Args:
        residuals: point -> addition, of the stream's shape or of batch 1.

    Raises:
        UserError: a point is not one of `points`, or a replacing tap has company.
    """
    names = [*residuals, *(name for name in taps if name not in residuals)]
    for name in names:
        if name not in points:
            raise UserError(f"this base has no point called {name!r}; it has: {', '.join(points)}")
        if len(taps.get(name, ())) > 1 and any(tap.replaces for tap in taps[name]):
            raise UserError(
                f"a control replaces the base's hidden states at {name}, so no other may act there; leave one out"
            )
    handles = []
    try:
        for name in names:
            handles.append(_hook(network, name, points[name], residuals.get(name), taps.get(name, ())))
        yield
    finally:
        for handle in handles:
            handle.remove()


def checkpoint_with_taps(
    active: Callable[[], Callable[[], AbstractContextManager[Any]] | None],
) -> Callable[..., Any]:
    """A function for diffusers' `enable_gradient_checkpointing` that knows about taps.

    A checkpointed block runs again in the backward pass, when the call that hung the taps has long ended; they are
    hung again for that block, with the state that their control had for the call.

    Args:
        active: gives, during the forward pass, what hangs the taps of the call that is running; None if it has none.
    """

    def run(module: nn.Module, *inputs: Any, **named: Any) -> Any:
        again = active()
        return checkpoint(
            module.__call__,
            *inputs,
            use_reentrant=False,
            context_fn=lambda: (nullcontext(), nullcontext() if again is None else _Anew(again)),
            **named,
        )

    return run


class _Anew(AbstractContextManager[None]):
    """A context that can be entered again: a graph that is kept goes through its blocks once for each backward pass."""

    def __init__(self, make: Callable[[], AbstractContextManager[Any]]) -> None:
        self._make = make
        self._entered = ExitStack()

    def __enter__(self) -> None:
        self._entered.enter_context(self._make())

    def __exit__(self, *error: object) -> None:
        self._entered.close()


def _hook(network: nn.Module, name: str, point: Point, residual: Tensor | None, taps: Sequence[Tap]) -> Any:
    module = network.get_submodule(point.module)

    def change(stream: Tensor) -> Tensor:
        if point.channels is None or point.channels == stream.shape[1]:
            return _changed(name, stream, residual, taps)
        own, others = stream[:, : point.channels], stream[:, point.channels :]
        made = _changed(name, own, residual, taps)
        return stream if made is own else torch.cat([made, others], 1)

    def before(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if inputs:
            return (change(inputs[0]), *inputs[1:]), named
        return inputs, {**named, "hidden_states": change(named["hidden_states"])}

    def after(_module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> Any:
        if not isinstance(output, tuple):
            return change(output)
        own = point.place
        return (*output[:own], change(output[own]), *output[own + 1 :])

    if point.side == "input":
        return module.register_forward_pre_hook(before, with_kwargs=True)
    return module.register_forward_hook(after)


def _changed(name: str, stream: Tensor, residual: Tensor | None, taps: Sequence[Tap]) -> Tensor:
    if residual is not None:
        stream = stream + residual
    made = []
    for tap in taps:
        first, last = tap.rows or (0, len(stream))
        own = stream[first:last]
        value = tap.function(own)
        if value is not None and value.shape != own.shape:
            raise ValueError(f"a tap at {name} got {tuple(own.shape)} and returned another shape, {tuple(value.shape)}")
        made.append((first, last, tap, value))
    for first, last, tap, value in made:
        if value is not None:
            stream = _with_rows(stream, first, last, value if tap.replaces else stream[first:last] + value)
    return stream


def _with_rows(stream: Tensor, first: int, last: int, own: Tensor) -> Tensor:
    return own if (first, last) == (0, len(stream)) else torch.cat([stream[:first], own, stream[last:]])
