"""What a caller of `generate` passes in place of files: images, a loaded base, loaded controls."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from controlkit.bases.base import Base
from controlkit.bases.devices import PRECISIONS, choose_device
from controlkit.controls.control import Control
from controlkit.errors import UserError
from controlkit.formats.load import recorded_condition
from controlkit.images import to_rgb, upright
from controlkit.sampling.request import GenerateRequest


def files_of_images(images: Mapping[str, Image.Image | np.ndarray], request: GenerateRequest) -> dict[str, bytes]:
    """Images as PNG files, by the name that stands for each in a request.

    Args:
        images: PIL images, or `uint8` arrays `[H, W]`, `[H, W, 3]` or `[H, W, 4]`.

    Raises:
        UserError: one is something else, or empty, or `request` does not name it.
    """
    named = set(_texts(request.to_json()))
    for name in images:
        if name not in named:
            raise UserError(f"the image {name!r} is passed, but the request names no such image", "contradiction")
    return {name: _png(name, image) for name, image in images.items()}


def _texts(values: Any) -> Iterator[str]:
    """All texts among values of JSON."""
    if isinstance(values, str):
        yield values
    elif isinstance(values, Mapping | list | tuple):
        for each in values.values() if isinstance(values, Mapping) else values:
            yield from _texts(each)


def _png(name: str, image: Image.Image | np.ndarray) -> bytes:
    if isinstance(image, np.ndarray):
        channels = image.shape[2] if image.ndim == 3 else 1
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or channels not in (1, 3, 4) or not image.size:
            raise UserError(
                f"the image {name!r} is an array {list(image.shape)} of {image.dtype}; expected uint8 [H, W], [H, W, 3]"
                " or [H, W, 4]",
                "wrong-type",
            )
        image = Image.fromarray(image[:, :, 0] if channels == 1 and image.ndim == 3 else image)
    elif not isinstance(image, Image.Image):
        raise UserError(
            f"the image {name!r} is {type(image).__name__}; expected a PIL image or a uint8 array", "wrong-type"
        )
    image = upright(image)
    if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA"):
        image = to_rgb(image, name=name)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def with_what_is_loaded(
    request: GenerateRequest, base: Base | None, controls: Sequence[Control] | None
) -> GenerateRequest:
    """The request with the names of a base that is passed loaded and of its VAE, after checking what is passed.

    Raises:
        UserError: they contradict each other or do not fit together.
    """
    if controls is not None:
        _check_controls(request, controls)
    if base is None:
        return request
    if request.vae not in (None, base.vae_name):
        raise UserError(
            f"vae is {request.vae}, but the base passed has {base.vae_name or 'its own'}; load it with that"
            " autoencoder: load_base(name, vae=...)",
            "contradiction",
        )
    if request.precision != "auto" and PRECISIONS.get(request.precision) != base.dtype:
        raise UserError(
            f"precision is {request.precision}, but the base passed is {base.dtype}; load it so, or leave it at auto",
            "contradiction",
        )
    if request.device != "auto" and choose_device(request.device).type != base.device.type:
        raise UserError(
            f"device is {request.device}, but the base passed is on {base.device}; load it there, or leave it at auto",
            "contradiction",
        )
    for use, control in zip(request.controls, controls or (), strict=False):
        weight = next(control.parameters(), None)
        if weight is not None and (weight.dtype, weight.device) != (base.dtype, base.device):
            raise UserError(
                f"the control passed for {use.control} is {weight.dtype} on {weight.device}, the base {base.dtype} on"
                f" {base.device}; load it for this base: load_control(name, base)",
                "incompatible",
            )
    if (request.base, request.vae) == (base.name, base.vae_name):
        return request
    return replace(request, base=base.name, vae=base.vae_name)


def _check_controls(request: GenerateRequest, controls: Sequence[Control]) -> None:
    uses = request.controls
    if len(controls) != len(uses):
        raise UserError(
            f"{len(controls)} controls are passed loaded for the {len(uses)} of the request; pass one for each, in"
            " order",
            "contradiction",
        )
    for use, control in zip(uses, controls, strict=True):
        recorded = None
        with suppress(UserError):  # a name need not be a file's if the control is passed
            recorded = recorded_condition(use.control)
        if None not in (recorded, control.condition) and recorded not in (control.condition, *control.conditions):
            raise UserError(
                f"the request's control {use.control} is of {recorded}, but the one passed for it is of"
                f" {control.condition}; pass the controls in the order of the request's",
                "contradiction",
            )
