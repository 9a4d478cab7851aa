"""The API of A1111's ControlNet extension: `/controlnet/`."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from controlkit import conditions
from controlkit.errors import UserError
from controlkit.server.parameters import computed_conditions, listed_condition
from controlkit.server.replies import detected, service_of
from controlkit.server.sent_images import decode_base64, encode_base64
from controlkit.server.units import OWN, RESOLUTION, sliders, threshold_parameters

router = APIRouter(prefix="/controlnet", tags=["A1111 ControlNet"])

_VERSION = 3
"""Version of the extension's API; clients send `control_mode` from version 2."""

Number = Annotated[float, Field(allow_inf_nan=False)]


class DetectBody(BaseModel):
    """Body of `detect`."""

    controlnet_module: str = "none"
    controlnet_images: list[str] = []
    controlnet_input_images: list[str] = []
    """The same under Auto-Photoshop's name."""
    controlnet_masks: list[Any] | None = None
    controlnet_processor_res: int | None = None
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
    names = ["none", OWN, *computed_conditions()]
    details: dict[str, Any] = {name: {"model_free": False, "sliders": []} for name in ("none", OWN)}
    for name, condition in computed_conditions().items():
        own = [
            {"name": parameter, "value": value, "min": low, "max": high, "step": _step(low, high)}
            for parameter, value, low, high in sliders(condition)
        ]
        details[name] = {"model_free": False, "sliders": [RESOLUTION, *own]}
    return {"module_list": names, "module_detail": details}


@router.get("/control_types")
async def control_types(request: Request) -> dict[str, Any]:
    """Conditions that controls follow, with these controls."""
    controls = service_of(request).catalogue.controls
    modules, models = ["none", OWN, *computed_conditions()], ["None", *controls]
    types = {
        "All": {
            "module_list": modules,
            "model_list": models,
            "default_option": "none",
            "default_model": "None",
        }
    }
    for kind in dict.fromkeys(entry.condition for entry in controls.values() if entry.condition is not None):
        fitting = [name for name, entry in controls.items() if entry.condition == kind]
        own = [kind] if kind in computed_conditions() else []
        types[kind] = {
            "module_list": ["none", OWN, *own],
            "model_list": ["None", *fitting],
            "default_option": own[0] if own else "none",
            "default_model": fitting[0],
        }
    return {"control_types": types}


@router.get("/settings")
async def settings(request: Request) -> dict[str, int]:
    """The largest number of units in a request."""
    count = service_of(request).limits.controls
    return {"control_net_unit_count": count, "control_net_max_models_num": count}


@router.post("/detect")
async def detect(body: DetectBody, request: Request) -> Detected:
    """Compute condition images."""
    service = service_of(request)
    sent = body.controlnet_images or body.controlnet_input_images
    if not sent:
        raise UserError("controlnet_images is empty; send an image as base64", "missing-setting")
    service.limits.check("images", len(sent))
    files = {
        f"controlnet_images[{place:02}]": decode_base64(text, f"controlnet_images[{place}]", service.limits)
        for place, text in enumerate(sent)
    }
    module = body.controlnet_module.strip().lower()
    spec: dict[str, Any] = {"module": None, "parameters": {}, "side": None}
    if module not in ("", "none"):
        condition = conditions.find(listed_condition(module))
        parameters = threshold_parameters(condition, body.controlnet_threshold_a, body.controlnet_threshold_b)
        side = body.controlnet_processor_res
        spec = {"module": condition.name, "parameters": parameters, "side": _side(side)}
    return Detected(images=[encode_base64(data) for data in await detected(service, spec, files)])


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


def _step(low: float, high: float) -> float:
    return 1 if high - low >= 50 else (high - low) / 100
