"""What is asked for: one object, the same from the command line, from Python and from any other front.

This module imports neither torch nor diffusers.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any

from controlkit.errors import UserError, nearest


@dataclass(frozen=True, kw_only=True)
class ControlUse:
    """One control, what it is given, and how much it counts."""

    control: str
    """Name of a control that ships with nano, or a path."""
    image: str
    """Path of the picture (or of the condition image, with `prepared`)."""
    weight: float = 1.0
    """Factor of its residuals."""
    start: float = 0.0
    """Share of the steps before it begins, of [0, 1]."""
    end: float = 1.0
    """Share of the steps after which it ends, of [0, 1]."""
    prepared: bool = False
    """Whether `image` is a condition image already; if not, the control's own condition is drawn from it."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise UserError(f"the weight of {self.control} is {self.weight}; it must be a number")
        if not 0 <= self.start <= self.end <= 1:
            raise UserError(
                f"{self.control} starts at {self.start} and ends at {self.end}; expected 0 <= start <= end <= 1"
            )

    @classmethod
    def parse(cls, text: str, prepared: bool = False) -> ControlUse:
        """From `NAME_OR_FILE=IMAGE[@weight[:start-end]]`, as the command line writes it.

        Raises:
            UserError: it is not of that form.
        """
        form = "expected NAME_OR_FILE=IMAGE[@weight[:start-end]], such as canny=drawing.png@0.8:0-0.6"
        control, equals, rest = text.partition("=")
        if not equals or not control or not rest:
            raise UserError(f"--control {text}: {form}")
        image, at, strength = rest.rpartition("@")
        if not at or "/" in strength or re.search(r"\.(png|jpe?g|webp|bmp|gif|tiff?)$", strength, re.IGNORECASE):
            return cls(control=control, image=rest, prepared=prepared)
        weight, colon, span = strength.partition(":")
        try:
            start, end = map(float, span.split("-")) if colon else (0.0, 1.0)
            return cls(
                control=control, image=image, weight=float(weight), start=start, end=end, prepared=prepared
            )
        except ValueError as error:
            raise UserError(f"--control {text}: {strength!r} is not weight[:start-end]; {form}") from error


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """Pictures to draw."""

    prompt: str
    """What to draw."""
    negative_prompt: str = ""
    """What to draw less of."""
    base: str = "nano"
    """`nano` or the path of a diffusers folder."""
    controls: tuple[ControlUse, ...] = ()
    """Controls, whose residuals are added."""
    seeds: tuple[int, ...] = (0,)
    """One picture for each; a picture depends on its own seed alone."""
    steps: int = 20
    """Denoising steps."""
    guidance: float = 4.0
    """Classifier-free guidance scale; 1 switches it off (Ho and Salimans 2022, as in eq. 6 with w = scale - 1)."""
    width: int | None = None
    """In pixels; the base's own size by default."""
    height: int | None = None
    """In pixels; the base's own size by default."""
    sampler: str = "ddim"
    """How the noise is removed."""
    batch_size: int = 8
    """Pictures drawn at once; changes the memory needed, not the pictures."""
    device: str = "cpu"
    """A torch device."""

    def __post_init__(self) -> None:
        if not self.seeds:
            raise UserError("no seeds were given; at least one is needed, such as --seeds 1")
        if any(not 0 <= seed < 2**63 for seed in self.seeds):
            raise UserError(f"seeds must be whole numbers from 0 to 2^63 - 1, got {list(self.seeds)}")
        if not 1 <= self.steps <= 1000:
            raise UserError(f"steps is {self.steps}; it must be from 1 to 1000")
        if not (math.isfinite(self.guidance) and self.guidance >= 1):
            raise UserError(f"guidance is {self.guidance}; it must be 1 (off) or more")
        if self.sampler not in SAMPLERS:
            raise UserError(f"there is no sampler called {self.sampler!r}{nearest(self.sampler, SAMPLERS)}")
        if self.batch_size < 1:
            raise UserError(f"batch_size is {self.batch_size}; it must be at least 1")

    def to_json(self) -> dict[str, Any]:
        """Plain values that `from_json` turns back into the same request."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> GenerateRequest:
        """From plain values; unknown keys are errors.

        Raises:
            UserError: a key is unknown or a value contradicts another.
        """
        known = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise UserError(f"unknown setting {key!r}{nearest(key, known)}")
        given = dict(values)
        given["controls"] = tuple(ControlUse(**use) for use in values.get("controls", ()))
        given["seeds"] = tuple(values.get("seeds", (0,)))
        return cls(**given)


SAMPLERS = ["ddim"]
"""Names of samplers."""

