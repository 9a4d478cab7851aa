"""Settings that vary within one request: axes, their combinations, and how the command line writes them.

An axis is a mapping from settings to lists of values of one length, which advance together: `{"guidance": [1, 3, 5]}`,
or `{"prompt": ["a cat", "a boat"], "image": ["cat.png", "boat.png"]}` for pairs. Several axes are crossed.
"""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import yaml

from controlkit.errors import UserError, nearest
from controlkit.sampling.control_text import KEYS, read_option
from controlkit.sampling.json_values import checked_fields
from controlkit.sampling.seeds import parse_seeds
from controlkit.sampling.uses import ControlUse, LoraUse
from controlkit.settings import YAMLReader

if TYPE_CHECKING:
    from controlkit.sampling.request import GenerateRequest

Axis = Mapping[str, Sequence[Any]]

MAX_COMBINATIONS = 10_000
"""Combinations of one request."""
_LONGEST_NAME = 24
"""Characters of a value in a file name."""
_NOT_VARIED = ("controls", "loras", "seeds", "vary", "xy")
"""Fields of a request that are no settings of an axis; `seed` stands for `seeds`."""
_OF_A_CONTROL = ("control", "image", *KEYS)
_OF_A_LORA = re.compile(r"lora\.(?:(?P<which>.+)\.)?(?P<key>weight|file)")
PATHS = ("base", "vae", "control", "image", "mask", "file")
"""Last parts of the names of settings that are paths."""


@dataclass(frozen=True)
class Point:
    """One combination of the values of all axes."""

    request: GenerateRequest
    """Without axes."""
    indices: tuple[int, ...]
    """Position on each axis: those of `vary`, then of `xy`."""
    name: str
    """Unique among the points: the beginning of its file names, such as `weight0.5-guidance3`."""


def check_axes(axes: Any, what: str) -> tuple[dict[str, list[Any]], ...]:
    """Axes as plain values.

    Args:
        what: the field, for errors.

    Raises:
        UserError: one is empty, or its lists have different lengths.
    """
    checked = []
    for axis in axes:
        if not isinstance(axis, Mapping) or not axis:
            raise UserError(
                f"{what} has {axis!r}; expected mappings from settings to values, such as {{'guidance': [1, 3]}}",
                "wrong-type",
            )
        for name, values in axis.items():
            if not isinstance(values, list | tuple | range) or not values:
                raise UserError(f"{name} of {what} is {values!r}; expected a list of values", "wrong-type")
        lengths = {name: len(values) for name, values in axis.items()}
        if len(set(lengths.values())) > 1:
            counts = ", ".join(f"{count} of {name}" for name, count in lengths.items())
            raise UserError(f"settings that vary together need as many values each, not {counts}", "contradiction")
        checked.append({str(name): list(values) for name, values in axis.items()})
    return tuple(checked)


def points_of(request: GenerateRequest) -> list[Point]:
    """All combinations of a request's axes, the last axis varying fastest.

    Raises:
        UserError: a setting is unknown or named on two axes, a value is invalid, or there are too many combinations.
    """
    axes = (*request.vary, *request.xy)
    names = [name for axis in axes for name in axis]
    _check_once(names, request)
    lengths = [len(next(iter(axis.values()))) for axis in axes]
    count = 1
    for length in lengths:
        count *= length
    if count > MAX_COMBINATIONS:
        raise UserError(f"the axes have {count} combinations; at most {MAX_COMBINATIONS}", "out-of-range")
    stems = [stems_of(axis) for axis in axes]
    single = replace(request, vary=(), xy=())
    points = []
    for indices in itertools.product(*map(range, lengths)):
        settings = [
            (name, values[index]) for axis, index in zip(axes, indices, strict=True) for name, values in axis.items()
        ]
        # What decides which controls there are comes first.
        settings.sort(key=lambda each: each[0].rpartition(".")[2] != "control")
        name = "-".join(filter(None, (of_axis[index] for of_axis, index in zip(stems, indices, strict=True))))
        points.append(Point(_with_settings(single, settings), indices, name))
    if len({(point.name.casefold(), point.request.seeds) for point in points}) < len(points):
        points = [replace(point, name=f"{number:04d}-{point.name}") for number, point in enumerate(points)]
    return points


