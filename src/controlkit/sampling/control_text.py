"""Parse the argument of `--control`: `NAME_OR_FILE=IMAGE[@weight[:start-end]][,KEY=VALUE...]`."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

from controlkit.errors import UserError

FORM = "NAME_OR_FILE=IMAGE[@weight[:start-end]][,KEY=VALUE...]"
_EXPECTED = f"expected {FORM}, such as canny=drawing.png@0.8:0-0.6,mode=guess"

_IMAGE = re.compile(r"\.(png|jpe?g|webp|bmp|gif|tiff?|json)$", re.IGNORECASE)
_OPTION = re.compile(r",(?=[A-Za-z_][\w-]*(?:\.[\w-]+)?=|prepared(?:,|$))")
"""Where an option begins."""


def parse_control(text: str) -> dict[str, Any]:
    """Settings of a `ControlUse` from the argument of `--control`.

    Keys are `weight`, `span` (START-END), `mode`, `mask`, `layers` (numbers separated by colons) and `prepared` (alone,
    or with true or false); all others, in YAML, are plain inputs of the control (such as `task`) or parameters of its
    condition, named `INPUT.KEY` for one image among several. Names of files that exist are read as such, whatever they
    contain: `@`, `=`, `:` or `,`.

    Raises:
        UserError: it does not have that form.
    """
    cuts = [place for place, letter in enumerate(text) if letter == "="]
    # Paths may contain equals signs, as folders named after settings do.
    cut = next((place for place in cuts if os.path.exists(text[:place])), cuts[0] if cuts else 0)
    control, rest = text[:cut], text[cut + 1 :]
    if not control or not rest:
        raise UserError(f"--control {text}: {_EXPECTED}", "usage")
    image, weight, options = _split(rest)
    if not image:
        raise UserError(f"--control {text}: {_EXPECTED}", "usage")
    settings: dict[str, Any] = {"control": control, "image": image}
    if weight is not None:
        parsed = _weight_and_span(weight)
        if parsed is None:
            raise UserError(f"--control {text}: {weight!r} is not weight[:start-end]; {_EXPECTED}", "usage")
        settings |= parsed
    return _with_options(text, settings, options)


def _split(rest: str) -> tuple[str, str | None, list[str]]:
    """Image, weight with its span (None if there is none), and options."""
    for end in (len(rest), *(place for place in range(len(rest) - 1, 0, -1) if rest[place] in "@,")):
        if os.path.exists(rest[:end]):
            weight, *options = _OPTION.split(rest[end:])
            if not weight:
                return rest[:end], None, options
            if weight[0] == "@" and _weight_and_span(weight[1:]) is not None:
                return rest[:end], weight[1:], options
    body, *options = _OPTION.split(rest)
    image, at, weight = body.rpartition("@")
    if not at or "/" in weight or _IMAGE.search(weight):
        return body, None, options
    return image, weight, options


def _weight_and_span(text: str) -> dict[str, float] | None:
    """`weight[:start-end]`; None if it does not have that form."""
    weight, colon, span = text.partition(":")
    try:
        start, end = _span(span) if colon else (0.0, 1.0)
        settings = {"weight": float(weight)}
    except ValueError:
        return None
    return {**settings, "start": start, "end": end} if colon else settings


def _span(text: str) -> tuple[float, float]:
    start, end = map(float, text.split("-"))
    return start, end


def _layers(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split(":")))


def _truth(text: str) -> bool:
    return {"true": True, "false": False}[text.lower()]


_KEYS: dict[str, tuple[Callable[[str], Any], str]] = {
    "weight": (float, "a number"),
    "span": (_span, "START-END, such as 0-0.6"),
    "mode": (str, "a mode"),
    "mask": (str, "an image"),
    "layers": (_layers, "numbers separated by colons, such as 0.5:0.5:1"),
    "prepared": (_truth, "true or false"),
}
"""Option -> how its value is read, and its description."""
KEYS = tuple(_KEYS)
"""Options that are no parameters of a condition."""


def read_option(key: str, value: str, what: str) -> Any:
    """The value of an option of `KEYS`.

    Args:
        what: where it comes from, for errors.

    Raises:
        UserError: it is empty, or has another form.
    """
    read, expected = _KEYS[key]
    try:
        parsed = read(value)
    except (ValueError, KeyError) as error:
        raise UserError(f"{what}: {key} is {value!r}; expected {expected}", "usage") from error
    if not value:
        raise UserError(f"{what}: {key} is empty; expected {expected}", "usage")
    return parsed


def _with_options(text: str, settings: dict[str, Any], options: list[str]) -> dict[str, Any]:
    """`settings` and those of `options`."""
    from controlkit.settings import read_overrides

    seen: set[str] = {"weight"} & set(settings) | ({"span"} if "start" in settings else set())
    parameters: dict[str, Any] = {}
    for key, value in _joined(options):
        if key in seen:
            raise UserError(f"--control {text}: {key} is given twice", "contradiction")
        seen.add(key)
        if key not in _KEYS:
            parameters |= read_overrides([f"{key}={value}"], "--control ...,")
            continue
        parsed = read_option(key, value, f"--control {text}")
        settings |= {"start": parsed[0], "end": parsed[1]} if key == "span" else {key: parsed}
    return {**settings, "parameters": parameters} if parameters else settings


def _joined(options: list[str]) -> list[tuple[str, str]]:
    """Key and value of each option; a value that continues as the name of a file keeps the rest of that name."""
    pairs: list[tuple[str, str]] = []
    place = 0
    while place < len(options):
        key, _, value = options[place].partition("=")
        if options[place] == "prepared":
            value = "true"
        ends = range(len(options), place, -1)
        joined = {end: ",".join([value, *options[place + 1 : end]]) for end in ends}
        end = next((end for end in ends if os.path.exists(joined[end])), place + 1)
        pairs.append((key, joined[end]))
        place = end
    return pairs
