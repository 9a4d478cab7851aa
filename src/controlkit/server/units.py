"""ControlNet units of A1111's `alwayson_scripts` -> controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from controlkit import conditions
from controlkit.conditions.condition import Condition
from controlkit.errors import UserError, nearest
from controlkit.server.catalogue import ControlEntry
from controlkit.server.native import Images
from controlkit.server.parameters import listed_condition, parameters_of
from controlkit.server.service import Service
from controlkit.server.spec import Fit

OWN = "auto"
"""Module that stands for the control's own condition."""
RESOLUTION = {"name": "Resolution", "value": 512, "min": 64, "max": 2048, "step": 1}
"""The first slider of each module."""
_UNSUPPORTED = {
    "batch_images": "", "output_dir": "", "loopback": False, "advanced_weighting": None, "ipadapter_input": None,
    "pulid_mode": "Fidelity", "union_control_type": "Unknown", "generated_image": None, "animatediff_batch": False,
    "batch_image_files": [], "batch_mask_dir": None, "batch_image_dir": "", "batch_mask_gallery": [],
    "batch_modifiers": [], "batch_keyframe_idx": None, "mask_image_fg": None, "image_fg": None,
}  # fmt: skip
"""Unsupported key of a unit -> value with which it has no effect."""
_WITHOUT_EFFECT = (
    *("low_vram", "lowvram", "processor_res", "pixel_perfect", "inpaint_crop_input_image", "is_ui", "input_mode"),
    "use_preview_as_input",
)
"""Keys that change nothing here: condition images always have the size of the result."""
_THRESHOLDS = ("threshold_a", "threshold_b")
"""Parameters of a module that is named; `auto` keeps the defaults."""
_ALIASES = {
    "input_image": "image",
    "mask_image": "mask",
    "effective_region_mask": "mask",
    "guidance": "guidance_end",
    "lowvram": "low_vram",
    "preprocessor": "module",
}
_KNOWN = (
    *("enabled", "image", "mask", "module", "model", "weight", "resize_mode", "guidance_start", "guidance_end"),
    *("control_mode", "guessmode", "hr_option", "save_detected_map"),
)
_FITS: dict[str, Fit] = {
    "0": "stretch",
    "just resize": "stretch",
    "resize": "stretch",
    "1": "crop",
    "crop and resize": "crop",
    "scale to fit (inner fit)": "crop",
    "inner fit (scale to fit)": "crop",
    "2": "fill",
    "resize and fill": "fill",
    "envelope (outer fit)": "fill",
    "outer fit (shrink to fit)": "fill",
}
"""Words of A1111, in lower case -> how an image gets the size of the result."""
_MODES = {"0": "balanced", "1": "soft", "2": "guess"}


@dataclass(frozen=True)
class Unit:
    """An enabled unit."""

    control: dict[str, Any]
    """Fields of `ControlUse`, with names in place of paths."""
    shows_map: bool
    """Whether the response includes the condition image."""
    ignored: tuple[str, ...] = ()
    """Its keys whose values are not used."""


def enabled_units(scripts: Mapping[str, Any], service: Service, collected: Images) -> list[Unit]:
    """The enabled units of `alwayson_scripts`, whose names are matched in any case.

    Raises:
        UserError: a unit has an unknown key, or a value that cannot be used.
    """
    units: list[Unit] = []
    for name, script in scripts.items():
        if name.lower() != "controlnet":
            continue
        args = script.get("args", []) if isinstance(script, Mapping) else script
        if not isinstance(args, Sequence) or isinstance(args, str):
            raise UserError(f"alwayson_scripts.{name}: expected args, a list of units", "wrong-type")
        for place, unit in enumerate(args):
            if not isinstance(unit, Mapping):
                raise UserError(f"alwayson_scripts.{name}.args[{place}]: expected a unit, by key", "wrong-type")
            found = _unit(unit, f"unit {place}", len(units), service, collected)
            if found is not None:
                ignored = tuple(f"alwayson_scripts.{name}.args[{place}].{key}" for key in found.ignored)
                units.append(replace(found, ignored=ignored))
    return units


def _unit(given: Mapping[str, Any], where: str, index: int, service: Service, collected: Images) -> Unit | None:
    unit = _keys(given, where)
    if not unit.get("enabled", True):
        return None
    for key, nothing in _UNSUPPORTED.items():
        if unit.get(key) not in (nothing, None, "", [], False):
            raise UserError(f"{where}: {key} is not supported", "unsupported")
    if str(unit.get("hr_option") or "Both").lower() not in ("both", "hiresfixoption.both"):
        raise UserError(f"{where}: hr_option is {unit['hr_option']!r}; only Both is supported", "unsupported")
    model = _text(unit, "model", where)
    if model.lower() in ("", "none"):
        raise UserError(f"{where} has no model; choose one of /controlnet/model_list", "missing-setting")
    name = service.catalogue.find("controls", model)
    entry = service.catalogue.controls[name]
    condition, parameters = _module(unit, entry, where)
    is_own = condition is not None and condition.name == entry.condition
    fit = fit_of(unit.get("resize_mode"), where)
    done: dict[str, Any] = {"fit": fit}
    if condition is not None and not is_own:
        done |= {"condition": condition.name, "parameters": parameters}
    elif condition is None:
        done["shows"] = entry.condition_of()
    image = _image(unit, "image", where)
    if image is None:
        raise UserError(f"{where} has no image", "missing-setting")
    control = {
        "control": name,
        "image": collected.add(f"unit{index}", image, **done),
        "mask": collected.add(f"unit{index}-mask", _mask(unit, where), fit=fit, mask=True),
        "weight": _number(unit, "weight", 1.0, where),
        "start": _number(unit, "guidance_start", 0.0, where),
        "end": _number(unit, "guidance_end", 1.0, where),
        "mode": _mode(unit, where),
        "prepared": not is_own,
        "parameters": (parameters or None) if is_own else None,
    }
    ignored: tuple[str, ...] = ()
    if condition is not None and _text(unit, "module", where).lower() == OWN:
        ignored = tuple(key for key in _THRESHOLDS if _sets(condition, key, unit.get(key)))
    return Unit(control, condition is not None and unit.get("save_detected_map") is not False, ignored)