def _check_once(names: Sequence[str], request: GenerateRequest) -> None:
    """Check that no setting is on two axes, by whatever names.

    Raises:
        UserError: one is, or a name is unknown.
    """
    named: dict[tuple[str | int, ...], str] = {}
    for name in names:
        for setting in _settings_of(name, request):
            if setting in named:
                both = name if named[setting] == name else f"{named[setting]} and {name} are one setting, which"
                raise UserError(f"{both} is on two axes; give all its values on one", "contradiction")
            named[setting] = name


def _settings_of(name: str, request: GenerateRequest) -> set[tuple[str | int, ...]]:
    """What a setting of an axis replaces: fields of the request, of its controls and of its LoRAs."""
    lora, key = _lora_setting(name, request), name.rpartition(".")[2]
    if name == "seed" or _is_of_request(name, request):
        return {(name,)}
    if lora is not None:
        return {("lora", index, lora["key"]) for index in _loras_of(name, lora["which"], request)}
    keys = ("start", "end") if key == "span" else (key,)
    places = _controls_of(name, request, _known_names(request))
    return {("control", index, each) for index in places for each in keys}


def _known_names(request: GenerateRequest) -> list[str]:
    return [each.name for each in fields(request) if each.name not in _NOT_VARIED]


def values_at(request: GenerateRequest, point: Point) -> dict[str, Any]:
    """Setting -> value of all axes at a point."""
    axes = zip((*request.vary, *request.xy), point.indices, strict=True)
    return {name: values[index] for axis, index in axes for name, values in axis.items()}


def expand_folders(request: GenerateRequest, *, pair: bool = False, given: Collection[str] = ()) -> GenerateRequest:
    """A request with the images of folders and globs in place of them, as axes of `vary`.

    Args:
        pair: let all images, and the prompts of `vary`, advance together instead of crossing them.
        given: names of images in memory, which are no folders.

    Raises:
        UserError: a folder or glob has no images, or the numbers of what is paired differ.
    """
    found: list[dict[str, list[Any]]] = []
    uses = list(request.controls)
    for index, use in enumerate(uses):
        listed = None if use.image in given else _listed(use.image)
        if listed is not None:
            uses[index] = replace(use, image=listed[0])
            if len(listed) > 1:
                found.append({f"{index}.image": listed})
    vary = list(request.vary)
    if pair:
        prompts = [axis for axis in vary if "prompt" in axis]
        together = [*prompts, *found]
        if len(together) < 2:
            raise UserError(
                "pairing needs several prompts and several images, or several images of two controls", "contradiction"
            )
        joined = {name: values for axis in together for name, values in axis.items()}
        vary, found = [axis for axis in vary if axis not in prompts], [joined]
    if uses == list(request.controls) and vary == list(request.vary):
        return request
    return replace(request, controls=tuple(uses), vary=(*vary, *found))


def _listed(image: str | None) -> list[str] | None:
    """The images in a folder or of a glob; None for one file."""
    from controlkit.data.sources import is_image_name

    if image is None or os.path.isfile(image):
        return None
    if os.path.isdir(image):
        found = [os.path.join(image, name) for name in os.listdir(image) if not name.startswith(".")]
    elif re.search(r"[*?\[]", image):
        found = glob.glob(image, recursive=True)
    else:
        return None
    images = sorted(path for path in found if is_image_name(os.path.basename(path)) and os.path.isfile(path))
    if not images:
        raise UserError(f"there are no images at {image}; pass an image, a folder of images, or a glob", "empty-data")
    return images


def parse_axis(text: str, request: GenerateRequest, option: str) -> dict[str, list[Any]]:
    """Parse `SETTING=VALUE,VALUE,...`, or with `|` between values that contain commas.

    Args:
        request: whose settings they are.
        option: that of the command line, for errors.

    Raises:
        UserError: it does not have that form, or the setting is unknown.
    """
    name, equals, rest = text.partition("=")
    name = name.strip().replace("-", "_") if "." not in name else name.strip()
    if not name or not equals or not rest.strip():
        raise UserError(f"{option} {text}: expected SETTING=VALUE,VALUE,..., such as guidance=1,3,5", "usage")
    name = "seed" if name == "seeds" else name
    if name == "seed":
        return {name: list(parse_seeds(rest, option))}
    parts = [part.strip() for part in rest.split("|" if "|" in rest else ",")]
    return {name: [_read(name, part, request, f"{option} {text}") for part in parts]}


