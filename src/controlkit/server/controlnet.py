"""The API of A1111's ControlNet extension: `/controlnet/`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict

from controlkit.errors import UserError
from controlkit.server.bodies import Body, Number
from controlkit.server.limits import Limits
from controlkit.server.modules import HOLES, NONE, OWN, RESOLUTION, named_module, named_modules, sliders_of
from controlkit.server.parameters import computed_conditions
from controlkit.server.problems import responses
from controlkit.server.replies import detected, name_ignored, service_of
from controlkit.server.sent_images import decode_base64, encode_base64

router = APIRouter(prefix="/controlnet", tags=["A1111 ControlNet"], responses=responses())

_VERSION = 3
"""Version of the extension's API; clients send `control_mode` from version 2."""


class DetectBody(Body, BaseModel):
    """Body of `detect`. Other keys are allowed; a header of the response names them."""

    model_config = ConfigDict(extra="allow")

    controlnet_module: str = "none"
    controlnet_images: list[str] = []
    controlnet_input_images: list[str] = []
    """The same under Auto-Photoshop's name."""
    controlnet_masks: list[str | None] | None = None
    """For a module for inpainting, the hole of each image."""
    controlnet_processor_res: int | None = None
    """Length of the short side in pixels to which images are scaled; default: as they are."""
    controlnet_threshold_a: Number | None = None
    controlnet_threshold_b: Number | None = None
    low_vram: bool = False


class Detected(BaseModel):
    """Response of `detect`: base64 of PNG files."""

    images: list[str]
    info: str = "Success"


@router.get("/version")
async def version() -> dict[str, int]:
    """Version of this API."""
    return {"version": _VERSION}


@router.get("/model_list")
async def model_list(request: Request) -> dict[str, list[str]]:
    """Names of the controls."""
    return {"model_list": list(service_of(request).catalogue.controls)}


@router.get("/module_list")
async def module_list(alias_names: bool = False) -> dict[str, Any]:
    """Conditions, with the sliders of their parameters."""
    names = [*named_modules(), OWN]
    details = {name: {"model_free": False, "sliders": sliders_of(name)} for name in names}
    return {"module_list": names, "module_detail": details}


@router.get("/control_types")
async def control_types(request: Request) -> dict[str, Any]:
    """Conditions that controls follow, with these controls."""
    controls = service_of(request).catalogue.controls
    modules, models = [*named_modules(), OWN], ["None", *controls]
    types = {
        "All": {
            "module_list": modules,
            "model_list": models,
            "default_option": NONE,
            "default_model": "None",
        }
    }
    for kind in dict.fromkeys(entry.condition for entry in controls.values() if entry.condition is not None):
        fitting = [name for name, entry in controls.items() if entry.condition == kind]
        own = [kind] if kind in computed_conditions() else []
        types[kind] = {
            "module_list": [NONE, OWN, *own],
            "model_list": ["None", *fitting],
            "default_option": own[0] if own else NONE,
            "default_model": fitting[0],
        }
    return {"control_types": types}


@router.get("/settings")
async def settings(request: Request) -> dict[str, int]:
    """The largest number of units in a request."""
    count = service_of(request).limits.controls
    return {"control_net_unit_count": count, "control_net_max_models_num": count}


@router.post("/detect", responses=responses(409, 503))
async def detect(body: DetectBody, request: Request, response: Response) -> Detected:
    """Compute condition images."""
    service = service_of(request)
    name_ignored(body.model_extra or {}, request, response)
    sent = body.controlnet_images or body.controlnet_input_images
    if not sent:
        raise UserError("controlnet_images is empty; send an image as base64", "missing-setting")
    service.limits.check("images", len(sent))
    name = body.controlnet_module
    if name.strip().lower() == OWN:
        raise UserError(
            f"controlnet_module is {OWN}, the condition of a unit's control; there is no control here, name a module",
            "unsupported",
        )
    settings = {
        "threshold_a": body.controlnet_threshold_a,
        "threshold_b": body.controlnet_threshold_b,
        "processor_res": body.controlnet_processor_res,
    }
    module = named_module(name, settings, "detect")
    condition = None if module.condition is None else module.condition.name
    images = _decoded("controlnet_images", sent, service.limits)
    masks = _decoded("controlnet_masks", body.controlnet_masks or (), service.limits)
    spec: dict[str, Any] = {
        "module": condition,
        "parameters": dict(module.parameters),
        "side": None if condition is None else _side(body.controlnet_processor_res),
        "invert": module.inverts,
        "holes": _holes(condition, images, masks),
    }
    made = await detected(service, spec, {**images, **masks}, request)
    return Detected(images=[encode_base64(data) for data in made])


def _decoded(field: str, sent: Sequence[str | None], limits: Limits) -> dict[str, bytes]:
    """Name -> bytes of the images of a list, without those that are empty. The names sort in the order of the list."""
    return {
        f"{field}[{place:06}]": decode_base64(text or "", f"{field}[{place}]", limits)
        for place, text in enumerate(sent)
        if text or field == "controlnet_images"
    }


def _holes(condition: str | None, images: dict[str, bytes], masks: dict[str, bytes]) -> dict[str, str]:
    """Name of each image -> name of its mask.

    Raises:
        UserError: there are masks and no use for them, or images for inpainting without one.
    """
    if condition not in HOLES:
        if masks:
            raise UserError(
                f"controlnet_masks are the holes of modules for inpainting ({', '.join(HOLES)}); the module is"
                f" {condition or NONE}",
                "unsupported",
            )
        return {}
    holes = {name: name.replace("images", "masks") for name in images}
    missing = sorted(set(holes.values()) ^ set(masks))
    if missing:
        raise UserError(
            f"{condition} needs a mask for each image, white where it changes; controlnet_images has {len(images)},"
            f" controlnet_masks {len(masks)}",
            "missing-setting",
        )
    return holes


def _side(side: int | None) -> int | None:
    """The requested length of the short side in pixels; None for that of the image.

    Raises:
        UserError: it is out of range.
    """
    if side is None or side <= 0:
        return None
    least, most = int(RESOLUTION["min"]), int(RESOLUTION["max"])  # type: ignore[call-overload]
    if not least <= side <= most:
        raise UserError(f"controlnet_processor_res is {side}; expected {least} to {most}", "out-of-range")
    return side
