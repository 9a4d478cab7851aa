"""What a person should know about a request: what is cut, sizes, weights and condition images that do not work."""

from __future__ import annotations

import numpy as np
from PIL import Image

from controlkit.bases.base import Base
from controlkit.controls.control import Control
from controlkit.images import is_flat
from controlkit.sampling.inputs import ReadImage
from controlkit.sampling.request import GenerateRequest


def request_notes(request: GenerateRequest, base: Base, width: int, height: int) -> list[str]:
    """Notes on the prompts, the size in pixels and the weights of a request."""
    notes = []
    for prompt in filter(None, (request.prompt, request.negative_prompt)):
        if cut := base.cut_from(prompt):
            notes.append(f"the base reads {base.prompt_tokens} tokens of a prompt; it does not see {cut!r}")
    sides, area = (width / base.size, height / base.size), width * height / base.size**2
    if not (0.5 < area < 2 and all(0.5 < side < 2 for side in sides)):
        notes.append(
            f"{base.name} was trained at {base.size} x {base.size}; at {width} x {height} expect shapes that are"
            " repeated, stretched or blurred"
        )
    notes += [
        f"the weight of {use.control} is {use.weight:g}: a negative weight pushes away from the condition image, which"
        " usually breaks the image; for less control give a weight from 0 to 1"
        for use in request.controls
        if use.weight < 0
    ]
    return notes


def crop_note(path: str, image: Image.Image, width: int, height: int) -> list[str]:
    """A note on what of a control's image lies outside the result, if a pixel or more does."""
    factor = max(width / image.width, height / image.height)
    across, down = image.width * factor - width, image.height * factor - height
    if max(across, down) < 1:
        return []
    where = "at the sides" if across > down else "above and below"
    return [
        f"{path} is {image.width} x {image.height}: scaled to cover {width} x {height}, it is cut {where}; give"
        " the result its shape with --width and --height, or cut the image yourself"
    ]


def flat_note(given: ReadImage, control: Control, image: Image.Image) -> list[str]:
    """A note on a condition image that is one flat colour, if it is."""
    if not is_flat(np.asarray(image)):
        return []
    if given.use.prepared:
        what = f"{given.path}, which is given to {given.use.control} as its condition image,"
        why = "check its polarity and its transparency, or leave out --prepared if it is a photo"
    else:
        what, why = f"{given.condition(control)} of {given.path}", "nothing was found in the image"
    return [f"{what} is one flat colour: {why}"]
