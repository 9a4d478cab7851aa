"""Modules of A1111's ControlNet extension: how the condition image of a unit is computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from controlkit import conditions
from controlkit.conditions.condition import Condition
from controlkit.errors import UserError
from controlkit.server.parameters import computed_conditions, listed_condition, parameters_of

NONE = "none"
"""Module of an image that is a condition image already."""
OWN = "auto"
"""Module that stands for the control's own condition."""
_INVERT = ("invert", "invert (from white bg & black line)")
"""Modules of a condition image whose colours are inverted."""
_BLUR = "blur_gaussian"
RESOLUTION = {"name": "Resolution", "value": 512, "min": 64, "max": 2048, "step": 1}
"""The first slider of each module."""
_BLUR_SIGMA = {"name": "Sigma", "value": 9, "min": 0.01, "max": 64, "step": 0.01}
"""Slider of `blur_gaussian`: pixels at the module's resolution, where `blur` has a fraction of the short side."""
THRESHOLDS = ("threshold_a", "threshold_b")
"""Parameters of a module that is named; `auto` keeps the defaults."""
HOLES = ("inpaint", "inpaint_brush")
"""Conditions whose black part is the mask of a unit."""
_SAME: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "softedge_hedsafe": ("hed", {"safe": True}),
    "softedge_pidisafe": ("pidinet", {"safe": True}),
    "lineart_coarse": ("lineart", {"coarse": True}),
}
"""Module of A1111 -> the same condition, and parameters that it has besides the thresholds."""
_OTHERS = ("inpaint_only", "inpaint_only+lama", "inpaint_global_harmonious")
"""Modules that mark the hole by -1."""


@dataclass(frozen=True, kw_only=True)
class Module:
    """What is done to the image of a unit."""

    condition: Condition | None = None
    """Condition that is computed from it; None if it is a condition image already."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """Parameters of the condition."""
    inverts: bool = False
    """Whether its colours are inverted."""


def named_modules() -> list[str]:
    """The modules that stand for themselves: all but `auto`, which needs a control."""
    return [NONE, _INVERT[0], *computed_conditions(), *_SAME, _BLUR]


def sliders_of(name: str) -> list[dict[str, Any]]:
    """The sliders of a module, as `module_list` describes them; none for `auto`, which keeps the defaults."""
    if name in (NONE, OWN, _INVERT[0]):
        return []
    if name == _BLUR:
        return [RESOLUTION, _BLUR_SIGMA]
    condition = conditions.find(_SAME[name][0] if name in _SAME else name)
    return [
        RESOLUTION,
        *(
            {"name": parameter, "value": value, "min": low, "max": high, "step": _step(low, high)}
            for parameter, value, low, high in sliders(condition)
        ),
    ]


def named_module(name: str, settings: Mapping[str, Any], where: str) -> Module:
    """The module of this name, in any case; not `auto`.

    Args:
        settings: `threshold_a`, `threshold_b` and `processor_res`, as far as they were sent.
        where: what has the module, in errors.

    Raises:
        UserError: there is no such module, or it is not the same here, or a threshold is no number.
    """
    name = name.strip().lower()
    thresholds = [_threshold(settings.get(key), f"{where}: {key}") for key in THRESHOLDS]
    if name in ("", NONE):
        return Module()
    if name in _INVERT:
        return Module(inverts=True)
    if name in _OTHERS:
        raise UserError(
            f"{where}: {name} marks the hole by -1, which an image cannot hold; use inpaint, which makes it black",
            "unsupported",
        )
    if name == _BLUR:
        return Module(condition=conditions.find("blur"), parameters={"sigma": _blur(thresholds[0], settings)})
    same, parameters = _SAME.get(name, (name, {}))
    condition = conditions.find(listed_condition(same))
    return Module(condition=condition, parameters={**threshold_parameters(condition, *thresholds), **parameters})


def sliders(condition: Condition) -> list[tuple[str, float, float, float]]:
    """The parameters that A1111's two thresholds set: the first two numbers with limits, except `resolution`.

    Returns:
        Name, default, lower and upper limit of each.
    """
    found = [
        (each.name, float(each.default), *each.limits)
        for each in parameters_of(condition)
        if each.limits is not None and each.name != "resolution"
    ]
    return found[:2]


def threshold_parameters(condition: Condition, *thresholds: float | None) -> dict[str, Any]:
    """Parameters of a condition from A1111's two thresholds. As there, a value outside the limits means the default."""
    parameters: dict[str, Any] = {}
    for (name, _, low, high), value in zip(sliders(condition), thresholds, strict=False):
        if value is None or not low <= value <= high:
            continue
        whole = isinstance(condition.defaults[name], int)
        parameters[name] = round(value) if whole else float(value)
    return parameters


def unused_thresholds(condition: Condition, settings: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """The thresholds that would change a parameter of a condition.

    Raises:
        UserError: one is no number.
    """
    found = []
    for key in THRESHOLDS:
        values = [_threshold(settings.get(key), f"{where}: {key}") if each == key else None for each in THRESHOLDS]
        changed = threshold_parameters(condition, *values)
        if any(condition.defaults[name] != number for name, number in changed.items()):
            found.append(key)
    return tuple(found)


def _threshold(value: Any, what: str) -> float | None:
    """A threshold; None if it was not sent."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"{what} is {value!r}; expected a number", "wrong-type")
    return value


def _blur(sigma: float | None, settings: Mapping[str, Any]) -> float:
    """The `sigma` of `blur`, a fraction of the short side, from the slider of `blur_gaussian`."""
    value, low, high = (float(_BLUR_SIGMA[key]) for key in ("value", "min", "max"))  # type: ignore[arg-type]
    if sigma is not None and low <= sigma <= high:
        value = sigma
    side = settings.get("processor_res")
    known = isinstance(side, (int, float)) and RESOLUTION["min"] <= side <= RESOLUTION["max"]  # type: ignore[operator]
    return value / float(side if known else RESOLUTION["value"])  # type: ignore[arg-type]


def _step(low: float, high: float) -> float:
    return 1 if high - low >= 50 else (high - low) / 100
