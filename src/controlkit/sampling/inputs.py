"""What the uses of controls in a request are given: named inputs, checked against the controls, and images read."""

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
from controlkit.conditions.condition import Condition, background_of
from controlkit.controls.control import Control, Input, takes_one_image, words_of_inputs
from controlkit.errors import UserError, nearest
from controlkit.files import read_json
from controlkit.formats.load import control_class
from controlkit.images import decode_rgb, read_bytes, resize_cover
from controlkit.sampling.request import ControlUse, GenerateRequest

Kind = type[Control] | Control
"""A system, or a control of it."""


def with_named_inputs(request: GenerateRequest, kinds: Sequence[Kind] | None = None) -> GenerateRequest:
    """The same request, its `.json` files of inputs read, its inputs held to what its controls take.

    Args:
        kinds: of its controls, in order; default: of their files, of which the header is enough.

    Raises:
        UserError: there is no such control, or an input is missing, not known, or of another kind.
    """
    kinds = kinds or [control_class(use.control) for use in request.controls]
    uses = tuple(_named(use, kind) for use, kind in zip(request.controls, kinds, strict=True))
    return dataclasses.replace(request, controls=uses)


def _named(use: ControlUse, kind: Kind) -> ControlUse:
    if use.image is not None and use.image.lower().endswith(".json"):
        use = dataclasses.replace(use, image=None, inputs=_read_inputs(Path(use.image), kind))
    if use.inputs is None:
        if not takes_one_image(kind):
            raise UserError(
                f"{use.control} is {kind.title}, which takes {words_of_inputs(kind)}; give a .json file of them:"
                f" --control {use.control}=INPUTS.json (in Python: inputs={{...}})"
            )
        return use
    _check(use, kind)
    if len(kind.inputs) == 1 and kind.inputs[0].kind == "image":
        return dataclasses.replace(use, image=use.inputs[kind.inputs[0].name], inputs=None)
    return use


def _read_inputs(path: Path, kind: Kind) -> dict[str, Any]:
    """Inputs by name; paths of images are relative to the file."""
    values = read_json(path)
    if len(kind.inputs) == 1 and kind.inputs[0].kind == "value":
        return {kind.inputs[0].name: values}
    if not isinstance(values, dict):
        raise UserError(f"{path} must be a mapping from the names of inputs: {words_of_inputs(kind)}")
    images = {one.name for one in kind.inputs if one.kind == "image"}
    return {
        name: str(path.parent / value) if name in images and isinstance(value, str) else value
        for name, value in values.items()
    }


def _check(use: ControlUse, kind: Kind) -> None:
    assert use.inputs is not None
    known = {one.name: one for one in kind.inputs}
    for name in use.inputs:
        if name not in known:
            raise UserError(f"{use.control} is {kind.title}, which has no input {name!r}{nearest(name, list(known))}")
    for name, one in known.items():
        if name not in use.inputs:
            if one.required:
                raise UserError(f"{use.control} lacks its input {name!r}; it takes {words_of_inputs(kind)}")
            continue
        value = use.inputs[name]
        if one.kind == "image" and not isinstance(value, str):
            raise UserError(f"the input {name!r} of {use.control} is an image: give its path, not {value!r}")
        if one.check is not None and (problem := one.check(value)) is not None:
            raise UserError(f"the input {name!r} of {use.control} {problem}")


def images_of(use: ControlUse, kind: Kind) -> dict[str, str]:
    """Input -> path, of the images that a use is given (`with_named_inputs`)."""
    if use.inputs is None:
        (name,) = (one.name for one in kind.inputs if one.required)
        return {name: use.image or ""}
    return {one.name: use.inputs[one.name] for one in kind.inputs if one.kind == "image" and one.name in use.inputs}


def values_of(use: ControlUse, kind: Kind) -> dict[str, Any]:
    """Input -> value, of those that are no images."""
    given: Mapping[str, Any] = use.inputs or {}
    return {one.name: given[one.name] for one in kind.inputs if one.kind == "value" and one.name in given}


@dataclass(frozen=True)
class ReadImage:
    """An image that a control is given, as its file has it."""

    use: ControlUse
    input: Input
    path: str
    data: bytes
    """Of the file."""
    image: Image.Image
    """A photo, upright and RGB."""

    @classmethod
    def read(cls, use: ControlUse, kind: Kind) -> list[ReadImage]:
        """Those of a use.

        Raises:
            UserError: one is missing, damaged or no image.
        """
        known = {one.name: one for one in kind.inputs}
        files = {name: (path, read_bytes(path)) for name, path in images_of(use, kind).items()}
        return [cls(use, known[name], path, data, decode_rgb(data, path)) for name, (path, data) in files.items()]

    def condition_image(self, control: Control, width: int, height: int) -> Image.Image:
        """The condition image that `control` expects, of this size.

        Raises:
            UserError: nothing says which condition that is, and the image is not prepared.
        """
        condition, use = self.condition(control), self.use
        if not use.prepared:
            if condition is None:
                raise UserError(
                    f"the file {use.control} does not say which condition it follows; make the condition image with"
                    " `controlkit condition` and give it with --prepared"
                )
            image = resize_cover(self.image, width, height)
            return Image.fromarray(conditions.find(condition)(np.asarray(image)))
        background, image = background_of(condition), self.image
        if background != Condition.background:
            image = decode_rgb(self.data, self.path, background)
        return resize_cover(image, width, height, nearest=_is_of_labels(condition))

    def condition(self, control: Control) -> str | None:
        """The condition that it is given as: the input's own, or else the control's."""
        return self.input.condition or control.condition


def _is_of_labels(condition: str | None) -> bool:
    """Whether the colours of a condition's images are labels, which must not be mixed."""
    with suppress(UserError):  # files of others may name a condition that is not known here
        return condition is not None and conditions.find(condition).resize == "nearest"
    return False