def _read(name: str, text: str, request: GenerateRequest, what: str) -> Any:
    """A value of the command line as the setting takes it."""
    hint = get_type_hints(type(request)).get(name)
    if hint is not None:
        return text if hint in (str, str | None) else _yaml(text, what)
    key = name.rpartition(".")[2]
    if key in ("control", "image") or (_lora_setting(name, request) is not None and key == "file"):
        return text
    if key in KEYS:
        read_option(key, text, what)  # spans and layers stay text, as names of files tell them
        return text if key in ("span", "layers", "mode", "mask") else _yaml(text, what)
    return _yaml(text, what)


def _yaml(text: str, what: str) -> Any:
    try:
        return yaml.load(text, YAMLReader)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{what}: {text!r} is not a YAML value", "wrong-type") from error


def _with_settings(request: GenerateRequest, settings: Sequence[tuple[str, Any]]) -> GenerateRequest:
    """The request with other values, checked once all are set."""
    known = _known_names(request)
    changes: dict[str, Any] = {}
    uses: list[dict[str, Any]] = [dict(vars(use)) for use in request.controls]
    loras: list[dict[str, Any]] = [dict(vars(use)) for use in request.loras]
    for name, value in settings:
        lora = _lora_setting(name, request)
        if name == "seed":
            changes["seeds"] = (value,)
        elif _is_of_request(name, request):
            changes[name] = value
        elif lora is not None:
            for index in _loras_of(name, lora["which"], request):
                loras[index][lora["key"]] = value
        else:
            for index in _controls_of(name, request, known):
                _set_of_control(uses[index], name.rpartition(".")[2], value)
    plain = checked_fields(type(request), {"prompt": request.prompt, **changes}, "an axis")
    controls = tuple(ControlUse(**checked_fields(ControlUse, use, "a control")) for use in uses)
    return replace(
        request,
        **plain,
        controls=controls,
        loras=tuple(LoraUse(**checked_fields(LoraUse, use, "a LoRA")) for use in loras),
    )


def _is_of_request(name: str, request: GenerateRequest) -> bool:
    """Whether a setting of an axis is of the request, not of its controls: of the two, `image` and `mask` are of a
    request that starts from an image or has no controls."""
    if name in ("image", "mask"):
        return request.image is not None or not request.controls
    return name in {each.name for each in fields(request)} - set(_NOT_VARIED)


def _controls_of(name: str, request: GenerateRequest, known: Sequence[str]) -> Iterator[int]:
    """Indices of the controls that a setting is of: `1.weight`, `canny.weight`, or `weight` of all."""
    prefix, _, key = name.rpartition(".")
    if not request.controls:
        raise UserError(
            f"there is no setting {name!r}{nearest(name, ['seed', *known])}; there are no controls to set it of",
            "unknown-key",
        )
    chosen = [index for index, use in enumerate(request.controls) if prefix in ("", str(index), use.control)]
    if not chosen:
        controls = ", ".join(f"{index} ({use.control})" for index, use in enumerate(request.controls))
        raise UserError(f"{name}: there is no control {prefix!r}; known: {controls}", "unknown-name")
    if len(chosen) > 1 and prefix:
        raise UserError(
            f"{name}: {len(chosen)} controls are {prefix!r}; name one by its number, such as {chosen[0]}.{key}",
            "contradiction",
        )
    yield from chosen


def _lora_setting(name: str, request: GenerateRequest) -> re.Match[str] | None:
    """`lora.weight`, `lora.WHICH.weight` and the same of `file`, unless a control has that name."""
    if any(use.control == name.rpartition(".")[0] for use in request.controls):
        return None
    return _OF_A_LORA.fullmatch(name)


