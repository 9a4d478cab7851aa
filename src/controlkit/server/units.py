"""ControlNet units of A1111's `alwayson_scripts` -> controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from controlkit import conditions
from controlkit.conditions.condition import known_name
from controlkit.errors import UserError, nearest
from controlkit.server.catalogue import TASK, ControlEntry
from controlkit.server.modules import HOLES, OWN, THRESHOLDS, Module, named_module, unused_thresholds
from controlkit.server.native import Images
from controlkit.server.service import Service
from controlkit.server.spec import Fit

_UNSUPPORTED = {
    "batch_images": "", "output_dir": "", "loopback": False, "advanced_weighting": None, "ipadapter_input": None,
    "pulid_mode": "Fidelity", "generated_image": None, "animatediff_batch": False,
    "batch_image_files": [], "batch_mask_dir": None, "batch_image_dir": "", "batch_mask_gallery": [],
    "batch_modifiers": [], "batch_keyframe_idx": None, "mask_image_fg": None, "image_fg": None,
}  # fmt: skip
"""Unsupported key of a unit -> value with which it has no effect."""
_WITHOUT_EFFECT = (
    *("low_vram", "lowvram", "processor_res", "pixel_perfect", "inpaint_crop_input_image", "is_ui", "input_mode"),
    "use_preview_as_input",
)
"""Keys that change nothing here: condition images always have the size of the result."""
_ALIASES = {
    "input_image": "image",
    "mask_image": "mask",
    "guidance": "guidance_end",
    "lowvram": "low_vram",
    "preprocessor": "module",
}
_TYPE = "union_control_type"
"""Key that selects a task of a control with several."""
_KNOWN = (
    *("enabled", "image", "mask", "module", "model", "weight", "resize_mode", "guidance_start", "guidance_end"),
    *("control_mode", "guessmode", "hr_option", "save_detected_map", "effective_region_mask", _TYPE),
)
_TASKS: Mapping[str, tuple[str, ...]] = {
    "openpose": ("openpose", "dwpose"),
    "depth": ("depth", "depth_anything", "depth_leres", "depth_zoe"),
    "soft edge": ("hed", "pidinet", "scribble", "softedge_sobel", "scribble_hed", "scribble_pidinet"),
    "hard edge": ("canny", "lineart", "lineart_anime", "mlsd", "lines_lsd"),
    "normal map": ("normal", "normal_bae"),
    "segmentation": ("seg", "segments"),
    "tile": ("downscale", "blur"),
    "inpaint": ("inpaint", "inpaint_brush", "outpaint"),
}
"""`union_control_type`, in lower case -> tasks of that type, in the order of preference."""
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
_SWITCHES = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
"""Texts and numbers that A1111 takes for a switch, in lower case."""
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


@dataclass(frozen=True, kw_only=True)
class Start:
    """The images of `img2img`, which a unit without an image uses, as in A1111."""

    image: str
    """Name of the image that sampling starts from."""
    mask: str | None
    """Name of the mask; it is the hole of a unit for inpainting that has no image of its own."""
    fit: Fit


def enabled_units(
    scripts: Mapping[str, Any], service: Service, collected: Images, start: Start | None = None
) -> list[Unit]:
    """The enabled units of `alwayson_scripts`, whose names are matched in any case.

    Args:
        collected: gets their images.
        start: the images of `img2img`.

    Raises:
        UserError: the script or a unit has an unknown key, or a value that cannot be used.
    """
    units: list[Unit] = []
    for name, script in scripts.items():
        if name.lower() != "controlnet":
            continue
        if isinstance(script, Mapping) and (unknown := [key for key in script if key != "args"]):
            raise UserError(
                f"alwayson_scripts.{name} has an unknown key {unknown[0]!r}; expected args, a list of units",
                "unknown-key",
            )
        args = script.get("args", []) if isinstance(script, Mapping) else script
        if not isinstance(args, Sequence) or isinstance(args, str):
            raise UserError(f"alwayson_scripts.{name}: expected args, a list of units", "wrong-type")
        for place, unit in enumerate(args):
            if not isinstance(unit, Mapping):
                raise UserError(f"alwayson_scripts.{name}.args[{place}]: expected a unit, by key", "wrong-type")
            found = _unit(unit, f"unit {place}", len(units), service, collected, start)
            if found is not None:
                ignored = tuple(f"alwayson_scripts.{name}.args[{place}].{key}" for key in found.ignored)
                units.append(replace(found, ignored=ignored))
    return units


def _unit(
    given: Mapping[str, Any], where: str, index: int, service: Service, collected: Images, start: Start | None
) -> Unit | None:
    unit = _keys(given, where)
    if not _switch(unit, "enabled", True, where):
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
    task = _task(unit, name, entry, where) if entry.tasks else None
    if task is not None:
        entry = replace(entry, condition=known_name(task))
    module, ignored = _module(unit, entry, where)
    if not entry.tasks and _type_of(unit, where):
        ignored = (*ignored, _TYPE)
    is_own = _add_image(unit, module, entry, where, f"unit{index}", collected, start)
    region = _image(unit, "effective_region_mask", where)
    fit = fit_of(unit.get("resize_mode"), where)
    image = f"unit{index}"
    control = {
        "control": name,
        **({"image": image} if task is None else {"inputs": {"image": image, TASK: task}}),
        "mask": collected.add(f"unit{index}-effective_region_mask", region, fit=fit, mask=True),
        "weight": _number(unit, "weight", 1.0, where),
        "start": _number(unit, "guidance_start", 0.0, where),
        "end": _number(unit, "guidance_end", 1.0, where),
        "mode": _mode(unit, where),
        "prepared": not is_own,
        "parameters": (dict(module.parameters) or None) if is_own else None,
    }
    computes = module.condition is not None or module.inverts
    return Unit(control, computes and _switch(unit, "save_detected_map", True, where), ignored)


def _add_image(
    unit: Mapping[str, Any],
    module: Module,
    entry: ControlEntry,
    where: str,
    name: str,
    collected: Images,
    start: Start | None,
) -> bool:
    """Add the image of a unit under `name`.

    Returns:
        Whether sampling computes the condition image from it: by the control's own condition. Otherwise it is one.
    """
    image, mask, condition = _image(unit, "image", where), _mask(unit, where), module.condition
    if image is None and start is None:
        raise UserError(f"{where} has no image", "missing-setting")
    hole = None
    if condition is not None and condition.name in HOLES:
        hole = collected.add(f"{name}-mask", mask, mask=True)
        if hole is None and image is None and start is not None:
            hole = start.mask
        if hole is None:
            raise UserError(
                f"{where} has no mask; {condition.name} needs one, white where the image changes", "missing-setting"
            )
    elif mask is not None:
        raise UserError(
            f"{where} has a mask, which is the hole of a module for inpainting; its module is"
            f" {_text(unit, 'module', where) or 'none'}. Where the control acts is effective_region_mask",
            "unsupported",
        )
    done: dict[str, Any] = {}
    is_own = condition is not None and condition.name == entry.condition and hole is None
    if condition is None:
        done = {"shows": entry.condition_of(), "invert": module.inverts}
    elif not is_own:
        done = {"condition": condition.name, "parameters": module.parameters, "hole": hole}
    if image is not None:
        collected.add(name, image, fit=fit_of(unit.get("resize_mode"), where), **done)
    elif start is not None:
        collected.add_again(name, start.image, fit=start.fit, **done)
    return is_own


def _keys(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A unit under the key names that are used here. Keys are matched in any case.

    Raises:
        UserError: a key is unknown, or two names of one key have different values.
    """
    known = [*_KNOWN, *THRESHOLDS, *_WITHOUT_EFFECT, *_UNSUPPORTED, *_ALIASES]
    unit: dict[str, Any] = {}
    names: dict[str, str] = {}
    for key, value in given.items():
        lower = key.lower()
        if lower not in known:
            raise UserError(f"{where} has an unknown key {key!r}{nearest(lower, known)}", "unknown-key")
        ours = _ALIASES.get(lower, lower)
        if unit.get(ours) in (None, ""):
            unit[ours], names[ours] = value, key
        elif value not in (None, "", unit[ours]):
            raise UserError(f"{where}: {names[ours]} and {key} are the same and differ; send one", "contradiction")
    return unit


