"""What is asked for: one object, the same from the command line, from Python and from any other front.

This module imports neither torch nor diffusers.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from dataclasses import dataclass
from types import NoneType
from typing import Any, get_type_hints

from controlkit.errors import UserError, nearest

MOST_PIXELS = 16384
"""The longest side of an image."""
DEFAULT_STEPS = 20
SAMPLERS = ("ddim", "dpm++", "dpm++-karras", "unipc", "euler")
"""Names of samplers (`bases/schedules/solvers.py`)."""
MODES = ("balanced", "control")
"""On which halves of classifier-free guidance a control acts: on both, or on the one that has the prompt."""


@dataclass(frozen=True, kw_only=True)
class ControlUse:
    """One control, what it is given, and how much it counts."""

    control: str
    """Name of a control that ships with nano, or a path."""
    image: str | None = None
    """Path of the image (or of the condition image, with `prepared`), for a control that takes one; or of a `.json`
    file with `inputs`, where paths are relative to that file. A file for a control that takes one value holds that."""
    inputs: dict[str, Any] | None = None
    """What a control takes by name (`Control.inputs`), in place of `image`: paths of images, and plain values."""
    weight: float = 1.0
    """Factor of its residuals."""
    start: float = 0.0
    """Share of the steps before it begins, of [0, 1]."""
    end: float = 1.0
    """Share of the steps after which it ends, of [0, 1]."""
    prepared: bool = False
    """Whether `image` is a condition image already; if not, the control's own condition is drawn from it."""
    mode: str | None = None
    """`balanced` acts on both halves of guidance, as in diffusers; `control` on the half that has the prompt alone, so
    that guidance makes the control stronger too (Zhang et al. 2023, section 3.4; elsewhere "ControlNet is more
    important"), and it runs half as often. By default the base's own: `control` for nano, else `balanced`."""

    def __post_init__(self) -> None:
        if (self.image is None) == (self.inputs is None):
            raise UserError(f"{self.control} needs either an image or inputs by name")
        if self.inputs is not None:
            object.__setattr__(self, "inputs", _plain(self.inputs, self.control))
        if not _is_finite(self.weight):
            raise UserError(f"the weight of {self.control} is {self.weight}; it must be a number")
        if not 0 <= self.start <= self.end <= 1:
            raise UserError(
                f"{self.control} starts at {self.start} and ends at {self.end}; expected 0 <= start <= end <= 1"
            )
        check_mode(self.mode)

    def acts_at(self, index: int, steps: int) -> bool:
        """Whether it acts at step `index` of `steps`."""
        return lies_within(index, steps, self.start, self.end)

    @classmethod
    def parse(cls, text: str, **settings: Any) -> ControlUse:
        """From `NAME_OR_FILE=IMAGE[@weight[:start-end]]`, as the command line writes it; IMAGE may be a `.json` file.

        Args:
            settings: `prepared` and `mode`.

        Raises:
            UserError: it is not of that form.
        """
        form = "expected NAME_OR_FILE=IMAGE[@weight[:start-end]], such as canny=drawing.png@0.8:0-0.6"
        cuts = [place for place, letter in enumerate(text) if letter == "="]
        # A file's path may have equals signs of its own, as folders named by settings do.
        cut = next((place for place in cuts if os.path.exists(text[:place])), cuts[0] if cuts else 0)
        control, rest = text[:cut], text[cut + 1 :]
        if not control or not rest:
            raise UserError(f"--control {text}: {form}")
        image, at, strength = rest.rpartition("@")
        if not at or "/" in strength or re.search(r"\.(png|jpe?g|webp|bmp|gif|tiff?|json)$", strength, re.IGNORECASE):
            return cls(control=control, image=rest, **settings)
        if not image:
            raise UserError(f"--control {text}: {form}")
        weight, colon, span = strength.partition(":")
        try:
            start, end = map(float, span.split("-")) if colon else (0.0, 1.0)
            return cls(control=control, image=image, weight=float(weight), start=start, end=end, **settings)
        except ValueError as error:
            raise UserError(f"--control {text}: {strength!r} is not weight[:start-end]; {form}") from error


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """Images to draw."""

    prompt: str
    """What to draw."""
    negative_prompt: str = ""
    """What to draw less of."""
    base: str = "nano"
    """`nano`, a diffusers folder, a single file, or an id on the Hugging Face hub."""
    controls: tuple[ControlUse, ...] = ()
    """Controls, whose residuals are added."""
    seeds: tuple[int, ...] = (0,)
    """One image for each; an image depends on its own seed alone."""
    steps: int = DEFAULT_STEPS
    """Denoising steps."""
    guidance: float | None = None
    """Classifier-free guidance scale; 1 switches it off (Ho and Salimans 2022, as in eq. 6 with w = scale - 1). By
    default the base's own: 3 for nano, 7.5 for Stable Diffusion 1 and 2, 5 for XL, 7 for 3."""
    width: int | None = None
    """In pixels; the base's own size by default."""
    height: int | None = None
    """In pixels; the base's own size by default."""
    sampler: str | None = None
    """How the noise is removed: `ddim`, `dpm++` (2M), `dpm++-karras`, `unipc` or `euler`. Of schedules that preserve
    variance, the last and Karras' times are for those that leave some signal at their end, as Stable Diffusion's do and
    nano's does not; rectified flows take `euler`, `dpm++` and `unipc`. By default the base's own: `ddim`, or `euler`
    for Stable Diffusion 3."""
    batch_size: int | None = None
    """Images drawn at once; changes the memory needed, not the images. By default 16 up to 256 x 256, and fewer the
    larger they are: 4 of 512 x 512."""
    device: str = "auto"
    """A torch device; `auto` is CUDA, then MPS, then the CPU."""
    text_device: str | None = None
    """Where text encoders stay, such as `cpu` for large ones (T5); by default on `device`."""
    precision: str = "auto"
    """What weights are stored in: `fp32`, `fp16` or `bf16`; `auto` is fp16 on CUDA and fp32 elsewhere."""

    def __post_init__(self) -> None:
        if not self.seeds:
            raise UserError("no seeds were given; at least one is needed, such as --seeds 1")
        if len(set(self.seeds)) != len(self.seeds):
            raise UserError(f"seeds must differ from each other, got {list(self.seeds)}")
        if any(not 0 <= seed < 2**63 for seed in self.seeds):
            raise UserError(f"seeds must be whole numbers from 0 to 2^63 - 1, got {list(self.seeds)}")
        check_sampling(self.steps, self.guidance, self.sampler)
        for name in ("width", "height"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= MOST_PIXELS:
                raise UserError(f"{name} is {value}; it must be a number of pixels from 1 to {MOST_PIXELS}")
        for use in self.controls:
            if use.weight and not any(use.acts_at(index, self.steps) for index in range(self.steps)):
                raise UserError(
                    f"{use.control} acts from {use.start:g} to {use.end:g} of the way, and none of {self.steps} steps"
                    " lies wholly within; give it a longer part, or a weight of 0 to switch it off"
                )
        if self.batch_size is not None and self.batch_size < 1:
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
        given = _checked(cls, values, "the settings")
        if "controls" in given:
            given["controls"] = tuple(
                ControlUse(**_checked(ControlUse, use, "each of controls")) for use in given["controls"]
            )
        return cls(**given)


def condition_name(index: int, name: str | None) -> str:
    """What a condition image is called: of the use at `index`, which is given one, or of its input of this name."""
    return f"condition{index}" if name is None else f"condition{index}-{name}"


def check_sampling(steps: int, guidance: float | None, sampler: str | None = None) -> None:
    """Refuse what no image can be drawn with; None leaves a setting to the base.

    Raises:
        UserError: `steps` is not from 1 to 1000, `guidance` is not a number of at least 1, or there is no such sampler.
    """
    if sampler is not None and sampler not in SAMPLERS:
        raise UserError(f"there is no sampler called {sampler!r}{nearest(sampler, SAMPLERS)}")
    if not 1 <= steps <= 1000:
        raise UserError(f"steps is {steps}; it must be from 1 to 1000")
    if guidance is not None and not (_is_finite(guidance) and guidance >= 1):
        raise UserError(f"guidance is {guidance}; it must be 1 (off) or more")


def check_mode(mode: str | None) -> None:
    """Refuse a mode that there is not; None leaves it to the base.

    Raises:
        UserError: it is none of `MODES`.
    """
    if mode is not None and mode not in MODES:
        raise UserError(f"there is no mode called {mode!r}{nearest(mode, MODES)}")


def _plain(inputs: Any, control: str) -> dict[str, Any]:
    """Inputs as JSON has them: tuples as lists, paths as text."""
    try:
        plain = json.loads(json.dumps(inputs, default=os.fspath, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"the inputs of {control} must be values of JSON and paths: {error}") from error
    if not isinstance(plain, dict) or not plain:
        raise UserError(f"the inputs of {control} must be a mapping from their names, not {inputs!r}")
    return plain


def _is_finite(value: float) -> bool:
    """Whether it is a number that a float can hold; whole numbers of JSON and of Python may be larger."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def lies_within(index: int, steps: int, start: float, end: float) -> bool:
    """Whether step `index` of `steps` lies wholly within the part from `start` to `end` (as diffusers counts it)."""
    return index / steps >= start and (index + 1) / steps <= end


_SHAPES: dict[Any, tuple[type | tuple[type, ...], str]] = {
    str: (str, "text"),
    str | None: ((str, NoneType), "text or null"),
    dict[str, Any] | None: ((dict, NoneType), "a mapping from names of inputs, or null"),
    bool: (bool, "true or false"),
    int: (int, "a whole number"),
    float: ((int, float), "a number"),
    int | None: ((int, NoneType), "a whole number or null"),
    tuple[int, ...]: ((list, tuple), "a list of whole numbers"),
    tuple[ControlUse, ...]: ((list, tuple), "a list of controls"),
    float | None: ((int, float, NoneType), "a number or null"),
}
"""Type of a field -> what JSON gives for it, and how to say that."""


def _checked(kind: type, values: Any, what: str) -> dict[str, Any]:
    """`values` with lists turned into tuples, if its keys and types are those of `kind`'s fields."""
    if not isinstance(values, dict):
        raise UserError(f"{what} must be a mapping of settings, not {type(values).__name__}")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key in values:
        if key not in fields:
            raise UserError(f"unknown setting {str(key)!r}{nearest(str(key), list(fields))}")
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING:
            raise UserError(f"{what} must say {name}")
    hints = get_type_hints(kind)
    for key, value in values.items():
        accepted, words = _SHAPES[hints[key]]
        items = value if hints[key] == tuple[int, ...] and isinstance(value, (list, tuple)) else ()
        wrong_number = isinstance(value, bool) and hints[key] is not bool
        if not isinstance(value, accepted) or wrong_number or any(type(item) is not int for item in items):
            raise UserError(f"{key} must be {words}, not {value!r}")
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
