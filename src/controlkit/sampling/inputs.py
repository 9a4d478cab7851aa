"""Named inputs of the controls of a request, checked against each control."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from controlkit import conditions
from controlkit.controls.control import Control
from controlkit.controls.inputs import takes_one_image, words_of_inputs
from controlkit.errors import UserError, nearest
from controlkit.files import read_json
from controlkit.formats.describe import residual_sites
from controlkit.formats.load import control_class, recorded_condition
from controlkit.images import check_exists
from controlkit.sampling.axes import points_of
from controlkit.sampling.control_text import KEYS, parse_control
from controlkit.sampling.request import GenerateRequest
from controlkit.sampling.uses import ControlUse
from controlkit.sampling.weighting import check_number_of_layers

Kind = type[Control] | Control
"""A system, or a loaded control."""


def with_named_inputs(request: GenerateRequest, kinds: Sequence[Kind] | None = None) -> GenerateRequest:
    """Read the `.json` files of inputs of a request and check all inputs against its controls.

    Of a request with axes, every combination is checked, and the request is returned as it is.

    Args:
        request: the request.
        kinds: the systems of its controls, in order; default: read from the headers of their files.

    Raises:
        UserError: a control does not exist, or an input is missing, unknown or of the wrong type.
    """
    if request.vary or request.xy:
        check_inputs((point.request for point in points_of(request)), kinds)
        return request
    kinds = kinds or [control_class(use.control) for use in request.controls]
    uses = tuple(_named(use, kind) for use, kind in zip(request.controls, kinds, strict=True))
    return dataclasses.replace(request, controls=uses)


def check_inputs(
    requests: Iterable[GenerateRequest], kinds: Sequence[Kind] | None = None, given: Collection[str] = ()
) -> None:
    """Check the inputs of requests without axes against their controls, and that their images exist.

    Args:
        kinds: as of `with_named_inputs`, the same for all requests.
        given: names of images in memory, which are no files.

    Raises:
        UserError: as `with_named_inputs`, or an image is missing.
    """
    classes: dict[str, Kind] = {}
    found = set(given)
    for request in requests:
        for use in request.controls:
            if kinds is None and use.control not in classes:
                classes[use.control] = control_class(use.control)
        own = kinds or [classes[use.control] for use in request.controls]
        named = with_named_inputs(request, own)
        paths = [request.image, request.mask]
        for use, kind in zip(named.controls, own, strict=True):
            paths += [use.mask, *images_of(use, kind).values()]
        for path in paths:
            if path is not None and path not in found:
                check_exists(path)
                found.add(path)


def parse_control_use(text: str, **settings: Any) -> ControlUse:
    """Parse `NAME_OR_FILE=IMAGE[@weight[:start-end]][,KEY=VALUE...]`, as on the command line (`parse_control`).

    Args:
        text: the argument of `--control`.
        settings: defaults of what the text leaves open, such as `prepared` and `mode`.

    Raises:
        UserError: it does not have that form.
    """
    parsed = {**settings, **parse_control(text)}
    if parsed.get("prepared") and "parameters" in parsed:
        parsed = with_plain_inputs(parsed)  # the other parameters contradict a prepared image
    return ControlUse(**parsed)


def with_plain_inputs(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a `ControlUse` with the plain inputs of its control among `parameters` moved to `inputs`.

    A control that does not exist is left to `with_named_inputs`.
    """
    try:
        kind = control_class(settings["control"])
    except UserError:
        return settings
    image, inputs = settings.get("image"), settings.get("inputs")
    if any(key in _plain_inputs(kind) for key in settings["parameters"]) and is_listing(image):
        image, inputs = None, _read_inputs(Path(str(image)), kind)
    return {**settings, **_moved(kind, image, inputs, settings["parameters"])}


def is_listing(image: Any) -> bool:
    """Whether an image is a `.json` file of inputs."""
    return isinstance(image, str) and image.lower().endswith(".json")


def _moved(
    kind: Kind, image: str | None, inputs: dict[str, Any] | None, parameters: dict[str, Any] | None
) -> dict[str, Any]:
    """`image`, `inputs` and `parameters`, with the plain inputs among the parameters moved to the inputs."""
    plain = [key for key in parameters or () if key in _plain_inputs(kind)]
    if parameters is None or not plain or (inputs is None and not takes_one_image(kind)):
        return {"image": image, "inputs": inputs, "parameters": parameters}
    if twice := [key for key in plain if key in (inputs or ())]:
        raise UserError(f"the input {twice[0]} is given twice", "contradiction")
    if inputs is None:
        (name,) = (each.name for each in kind.inputs if each.required)
        inputs = {name: image}
    rest = {key: value for key, value in parameters.items() if key not in plain}
    return {"image": None, "inputs": {**inputs, **{key: parameters[key] for key in plain}}, "parameters": rest or None}


def _plain_inputs(kind: Kind) -> list[str]:
    return [each.name for each in kind.inputs if each.kind == "value"]


def _named(use: ControlUse, kind: Kind) -> ControlUse:
    if is_listing(use.image):
        use = dataclasses.replace(use, image=None, inputs=_read_inputs(Path(str(use.image)), kind))
    use = dataclasses.replace(use, **_moved(kind, use.image, use.inputs, use.parameters))
    if use.parameters is not None and (use.inputs is not None or takes_one_image(kind)):
        _check_parameters(use, kind)
    if use.inputs is None:
        if not takes_one_image(kind):
            raise UserError(
                f"{use.control} is {kind.title} and takes {words_of_inputs(kind)}; pass them in a .json file:"
                f" --control {use.control}=INPUTS.json (in Python: inputs={{...}})",
                "missing-setting",
            )
        return use
    _check(use, kind)
    if len(kind.inputs) == 1 and kind.inputs[0].kind == "image":
        return dataclasses.replace(use, image=use.inputs[kind.inputs[0].name], inputs=None)
    return use


