"""Taps: functions that a control hooks into named points of a base for one call.

A point lies on the base's residual stream. At each point residuals are added first; then every tap gets the same
tensor, the one before any tap; their outputs are summed or, for a replacing tap, replace the stream. Besides the points
that a base names, the output of every module is one, `module:PATH`. Hooks are removed when the call ends, and restored
for each block that gradient checkpointing recomputes (`checkpoint_with_taps`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from controlkit.errors import UserError

MODULE = "module:"
"""Beginning of the name of a point on the output of a module, before its path in the denoiser."""
TapFunction = Callable[[Tensor], Tensor | None]
"""The stream at a point, only the tap's rows: `[B, C, h, w]` in a UNet, `[B, h * w, C]` in a transformer, `[B, D]` at
`time` => an addition of the same shape; None adds nothing."""


@dataclass(frozen=True, kw_only=True)
class Tap:
    """One function at one point."""

    function: TapFunction
    rows: tuple[int, int] | None = None
    """First and last (exclusive) batch row that it reads and changes; other rows stay exactly as they are. None: all
    rows."""
    replaces: bool = False
    """Whether its output replaces the stream. Then no other tap may act at this point."""
    of_input: bool = False
    """Whether its function gets the input of the point's module, such as a low-rank layer beside a linear one; what it
    returns is added to the stream, of whose shape it is."""
    weighted: bool = True
    """Whether the conditioning scale applies to it. False for parts of published designs that no scale affects."""


Taps = Mapping[str, Sequence[Tap]]
"""Point -> its taps, in the order of the request."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """Position of a point in a network."""

    module: str
    """Path of the module whose input or output it is."""
    side: Literal["input", "output"] = "output"
    channels: int | None = None
    """Number of leading channels that belong to the stream, if the module's input has others after them."""
    place: int = 0
    """Index of the output, if the module returns several."""
    added_to: str | None = None
    """Path of the module around it to whose input the output is added; the point is on the sum."""


@contextmanager
def tapped(
    network: nn.Module, points: Mapping[str, Point], residuals: Mapping[str, Tensor], taps: Taps
) -> Iterator[None]:
    """A context in which `network` runs with residuals and taps at its points.

    Args:
        residuals: point -> addition, of the stream's shape or of batch 1.

    Raises:
        UserError: a point is not one of `points`, or several taps act where one replaces the stream.
    """
    names = [*residuals, *(name for name in taps if name not in residuals)]
    found = {name: points[name] if name in points else _output_of(network, name, points) for name in names}
    for name in names:
        if len(taps.get(name, ())) > 1 and any(tap.replaces for tap in taps[name]):
            raise UserError(
                f"a control replaces the hidden states at {name}, so no other control can act there; remove one",
                "contradiction",
            )
    handles = []
    try:
        for name in names:
            handles += _hooks(network, name, found[name], residuals.get(name), taps.get(name, ()))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _output_of(network: nn.Module, name: str, points: Mapping[str, Point]) -> Point:
    """The point `module:PATH`.

    Raises:
        UserError: it is none, or the network has no such module.
    """
    path = name.removeprefix(MODULE)
    with suppress(AttributeError):
        if path != name and network.get_submodule(path) is not None:
            return Point(module=path)
    raise UserError(f"this base has no point {name!r}; its points: {', '.join(points)}", "incompatible")


def checkpoint_with_taps(
    active: Callable[[], Callable[[], AbstractContextManager[Any]] | None],
) -> Callable[..., Any]:
    """A checkpoint function for diffusers' `enable_gradient_checkpointing` that restores taps.

    A checkpointed block runs again in the backward pass, after the hooks of the call are removed; they are restored for
    that block, with the state that the controls had in the call.

    Args:
        active: returns, during the forward pass, a context manager factory that restores the taps of the current call;
            None if there are none.
    """

    def run(module: nn.Module, *inputs: Any, **keywords: Any) -> Any:
        rehook = active()
        return checkpoint(
            module.__call__,
            *inputs,
            use_reentrant=False,
            context_fn=lambda: (nullcontext(), nullcontext() if rehook is None else _Reenterable(rehook)),
            **keywords,
        )

    return run


class _Reenterable(AbstractContextManager[None]):
    """A context manager that can be entered repeatedly: a retained graph recomputes its blocks in each backward
    pass."""

    def __init__(self, make: Callable[[], AbstractContextManager[Any]]) -> None:
        self._make = make
        self._entered = ExitStack()

    def __enter__(self) -> None:
        self._entered.enter_context(self._make())

    def __exit__(self, *error: object) -> None:
        self._entered.close()


def _hooks(
    network: nn.Module, name: str, point: Point, residual: Tensor | None, taps: Sequence[Tap]
) -> list[RemovableHandle]:
    if point.added_to is not None:
        return _hooks_on_sum(network, name, point, residual, taps)
    module = network.get_submodule(point.module)

    def change(stream: Tensor, source: Tensor | None = None) -> Tensor:
        if point.channels is None or point.channels == stream.shape[1]:
            return _apply(name, stream, residual, taps, source)
        hidden, skip = stream[:, : point.channels], stream[:, point.channels :]
        changed = _apply(name, hidden, residual, taps)
        return stream if changed is hidden else torch.cat([changed, skip], 1)

    def before(_module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        if inputs:
            return (change(inputs[0]), *inputs[1:]), keywords
        return inputs, {**keywords, "hidden_states": change(keywords["hidden_states"])}

    def after(_module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        if not isinstance(output, tuple):
            return change(output, inputs[0] if inputs else None)
        place = point.place
        return (*output[:place], change(output[place]), *output[place + 1 :])

    if point.side == "input":
        return [module.register_forward_pre_hook(before, with_kwargs=True)]
    return [module.register_forward_hook(after)]


def _hooks_on_sum(
    network: nn.Module, name: str, point: Point, residual: Tensor | None, taps: Sequence[Tap]
) -> list[RemovableHandle]:
    """Hooks of a point on the sum of a module's output and the input of the module around it."""
    assert point.added_to is not None
    inputs: list[Tensor] = []

    def keep(_module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        inputs[:] = [arguments[0] if arguments else keywords["hidden_states"]]

    def after(_module: nn.Module, _arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        stream = output + inputs.pop()
        changed = _apply(name, stream, residual, taps)
        # Exactly zero in the rows that no tap changes, unlike `changed` minus the input.
        return output if changed is stream else output + (changed - stream)

    around, module = network.get_submodule(point.added_to), network.get_submodule(point.module)
    return [around.register_forward_pre_hook(keep, with_kwargs=True), module.register_forward_hook(after)]


def _apply(
    name: str, stream: Tensor, residual: Tensor | None, taps: Sequence[Tap], source: Tensor | None = None
) -> Tensor:
    if residual is not None:
        stream = stream + residual
    outputs = []
    for tap in taps:
        first, last = tap.rows or (0, len(stream))
        rows = stream[first:last]
        read = source if tap.of_input else stream
        assert read is not None, f"{name} has no input to read"
        value = tap.function(read[first:last])
        if value is not None and value.shape != rows.shape:
            raise ValueError(
                f"a tap at {name} got {tuple(rows.shape)} and returned another shape, {tuple(value.shape)}"
            )
        outputs.append((first, last, tap, value))
    for first, last, tap, value in outputs:
        if value is not None:
            stream = _replace_rows(stream, first, last, value if tap.replaces else stream[first:last] + value)
    return stream


def _replace_rows(stream: Tensor, first: int, last: int, rows: Tensor) -> Tensor:
    return rows if (first, last) == (0, len(stream)) else torch.cat([stream[:first], rows, stream[last:]])
