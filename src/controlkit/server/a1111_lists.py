"""A1111's API, `/sdapi/v1/`: options, progress, and lists of models and samplers."""

from __future__ import annotations

import io
import time
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool
from PIL import Image
from pydantic import BeforeValidator

from controlkit.bases.solver_names import SOLVERS
from controlkit.errors import UserError
from controlkit.server.bodies import Body, checked_structure
from controlkit.server.catalogue import word_of
from controlkit.server.infotext import SAMPLER_NAMES
from controlkit.server.problems import responses
from controlkit.server.replies import name_ignored, service_of
from controlkit.server.sent_images import decode_base64, encode_base64
from controlkit.server.service import Service

router = APIRouter(prefix="/sdapi/v1", tags=["A1111"], responses=responses())

_SCHEDULERS = ("automatic", "uniform", "karras")


OptionsBody = Annotated[dict[str, Any], BeforeValidator(checked_structure)]
"""Body of `options`: values by name."""


class PngInfoBody(Body):
    """Body of `png-info`."""

    image: str


def vae_of(options: Mapping[str, Any], service: Service) -> str | None:
    """Name of the autoencoder that the options select; None for the base's own.

    Raises:
        UserError: there is no such autoencoder.
    """
    name = options.get("sd_vae")
    if not name or str(name).lower() in ("automatic", "none"):
        return None
    return service.catalogue.find("vaes", str(name))


OPTIONS = ("sd_model_checkpoint", "sd_vae", "CLIP_stop_at_last_layers")
"""Supported options."""
_FIXED = {"samples_format": "png", "sd_checkpoint_hash": None}
"""Options that clients read, and send back with others; other values change nothing."""


async def current_options(service: Service) -> dict[str, Any]:
    """The current values of the supported options."""
    stored = await run_in_threadpool(service.store.options)
    if stored.get("sd_model_checkpoint") not in service.catalogue.bases:
        stored["sd_model_checkpoint"] = service.catalogue.base
    if stored.get("sd_vae") not in service.catalogue.vaes:
        stored["sd_vae"] = "Automatic"
    return {"CLIP_stop_at_last_layers": 1, **stored}


@router.get("/options")
async def options(request: Request) -> dict[str, Any]:
    """The current values of the supported options."""
    return {**await current_options(service_of(request)), **_FIXED}


@router.post("/options")
async def set_options(body: OptionsBody, request: Request, response: Response) -> None:
    """Set options for all clients. Others change nothing; a header of the response and the log name them."""
    service = service_of(request)
    name_ignored((key for key, value in body.items() if not _is_supported(key, value)), request, response)
    values: dict[str, Any] = {}
    if (name := body.get("sd_model_checkpoint")) is not None:
        values["sd_model_checkpoint"] = service.catalogue.find("bases", str(name))
    if (name := body.get("sd_vae")) is not None:
        values["sd_vae"] = vae_of({"sd_vae": name}, service) or "Automatic"
    if (layer := body.get("CLIP_stop_at_last_layers")) is not None:
        if isinstance(layer, bool) or not isinstance(layer, (int, float)) or not 1 <= layer <= 12:
            raise UserError(f"CLIP_stop_at_last_layers is {layer!r}; expected 1 to 12", "out-of-range")
        values["CLIP_stop_at_last_layers"] = int(layer)
    for key, value in values.items():
        await run_in_threadpool(service.store.set_option, key, value)


def _is_supported(option: str, value: Any) -> bool:
    """Whether an option can be set, or has this value anyway."""
    return option in OPTIONS or (option in _FIXED and value == _FIXED[option])


# Progress


@router.get("/progress")
async def progress(request: Request, skip_current_image: bool = False) -> dict[str, Any]:
    """Progress of the running request, with a preview."""
    service = service_of(request)
    job, counts = await service.running(), await service.counts()
    found = None if job is None else service.progress_of(job)
    image = None if found is None or skip_current_image or found.preview is None else encode_base64(found.preview)
    return {
        "progress": 0.0 if found is None else found.fraction,
        "eta_relative": 0.0 if found is None else found.seconds_left or 0.0,
        "state": {
            "skipped": False,
            "interrupted": job is not None and job.cancelling,
            "stopping_generation": False,
            "job": "" if job is None else job.id,
            "job_count": counts["running"] + counts["pending"],
            "job_timestamp": "0" if job is None else time.strftime("%Y%m%d%H%M%S", time.localtime(job.created)),
            "job_no": 0,
            "sampling_step": 0 if found is None else found.done,
            "sampling_steps": 0 if found is None else found.total,
        },
        "current_image": image,
        "textinfo": None,
        "current_task": None if job is None else job.id,
    }


