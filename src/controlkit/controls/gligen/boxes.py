"""Boxes with phrases, the input of a GLIGEN."""

from __future__ import annotations

import math
from typing import Any

MAX_OBJECTS = 30
"""Number of grounding tokens of published models (`max_objs` in gligen/GLIGEN and diffusers). Tokens without a box are
learned null tokens."""


def boxes_problem(value: Any) -> str | None:
    """What is wrong with boxes and phrases; None if they are valid.

    Args:
        value: valid is a list of 1 to 30 `{"box": [x0, y0, x1, y1], "phrase": TEXT}`, in fractions of width and height
            in [0, 1], with x0 < x1, y0 < y1 and a phrase that is not blank.

    Returns:
        Words that follow the name of the input in an error.
    """
    expected = 'a list of {"box": [x0, y0, x1, y1], "phrase": TEXT}, in fractions of width and height'
    if not isinstance(value, list):
        return f"must be {expected}, not {type(value).__name__}"
    if not 1 <= len(value) <= MAX_OBJECTS:
        return f"has {len(value)} boxes; expected 1 to {MAX_OBJECTS}"
    for number, entry in enumerate(value, 1):
        if (problem := _problem_of_entry(entry)) is not None:
            return f"must be {expected}; {problem.format(f'entry {number}')}"
    return None


def boxes_in_part(value: list[dict[str, Any]], part: tuple[float, float, float, float]) -> list[dict[str, Any]]:
    """Boxes in fractions of a part of the image, cut at its edges, without those outside of it.

    Args:
        value: valid boxes with phrases.
        part: left, top, right and bottom of the part, in fractions of the image.
    """
    left, top, right, bottom = part
    across, down = right - left, bottom - top
    found = []
    for entry in value:
        x0, y0, x1, y1 = entry["box"]
        sides = [(x0 - left) / across, (y0 - top) / down, (x1 - left) / across, (y1 - top) / down]
        inside = [min(max(side, 0.0), 1.0) for side in sides]
        if inside[0] < inside[2] and inside[1] < inside[3]:
            found.append({**entry, "box": inside})
    return found


def _problem_of_entry(entry: Any) -> str | None:
    """What is wrong with one box, with `{}` in place of its name."""
    if not isinstance(entry, dict) or set(entry) != {"box", "phrase"}:
        found = ", ".join(map(repr, entry)) if isinstance(entry, dict) else type(entry).__name__
        return f"{{}} has {found or 'no keys'}"
    box, phrase = entry["box"], entry["phrase"]
    if not isinstance(phrase, str):
        return "the phrase of {} is not text"
    if not phrase.strip():
        return "the phrase of {} is empty"
    numbers = isinstance(box, list | tuple) and all(
        isinstance(side, int | float) and not isinstance(side, bool) and math.isfinite(side) for side in box
    )
    if not numbers or len(box) != 4:
        return "the box of {} is not four numbers"
    listed = ", ".join(f"{side:g}" for side in box)
    if not all(0 <= side <= 1 for side in box):
        return f"the box of {{}} leaves 0 to 1: [{listed}]"
    if box[0] >= box[2] or box[1] >= box[3]:
        return f"the box of {{}} is empty: [{listed}]; expected x0 below x1 and y0 below y1"
    return None