def _loras_of(name: str, which: str | None, request: GenerateRequest) -> list[int]:
    """Indices of the LoRAs that a setting is of: by number, file or file name without suffix; without `which`, all."""
    if not request.loras:
        raise UserError(f"{name}: there are no LoRAs to set it of; pass them in loras (--lora)", "unknown-key")
    chosen = [
        index for index, use in enumerate(request.loras) if which in (None, str(index), use.file, Path(use.file).stem)
    ]
    listed = ", ".join(f"{index} ({use.file})" for index, use in enumerate(request.loras))
    if not chosen:
        raise UserError(f"{name}: there is no LoRA {which!r}; known: {listed}", "unknown-name")
    if len(chosen) > 1 and which is not None:
        raise UserError(f"{name}: {len(chosen)} LoRAs are {which!r}; name one by its number: {listed}", "contradiction")
    return chosen


def _set_of_control(use: dict[str, Any], key: str, value: Any) -> None:
    from controlkit.sampling.inputs import is_listing, with_plain_inputs  # which imports this module

    if isinstance(value, str) and key in ("span", "layers"):
        value = read_option(key, value, "an axis")
    if key == "span":
        use["start"], use["end"] = value
    elif key in (use["inputs"] or ()) and not is_listing(value):
        use["inputs"] = {**use["inputs"], key: value}
    elif key == "image":
        use |= {"image": value, "inputs": None}
    elif key in _OF_A_CONTROL:
        use[key] = value
    else:
        use["parameters"] = {**(use["parameters"] or {}), key: value}
        if use["prepared"]:
            use |= with_plain_inputs(use)  # the other parameters contradict a prepared image


def is_changed(name: str, request: GenerateRequest, changes: Mapping[str, Any]) -> bool:
    """Whether changed fields of a request replace a setting of an axis."""
    if name == "seed":
        return "seeds" in changes
    if _lora_setting(name, request) is not None:
        return "loras" in changes
    return name in changes if _is_of_request(name, request) else "controls" in changes


def labels_of(axis: Axis) -> list[str]:
    """The title of each position of an axis: `guidance 3`, a prompt, or the name of an image.

    Of paths, names are shown without folder and suffix unless two have the same.
    """
    columns = []
    for name, values in axis.items():
        key = name.rpartition(".")[2]
        if key == "prompt":
            columns.append([str(value) or "(no prompt)" for value in values])
        elif key in PATHS:
            columns.append(_path_labels(key, values))
        else:
            columns.append([f"{name} {_text(value)}" for value in values])
    return [", ".join(parts) for parts in zip(*columns, strict=True)]


def _path_labels(key: str, values: Sequence[Any]) -> list[str]:
    """Titles of paths; None stands for no mask or image, or for the base's own VAE."""
    names = {str(value): Path(str(value)).stem for value in values if value is not None}
    counts = Counter(names.values())
    shown = {path: path if counts[name] > 1 else name for path, name in names.items()}
    absent = "default vae" if key == "vae" else f"no {key}"
    return [absent if value is None else shown[str(value)] for value in values]


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else "default" if value is None else str(value)


def stems_of(axis: Axis) -> list[str]:
    """Part of a file name for each position: setting and value where that is short and unique, else its number."""
    name, values = next(iter(axis.items()))
    if name == "seed":  # which every file name ends with
        return [""] * len(values)
    key = re.sub(r"[^A-Za-z0-9]+", "", name.rpartition(".")[2])
    prefix = name.rpartition(".")[0]
    of_lora, which = ("lora_", prefix[5:]) if prefix.startswith("lora.") else ("", prefix)
    slug = of_lora + re.sub(r"[^A-Za-z0-9]+", "_", which if which.isdecimal() else Path(which).stem)
    key = f"{slug}_{key}" if prefix else key
    stems = [Path(str(value)).stem if key.endswith("image") else _text(value) for value in values]
    fits = all(re.fullmatch(rf"[A-Za-z0-9_.+-]{{1,{_LONGEST_NAME}}}", stem) for stem in stems)
    if not fits or len({stem.casefold() for stem in stems}) != len(stems):
        digits = len(str(len(values) - 1))
        stems = [f"{index:0{digits}d}" for index in range(len(values))]
    return [f"{key}{stem}" for stem in stems]
