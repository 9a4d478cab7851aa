"""A control's inputs: which it takes, in words, and the hints of batches of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from controlkit.controls.hints import Hint, concatenated

if TYPE_CHECKING:
    from controlkit.bases.base import Base
    from controlkit.controls.control import Control


@dataclass(frozen=True, kw_only=True)
class Input:
    """One input of a control."""

    name: str = "image"
    kind: Literal["image", "value"] = "image"
    """A condition image, `[B, 3, H, W]` in [0, 1]; or a JSON value, such as boxes with phrases."""
    condition: str | None = None
    """Of an image: the condition that extracts it from a photo; None is the control's own."""
    required: bool = True
    """Whether the control needs it."""
    check: Callable[[Any], str | None] | None = None
    """Validates a value before anything is loaded: a message to follow the input's name, such as "must be a list of
    boxes"; None if it is valid."""
    part: Callable[[Any, tuple[float, float, float, float]], Any] | None = None
    """Makes a valid value one of a part of the image: left, top, right and bottom in fractions of width and height.
    None if values have no place."""


def takes_one_image(control: type[Control] | Control) -> bool:
    """Whether a control requires exactly one input, a condition image."""
    required = [entry for entry in control.inputs if entry.required]
    return len(required) == 1 and required[0].kind == "image"


def takes_values(control: type[Control] | Control, names: Collection[str]) -> bool:
    """Whether all inputs that a control requires are plain values, and among these names."""
    required = [entry for entry in control.inputs if entry.required]
    return bool(required) and all(entry.kind == "value" and entry.name in names for entry in required)


def words_of_inputs(control: type[Control] | Control) -> str:
    """A control's inputs as text: `canny (image), boxes (value, optional)`."""
    entries = (f"{entry.name} ({entry.kind}{'' if entry.required else ', optional'})" for entry in control.inputs)
    return ", ".join(entries)


def encode_images(control: Control, images: Tensor, base: Base) -> Hint:
    """The hint of condition images `[B, 3, H, W]`, `uint8` or in [0, 1], for a control that `takes_one_image`."""
    (name,) = (entry.name for entry in control.inputs if entry.required)
    is_bytes = images.dtype == torch.uint8
    given = images.float() / 255 if is_bytes else images
    token = _in_range.set(is_bytes)
    try:
        return control.encode(given if len(control.inputs) == 1 else {name: given}, base)
    finally:
        _in_range.reset(token)


_in_range: ContextVar[bool] = ContextVar("in_range", default=False)


def check_range(images: Tensor) -> None:
    """Check that condition images are in [0, 1], in a control's `encode`.

    Those that were bytes are, and are not read, for which a GPU would have to wait.

    Raises:
        ValueError: a value is outside.
    """
    if images.is_meta or _in_range.get():
        return
    low, high = images.aminmax()
    if low < -_ROUNDING or high > 1 + _ROUNDING:
        raise ValueError(f"condition images must be in [0, 1], got {low:.3g} to {high:.3g}")


_ROUNDING = 1e-3
"""Of resampled images, beyond [0, 1]."""


def encode_each(control: Control, samples: Sequence[Mapping[str, Any]], base: Base) -> Hint:
    """The hints of several samples, each a mapping of inputs as of `Control.encode`, as one batch."""
    return concatenated([control.encode(dict(inputs), base) for inputs in samples])