def _module(unit: Mapping[str, Any], entry: ControlEntry, where: str) -> tuple[Module, tuple[str, ...]]:
    """What is done to the image of a unit; and its keys that `auto` does not use."""
    module = _text(unit, "module", where)
    if module.lower() != OWN:
        return named_module(module, unit, where), ()
    if entry.condition is None:
        raise UserError(f"{where}: the control records no condition; choose a module", "missing-setting")
    condition = conditions.find(entry.condition)
    return Module(condition=condition), unused_thresholds(condition, unit, where)


def _type_of(unit: Mapping[str, Any], where: str) -> str:
    """The type of union control that a unit names, in lower case; empty if none.

    Raises:
        UserError: there is no such type.
    """
    name = _text(unit, _TYPE, where).lower()
    if name in ("", "unknown"):
        return ""
    if name not in _TASKS:
        raise UserError(f"{where}: there is no {_TYPE} {unit[_TYPE]!r}{nearest(name, list(_TASKS))}", "unknown-name")
    return name


def _task(unit: Mapping[str, Any], name: str, entry: ControlEntry, where: str) -> str | None:
    """The task that a unit selects of a control with several: by its type, or by what its module computes; None is the
    task that the file records.

    Args:
        name: of the control.

    Raises:
        UserError: the control has no such task, or none is selected.
    """
    kind, module = _type_of(unit, where), _text(unit, "module", where)
    computed = None if module.lower() == OWN else named_module(module, unit, where).condition
    found = [task for task in _TASKS.get(kind, ()) if task in entry.tasks]
    if computed is not None and computed.name in (found if kind else entry.tasks):
        return computed.name
    if found:
        return found[0]
    has = f"{name} has the tasks {', '.join(entry.tasks)}"
    if kind:
        raise UserError(f"{where}: {_TYPE} is {unit[_TYPE]!r}, but {has}", "unknown-name")
    if entry.condition is not None:
        return None
    chosen = f"none is {computed.name!r}; " if computed is not None else ""
    raise UserError(
        f"{where}: {has}; {chosen}select one by {_TYPE} ({', '.join(_TASKS)}) or by the module", "missing-setting"
    )


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
        return "guess" if _switch(unit, "guessmode", False, where) else None
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


def _switch(unit: Mapping[str, Any], key: str, default: bool, where: str) -> bool:
    value = unit.get(key)
    if value is None:
        return default
    found = _SWITCHES.get(str(value).strip().lower())
    if found is None:
        raise UserError(f"{where}: {key} is {value!r}; expected true or false", "wrong-type")
    return found


def _number(unit: Mapping[str, Any], key: str, default: float, where: str) -> float:
    value = unit.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"{where}: {key} is {value!r}; expected a number", "wrong-type")
    return value
