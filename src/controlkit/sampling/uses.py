"""Controls and LoRAs as a request uses them.

This module imports neither torch nor diffusers.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from controlkit.errors import UserError, nearest
from controlkit.sampling.json_values import is_finite, plain_mapping, settle_fields

MODES = ("balanced", "control", "soft", "guess", "cfg-rw", "cfg-rw-literal")
"""How a control acts under classifier-free guidance (`ControlUse.mode`)."""
CONDITIONAL_MODES = ("control", "guess", "cfg-rw", "cfg-rw-literal")
"""The modes in which a control acts on the conditional branch only."""
_MODE_ALIASES = {
    "my prompt is more important": "soft",
    "controlnet is more important": "guess",
    "guess_mode": "guess",
    "guess mode": "guess",
    "cfg-rw-normalised": "cfg-rw",
    "cfg-rw-normalized": "cfg-rw",
}
"""Names of A1111 and diffusers, in lower case -> mode."""


@dataclass(frozen=True, kw_only=True)
class ControlUse:
    """One control with its image or inputs, its weight and the steps at which it acts."""

    control: str
    """Name of a control that ships, or a path."""
    image: str | None = None
    """Path of the image (with `prepared`: of the condition image), for a control that takes one; or of a `.json` file
    with `inputs`, whose paths are relative to that file. For a control that takes one plain value, the file holds
    that value."""
    inputs: dict[str, Any] | None = None
    """Inputs by name (`Control.inputs`) in place of `image`: paths of images, and plain values."""
    weight: float = 1.0
    """Conditioning scale: the factor of its residuals (A1111: control weight)."""
    start: float = 0.0
    """Fraction of the steps at which it starts, in [0, 1]."""
    end: float = 1.0
    """Fraction of the steps at which it ends, in [0, 1]."""
    layers: tuple[float, ...] | None = None
    """One more factor for each of its residuals, from the outermost in: decoder skips, then middle. Default: 1."""
    mask: str | None = None
    """Path of a grey image: the control acts in full where it is white, not at all where it is black or transparent.
    Scaled and cropped like `image`, then averaged down to each injection site. Default: everywhere."""
    prepared: bool = False
    """Whether `image` is already a condition image. Otherwise the control's condition is computed from it."""
    parameters: dict[str, Any] | None = None
    """Parameters of that condition, such as `low` of canny, and plain inputs of the control, such as the `task` of a
    control with several. Parameters of one image among several are named `INPUT.PARAMETER`. Default: the condition's
    own."""
    mode: str | None = None
    """How it acts under classifier-free guidance (CFG). Per-site weights multiply `weight` and `layers`.

    | mode | branches | weights by site | known as |
    |---|---|---|---|
    | `balanced` | both | 1 | diffusers' default; A1111: "Balanced" |
    | `control` | conditional | 1 | guidance amplifies the control |
    | `soft` | both | soft | A1111: "My prompt is more important" |
    | `guess` | conditional | soft | diffusers: `guess_mode`; A1111's third Control Mode |
    | `cfg-rw-literal` | conditional | resolution | CFG resolution weighting (Zhang et al. 2023, section 3.4) |
    | `cfg-rw` | conditional | resolution, at most 1 | the same, normalised |

    On the conditional branch only, a control runs half as often. `sampling/weighting.py` defines the weights. Default:
    that of the base, `control` for nano, else `balanced`."""

    def __post_init__(self) -> None:
        settle_fields(self, self.control if isinstance(self.control, str) else "a control")
        if self.image is None and self.inputs is None:
            raise UserError(f"{self.control} has no image; give it one, or named inputs", "missing-setting")
        if self.image is not None and self.inputs is not None:
            raise UserError(f"{self.control} has an image and named inputs; give it one of them", "contradiction")
        if self.parameters is not None:
            if self.prepared:
                raise UserError(
                    f"{self.control} has condition parameters ({', '.join(self.parameters)}) and a prepared condition"
                    " image; parameters are for an image from which the condition is computed. Other inputs, such as"
                    " a task, go into inputs: {'image': ..., 'task': ...}",
                    "contradiction",
                )
            object.__setattr__(self, "parameters", plain_mapping(self.parameters, f"parameters of {self.control}"))
        if self.inputs is not None:
            object.__setattr__(self, "inputs", plain_mapping(self.inputs, f"inputs of {self.control}"))
        if self.layers is not None and not (self.layers and all(map(is_finite, self.layers))):
            raise UserError(
                f"the layers of {self.control} are {list(self.layers)}; expected one finite number per residual",
                "out-of-range",
            )
        if not is_finite(self.weight):
            raise UserError(f"the weight of {self.control} is {self.weight}; expected a finite number", "out-of-range")
        if not 0 <= self.start <= self.end <= 1:
            raise UserError(
                f"{self.control} starts at {self.start} and ends at {self.end}; expected 0 <= start <= end <= 1",
                "out-of-range",
            )
        object.__setattr__(self, "mode", mode_name(self.mode))

    def acts_at(self, index: int, steps: int) -> bool:
        """Whether it acts at step `index` of `steps`."""
        return lies_within(index, steps, self.start, self.end)


@dataclass(frozen=True, kw_only=True)
class LoraUse:
    """A LoRA of the base, with its weight."""

    file: str
    """A file of kohya, diffusers or peft, or a folder of the latter two."""
    weight: float = 1.0
    """Factor of what it adds to the base's weights."""

    def __post_init__(self) -> None:
        settle_fields(self, self.file if isinstance(self.file, str) else "a LoRA")
        if not is_finite(self.weight):
            raise UserError(f"the weight of {self.file} is {self.weight}; expected a finite number", "out-of-range")

    @classmethod
    def parse(cls, text: str) -> LoraUse:
        """Parse `FILE[@weight]`, as on the command line; the name of a file that exists may contain `@`.

        Raises:
            UserError: what follows `@` is no number.
        """
        file, at, weight = text.rpartition("@")
        if not at or os.path.exists(text):
            return cls(file=text)
        try:
            return cls(file=file, weight=float(weight))
        except ValueError as error:
            raise UserError(f"--lora {text}: {weight!r} is not a weight; expected FILE[@weight]", "usage") from error


def check_spans(uses: tuple[ControlUse, ...], steps: int) -> None:
    """Check that each control acts at some of `steps` steps, unless its weight is 0.

    Raises:
        UserError: one does not.
    """
    for use in uses:
        if use.weight and not any(use.acts_at(index, steps) for index in range(steps)):
            raise UserError(
                f"{use.control} acts from {use.start:g} to {use.end:g}, which contains none of the {steps} steps; widen"
                " the range, or set its weight to 0 to switch it off",
                "out-of-range",
            )


def mode_name(mode: str | None) -> str | None:
    """The mode of this name, which may be that of another tool; None leaves it to the base.

    Raises:
        UserError: there is none.
    """
    if mode is None:
        return None
    name = mode.strip().lower()
    name = _MODE_ALIASES.get(name, name)
    if name not in MODES:
        raise UserError(f"there is no mode {mode!r}{nearest(mode, MODES)}", "unknown-name")
    return name


def lies_within(index: int, steps: int, start: float, end: float) -> bool:
    """Whether step `index` of `steps` lies within the fractions `start` to `end`, counted as in diffusers."""
    return index / steps >= start and (index + 1) / steps <= end