def _read_inputs(path: Path, kind: Kind) -> dict[str, Any]:
    """Read inputs by name; paths of images are relative to the file."""
    values = read_json(path)
    if len(kind.inputs) == 1 and kind.inputs[0].kind == "value":
        return {kind.inputs[0].name: values}
    if not isinstance(values, dict):
        raise UserError(f"{path} must be a mapping from input names: {words_of_inputs(kind)}", "wrong-type")
    images = {each.name for each in kind.inputs if each.kind == "image"}
    return {
        name: str(path.parent / value) if name in images and isinstance(value, str) else value
        for name, value in values.items()
    }


def _check(use: ControlUse, kind: Kind) -> None:
    assert use.inputs is not None
    known = {each.name: each for each in kind.inputs}
    for name in use.inputs:
        if name not in known:
            raise UserError(
                f"{use.control} is {kind.title}, which has no input {name!r}{nearest(name, list(known))}", "unknown-key"
            )
    for name, expected in known.items():
        if name not in use.inputs:
            if expected.required:
                raise UserError(
                    f"{use.control} lacks its input {name!r}; it takes {words_of_inputs(kind)}", "missing-setting"
                )
            continue
        value = use.inputs[name]
        if expected.kind == "image" and not isinstance(value, str):
            raise UserError(
                f"input {name!r} of {use.control} must be the path of an image, not {value!r}", "wrong-type"
            )
        if expected.check is not None and (problem := expected.check(value)) is not None:
            raise UserError(f"input {name!r} of {use.control} {problem}", "wrong-type")


def _check_parameters(use: ControlUse, kind: Kind) -> None:
    """Check the parameters of a control by the conditions that its file records."""
    images = images_of(use, kind)
    for key in use.parameters or ():
        name, dot, _ = key.rpartition(".")
        if dot and name not in images:
            raise UserError(
                f"{key}: {use.control} has no image {name!r} in use{nearest(name, list(images))}", "unknown-key"
            )
        if not dot and len(images) != 1:
            raise UserError(
                f"{use.control} has {len(images)} images ({', '.join(images)}); say whose parameter {key} is, such as"
                f" {next(iter(images), 'INPUT')}.{key}",
                "contradiction",
            )
    recorded = kind.condition if isinstance(kind, Control) else recorded_condition(use.control)
    if values_of(use, kind):  # which may select another, once the control is loaded
        recorded = None
    for each in kind.inputs:
        condition = each.condition or recorded
        if each.name in images and condition is not None and _is_known(condition):
            check_keys(parameters_of(use, each.name), condition, kind)


def parameters_of(use: ControlUse, name: str) -> dict[str, Any]:
    """Parameters of the condition of one image of a control."""
    prefix, parameters = f"{name}.", use.parameters or {}
    mine = {key: value for key, value in parameters.items() if "." not in key or key.startswith(prefix)}
    return {key.removeprefix(prefix): value for key, value in mine.items()}


def check_keys(parameters: Mapping[str, Any], condition: str, kind: Kind) -> None:
    """Check that all are parameters of a condition, of valid types and within their limits.

    Args:
        parameters: of one image of a control.
        condition: of that image.
        kind: the control, whose plain inputs are suggested, too.

    Raises:
        UserError: one is not.
    """
    found = conditions.find(condition)
    known = found.defaults
    for key, value in parameters.items():
        if key in known:
            found.check(key, value)
        else:
            raise UserError(
                f"{key!r} is neither an option of a control nor a parameter of {condition}"
                f"{nearest(key, [*KEYS, *_plain_inputs(kind), *known])}",
                "unknown-key",
            )


def check_layers(requests: Iterable[GenerateRequest]) -> None:
    """Check the number of `layers` of each control before weights are loaded, where configurations tell it.

    Raises:
        UserError: it is not the number of residuals.
    """
    known: dict[tuple[str, str], tuple[str, ...] | None] = {}
    for request in requests:
        for use in request.controls:
            key = (use.control, request.base)
            if use.layers is None:
                continue
            if key not in known:
                known[key] = residual_sites(*key)
            if (sites := known[key]) is not None:
                check_number_of_layers(use.layers, sites)


def images_of(use: ControlUse, kind: Kind) -> dict[str, str]:
    """Input -> path, for the image inputs of a control (after `with_named_inputs`)."""
    if use.inputs is None:
        (name,) = (each.name for each in kind.inputs if each.required)
        return {name: use.image or ""}
    return {
        each.name: use.inputs[each.name] for each in kind.inputs if each.kind == "image" and each.name in use.inputs
    }


def values_of(use: ControlUse, kind: Kind) -> dict[str, Any]:
    """Input -> value, for the inputs of a control that are not images."""
    inputs: Mapping[str, Any] = use.inputs or {}
    return {each.name: inputs[each.name] for each in kind.inputs if each.kind == "value" and each.name in inputs}


def _is_known(condition: str) -> bool:
    """Whether there is such a condition; files of other tools may name others."""
    with suppress(UserError):
        conditions.find(condition)
        return True
    return False