@router.post("/interrupt")
async def interrupt(request: Request) -> dict[str, Any]:
    """Cancel the running request; its client gets the images that are finished."""
    service = service_of(request)
    job = await service.running()
    if job is not None:
        await service.cancel(job.id)
    return {}


@router.post("/skip")
async def skip(request: Request) -> dict[str, Any]:
    """As `interrupt`."""
    return await interrupt(request)


@router.post("/png-info")
async def png_info(body: PngInfoBody, request: Request) -> dict[str, Any]:
    """The settings stored in a PNG."""
    service = service_of(request)
    data = decode_base64(body.image, "image", service.limits)
    items = await run_in_threadpool(_text_of, data)
    return {"info": items.get("parameters", ""), "items": items, "parameters": {}}


def _text_of(data: bytes) -> dict[str, str]:
    """Text chunks in the header of a PNG."""
    with Image.open(io.BytesIO(data)) as image:
        found = {key: value for key, value in image.info.items() if isinstance(key, str) and isinstance(value, str)}
    return {key: value.encode("utf-8", "replace").decode() for key, value in found.items()}


# Lists


@router.get("/samplers")
async def samplers() -> list[dict[str, Any]]:
    """Samplers; `options` has their names in controlkit."""
    return [{"name": SAMPLER_NAMES[name], "aliases": [name], "options": {}} for name in SOLVERS]


@router.get("/schedulers")
async def schedulers() -> list[dict[str, Any]]:
    """Schedules of the samplers."""
    return [
        {"name": name, "label": name.capitalize(), "aliases": [], "default_rho": -1, "need_inner_model": False}
        for name in _SCHEDULERS
    ]


@router.get("/sd-models")
async def sd_models(request: Request) -> list[dict[str, Any]]:
    """Bases."""
    names = service_of(request).catalogue.bases
    return [
        {"title": name, "model_name": name, "hash": None, "sha256": None, "filename": name, "config": None}
        for name in names
    ]


@router.get("/sd-vae")
async def sd_vae(request: Request) -> list[dict[str, Any]]:
    """Autoencoders."""
    return [{"model_name": name, "filename": name} for name in service_of(request).catalogue.vaes]


@router.get("/loras")
async def loras(request: Request) -> list[dict[str, Any]]:
    """LoRAs."""
    names = service_of(request).catalogue.loras
    return [{"name": name, "alias": name, "path": name, "metadata": {}} for name in names]


@router.get("/embeddings")
async def embeddings(request: Request) -> dict[str, Any]:
    """Textual inversions."""
    words = [word_of(name) for name in service_of(request).catalogue.embeddings]
    return {"loaded": {word: {} for word in words}, "skipped": {}}


@router.get("/scripts")
async def scripts() -> dict[str, list[str]]:
    """Names of scripts; `webuiapi` looks for `controlnet m2m`."""
    names = ["controlnet", "controlnet m2m"]
    return {"txt2img": names, "img2img": names}


@router.get("/script-info")
async def script_info() -> list[dict[str, Any]]:
    """Scripts and their arguments."""
    return [
        {"name": "controlnet", "is_alwayson": True, "is_img2img": is_img2img, "args": []}
        for is_img2img in (False, True)
    ]


@router.get("/upscalers")
async def upscalers() -> list[dict[str, Any]]:
    """Upscalers of Hires. fix."""
    return [
        {"name": name, "model_name": None, "model_path": None, "model_url": None, "scale": 4}
        for name in ("None", "Lanczos")
    ]


@router.get("/latent-upscale-modes")
@router.get("/hypernetworks")
@router.get("/face-restorers")
@router.get("/realesrgan-models")
@router.get("/prompt-styles")
async def none_of_these() -> list[dict[str, Any]]:
    """An empty list: this server has none of these."""
    return []


@router.get("/cmd-flags")
async def cmd_flags() -> dict[str, Any]:
    """Only `api`: no other flag concerns a client."""
    return {"api": True}


@router.get("/memory")
async def memory() -> dict[str, Any]:
    """Empty values; `/metrics` has the server's counters."""
    return {"ram": {}, "cuda": {}}


@router.post("/refresh-checkpoints")
@router.post("/refresh-vae")
@router.post("/refresh-loras")
@router.post("/refresh-embeddings")
async def refresh() -> None:
    """No effect: models are listed once, at the start."""
