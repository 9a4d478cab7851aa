"""Inputs of the controls of a request: named inputs checked against each control, and images read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from controlkit import conditions
from controlkit.conditions.condition import BLACK, Condition, background_of
from controlkit.controls.control import Control, Input, takes_one_image, words_of_inputs
from controlkit.errors import UserError, nearest
from controlkit.files import read_json
from controlkit.formats.load import control_class
from controlkit.images import decode_rgb, read_bytes, resize_cover
from controlkit.sampling.axes import points_of
from controlkit.sampling.control_text import KEYS
from controlkit.sampling.request import ControlUse, GenerateRequest

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
        classes: dict[str, Kind] = {}
        for point in points_of(request):
            for use in point.request.controls:
                if use.control not in classes:
                    classes[use.control] = control_class(use.control)
            with_named_inputs(point.request, [classes[use.control] for use in point.request.controls])
        return request
    kinds = kinds or [control_class(use.control) for use in request.controls]
    uses = tuple(_named(use, kind) for use, kind in zip(request.controls, kinds, strict=True))
    return dataclasses.replace(request, controls=uses)


def _named(use: ControlUse, kind: Kind) -> ControlUse:
    if use.image is not None and use.image.lower().endswith(".json"):
        use = dataclasses.replace(use, image=None, inputs=_read_inputs(Path(use.image), kind))
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


@dataclass(frozen=True)
class ControlImage:
    """An image input of a control, as read from its file."""

    use: ControlUse
    input: Input
    path: str
    data: bytes
    """Content of the file."""
    image: Image.Image
    """Decoded as a photo: upright, RGB."""

    @classmethod
    def read(cls, use: ControlUse, kind: Kind) -> list[ControlImage]:
        """Read all images of a control.

        Raises:
            UserError: a file is missing, damaged or not an image.
        """
        known = {each.name: each for each in kind.inputs}
        files = {name: (path, read_bytes(path)) for name, path in images_of(use, kind).items()}
        return [cls(use, known[name], path, data, decode_rgb(data, path)) for name, (path, data) in files.items()]

    def condition_image(self, control: Control, width: int, height: int) -> Image.Image:
        """The condition image for `control`, in pixels `width` x `height`.

        Raises:
            UserError: the control records no condition, and the image is not `prepared`.
        """
        condition, use = self.condition(control), self.use
        if not use.prepared:
            if condition is None:
                raise UserError(
                    f"{use.control} records no condition; compute the condition image with `controlkit condition` and"
                    " pass it with --prepared",
                    "missing-setting",
                )
            image = resize_cover(self.image, width, height)
            found, parameters = conditions.find(condition), use.parameters or {}
            for key in parameters:
                if key not in found.defaults:
                    raise UserError(
                        f"--control has no option {key!r}, and {condition} no parameter of this name"
                        f"{nearest(key, [*KEYS, *found.defaults])}",
                        "unknown-key",
                    )
            return Image.fromarray(found(np.asarray(image), **parameters))
        background, image = background_of(condition), self.image
        if background != Condition.background:
            image = decode_rgb(self.data, self.path, background)
        return resize_cover(image, width, height, nearest=_is_of_labels(condition))

    def condition(self, control: Control) -> str | None:
        """The condition of the input, or else of the control."""
        return self.input.condition or control.condition


@dataclass(frozen=True)
class Mask:
    """The mask of a control, as read from its file."""

    path: str
    data: bytes
    """Content of the file."""
    image: Image.Image
    """Upright, RGB, black where the file is transparent."""

    @classmethod
    def read(cls, use: ControlUse) -> Mask | None:
        """The mask of a control, if it has one.

        Raises:
            UserError: the file is missing, damaged or not an image.
        """
        if use.mask is None:
            return None
        data = read_bytes(use.mask)
        return cls(use.mask, data, decode_rgb(data, use.mask, BLACK))

    def grey(self, width: int, height: int) -> Image.Image:
        """As grey levels, in pixels `width` x `height`, scaled and cropped as images of controls are."""
        return resize_cover(self.image, width, height).convert("L")


def _is_of_labels(condition: str | None) -> bool:
    """Whether colours of the condition are labels, which interpolation would mix."""
    with suppress(UserError):  # files of other tools may name an unknown condition
        return condition is not None and conditions.find(condition).resize == "nearest"
    return False