def _keys(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A unit under the key names that are used here. Keys are matched in any case.

    Raises:
        UserError: a key is unknown.
    """
    known = [*_KNOWN, *_THRESHOLDS, *_WITHOUT_EFFECT, *_UNSUPPORTED, *_ALIASES]
    unit: dict[str, Any] = {}
    for key, value in given.items():
        lower = key.lower()
        if lower not in known:
            raise UserError(f"{where} has an unknown key {key!r}{nearest(lower, known)}", "unknown-key")
        ours = _ALIASES.get(lower, lower)
        if unit.get(ours) in (None, ""):
            unit[ours] = value
    return unit


def _module(unit: Mapping[str, Any], entry: ControlEntry, where: str) -> tuple[Condition | None, dict[str, Any]]:
    """The condition that is computed from the image, or None if it is a condition image already; and its parameters."""
    module = _text(unit, "module", where)
    if module.lower() in ("", "none"):
        return None, {}
    if module.lower() == OWN:
        if entry.condition is None:
            raise UserError(f"{where}: the control records no condition; choose a module", "missing-setting")
        return conditions.find(entry.condition), {}
    condition = conditions.find(listed_condition(module))
    return condition, threshold_parameters(condition, unit.get("threshold_a"), unit.get("threshold_b"))


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


def threshold_parameters(condition: Condition, *thresholds: Any) -> dict[str, Any]:
    """Parameters of a condition from A1111's two thresholds. As there, a value outside the limits means the default."""
    parameters: dict[str, Any] = {}
    for (name, _, low, high), value in zip(sliders(condition), thresholds, strict=False):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            continue
        whole = isinstance(condition.defaults[name], int)
        parameters[name] = round(value) if whole else float(value)
    return parameters


def _sets(condition: Condition, key: str, value: Any) -> bool:
    """Whether a threshold would change a parameter of the condition."""
    values = [value if each == key else None for each in _THRESHOLDS]
    return any(condition.defaults[name] != number for name, number in threshold_parameters(condition, *values).items())


def fit_of(mode: Any, where: str) -> Fit:
    """How an image gets the size of the result, from A1111's number or words.

    Args:
        where: the unit's name in errors.

    Raises:
        UserError: there is no such mode.
    """
    if mode is None:
        return "crop"
    name = str(mode).strip().lower()
    if name not in _FITS:
        raise UserError(f"{where}: there is no resize_mode {mode!r}{nearest(name, list(_FITS))}", "unknown-name")
    return _FITS[name]


def _mode(unit: Mapping[str, Any], where: str) -> str | None:
    mode = unit.get("control_mode")
    if mode is None:
        return "guess" if unit.get("guessmode") else None
    if isinstance(mode, (str, int)) and not isinstance(mode, bool):
        return _MODES.get(str(mode), str(mode))
    raise UserError(f"{where}: control_mode is {mode!r}; expected 0, 1, 2 or words", "wrong-type")


def _text(unit: Mapping[str, Any], key: str, where: str) -> str:
    value = unit.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{where}: {key} is {value!r}; expected text", "wrong-type")
    return value.strip()


def _image(unit: Mapping[str, Any], key: str, where: str) -> str | None:
    value = unit.get(key)
    if isinstance(value, Mapping):  # {"image": ..., "mask": ...}, an older form
        value = value.get(key)
    if value in (None, ""):
        return None
    if not isinstance(value, str):
        raise UserError(f"{where}: {key} must be an image as base64", "wrong-type")
    return value


def _mask(unit: Mapping[str, Any], where: str) -> str | None:
    """The mask, by its own key or beside the image in the older form.

    Raises:
        UserError: both are given and differ, or one is no text.
    """
    own, image = _image(unit, "mask", where), unit.get("image")
    beside = _image({"mask": image}, "mask", where) if isinstance(image, Mapping) else None
    if own is not None and beside is not None and own != beside:
        raise UserError(f"{where} has two masks, mask and image.mask; send one", "contradiction")
    return beside if own is None else own


def _number(unit: Mapping[str, Any], key: str, default: float, where: str) -> float:
    value = unit.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"{where}: {key} is {value!r}; expected a number", "wrong-type")
    return value
