"""A1111's API: `/sdapi/v1/`.

What clients send and this server does not know, or cannot do, is named in `info` under `ignored` and `notes`; unknown
keys of ControlNet units are refused.
"""

from __future__ import annotations

import dataclasses
import io
import json
import re
import time
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from controlkit._version import __version__
from controlkit.bases.solver_names import SOLVERS, solver_name
from controlkit.errors import UserError
from controlkit.sampling.request import DEFAULT_STEPS
from controlkit.server.native import Images
from controlkit.server.replies import checked_prompt, consecutive_seeds, drawn, service_of
from controlkit.server.sent_images import decode_base64, encode_base64
from controlkit.server.service import Service
from controlkit.server.spec import Spec
from controlkit.server.store import Job
from controlkit.server.units import Unit, enabled_units, fit_of

router = APIRouter(prefix="/sdapi/v1", tags=["A1111"])

SAMPLER_NAMES = {
    "ddim": "DDIM",
    "dpm++": "DPM++ 2M",
    "dpm++-karras": "DPM++ 2M Karras",
    "dpm++-2m-sde": "DPM++ 2M SDE",
    "dpm++-2m-sde-karras": "DPM++ 2M SDE Karras",
    "unipc": "UniPC",
    "plms": "PLMS",
    "euler": "Euler",
    "euler-karras": "Euler Karras",
    "euler-a": "Euler a",
    "heun": "Heun",
    "heun-karras": "Heun Karras",
    "dpm2": "DPM2",
    "dpm2-karras": "DPM2 Karras",
    "dpm2-a": "DPM2 a",
    "dpm2-a-karras": "DPM2 a Karras",
    "ddpm": "DDPM",
    "lcm": "LCM",
}
"""Sampler -> its name in A1111."""
_SCHEDULERS = ("automatic", "karras")
_SAME: dict[str, tuple[Any, ...]] = {
    "subseed": (-1,), "subseed_strength": (0,), "seed_resize_from_h": (0, -1), "seed_resize_from_w": (0, -1),
    "eta": (0, 1), "s_churn": (0,), "s_tmax": (0,), "s_tmin": (0,), "s_noise": (1,), "s_min_uncond": (0,),
    "restore_faces": (False,), "tiling": (False,), "styles": ([],), "script_name": ("",), "script_args": ([],),
    "save_images": (False,), "send_images": (True,), "do_not_save_samples": (False, True),
    "do_not_save_grid": (False, True), "firstphase_width": (0,), "firstphase_height": (0,),
    "hr_second_pass_steps": (0,),
    "hr_prompt": ("",), "hr_negative_prompt": ("",), "hr_checkpoint_name": ("",), "hr_sampler_name": ("",),
    "hr_scheduler": ("",), "hr_cfg": (1,), "refiner_checkpoint": ("",), "refiner_switch_at": (0, 0.8, 1),
    "image_cfg_scale": (0, 1.5), "initial_noise_multiplier": (1,), "disable_extra_networks": (False,),
    "comments": ({},),
    "override_settings_restore_afterwards": (True, False), "infotext": ("",), "latent_mask": ("",),
    "force_task_id": ("",),
}  # fmt: skip
"""Keys of A1111 that this server does not have -> values with which they mean nothing there."""

Number = Annotated[float, Field(allow_inf_nan=False)]
_LORA = re.compile(r"<lora:([^:<>]+)(?::(-?[\d.]+))?(?::[^<>]*)?>")


class _Body(BaseModel):
    model_config = ConfigDict(extra="allow")

    prompt: str | None = None
    negative_prompt: str | None = None
    seed: int | None = None
    batch_size: int | None = Field(default=None, ge=1)
    n_iter: int | None = Field(default=None, ge=1)
    steps: int | None = None
    cfg_scale: Number | None = None
    width: int | None = None
    height: int | None = None
    sampler_name: str | None = None
    sampler_index: str | int | None = None
    scheduler: str | None = None
    clip_skip: int | None = None
    denoising_strength: Number | None = None
    override_settings: dict[str, Any] | None = None
    alwayson_scripts: dict[str, Any] | None = None


class TextToImage(_Body):
    """Body of `txt2img`. Other keys are allowed, and named in `info`."""

    enable_hr: bool | None = None
    hr_scale: Number | None = None
    hr_resize_x: int | None = None
    hr_resize_y: int | None = None
    hr_upscaler: str | None = None


class ImageToImage(_Body):
    """Body of `img2img`. Other keys are allowed, and named in `info`."""

    init_images: list[str] = []
    resize_mode: int | None = None
    mask: str | None = None
    mask_blur: Number | None = None
    mask_blur_x: Number | None = None
    mask_blur_y: Number | None = None
    inpainting_fill: int | None = None
    inpaint_full_res: bool | int | None = None
    inpaint_full_res_padding: int | None = None
    inpainting_mask_invert: int | None = None
    include_init_images: bool | None = None


class Answer(BaseModel):
    """Images, what was asked for, and a JSON text of what was used."""

    images: list[str]
    parameters: dict[str, Any]
    info: str


class PngInfoBody(BaseModel):
    """Body of `png-info`."""

    image: str


@router.post("/txt2img")
async def txt2img(body: TextToImage, request: Request) -> Answer:
    """Draw images from a prompt, and wait for them."""
    service = service_of(request)
    options = await current_options(service)
    return await _answer(body, await run_in_threadpool(_text_order, body, service, options), service)


@router.post("/img2img")
async def img2img(body: ImageToImage, request: Request) -> Answer:
    """Draw images that start from one, and wait for them."""
    service = service_of(request)
    options = await current_options(service)
    return await _answer(body, await run_in_threadpool(_image_order, body, service, options), service)


@dataclasses.dataclass
class _Order:
    """A request as it is put together."""

    values: dict[str, Any]
    collected: Images
    units: list[Unit]
    ignored: list[str]
    notes: list[str]
    returns_start: bool = False


def _order(body: _Body, service: Service, options: Mapping[str, Any]) -> _Order:
    """What `txt2img` and `img2img` share."""
    options = {**options, **(body.override_settings or {})}
    ignored = [key for key, value in (body.model_extra or {}).items() if not _means_nothing(key, value)]
    ignored += [f"override_settings.{key}" for key in body.override_settings or () if key not in _OPTIONS]
    scripts = body.alwayson_scripts or {}
    ignored += [f"alwayson_scripts.{name}" for name, script in scripts.items() if _is_foreign(name, script)]
    collected = Images(service)
    units = enabled_units(scripts, service, collected)
    count = (body.batch_size or 1) * (body.n_iter or 1)
    service.limits.check("images", count)
    prompt = checked_prompt(body.prompt or "", "prompt")
    negative = checked_prompt(body.negative_prompt or "", "negative_prompt")
    prompt, loras, missing = _loras(prompt, service)
    notes = [f"there is no LoRA {name!r} on this server" for name in missing]
    clip_skip = body.clip_skip or options.get("CLIP_stop_at_last_layers")
    values = {
        "base": _base(options, service),
        "vae": _vae(options, service),
        "prompt": prompt,
        "negative_prompt": negative,
        "prompt_syntax": "weighted",
        "clip_skip": clip_skip if clip_skip is not None and clip_skip != 1 else None,
        "embeddings": _embeddings(f"{prompt}\n{negative}", service),
        "loras": loras,
        "seeds": consecutive_seeds(-1 if body.seed is None else body.seed, count),
        "steps": body.steps or min(DEFAULT_STEPS, service.limits.steps),
        "guidance": body.cfg_scale,
        "width": body.width,
        "height": body.height,
        "sampler": _sampler(body, notes),
        "batch_size": body.batch_size,
        "controls": [unit.control for unit in units],
    }
    return _Order(values, collected, units, ignored, notes)


def _text_order(body: TextToImage, service: Service, options: Mapping[str, Any]) -> _Order:
    """A request from a prompt, with its second pass (Hires. fix)."""
    order = _order(body, service, options)
    if not body.enable_hr:
        return order
    scale = body.hr_scale or 2.0
    if body.hr_resize_x or body.hr_resize_y:
        if not (body.width and body.height):
            raise UserError("hr_resize_x and hr_resize_y need width and height", "missing-setting")
        scales = {side / own for side, own in ((body.hr_resize_x, body.width), (body.hr_resize_y, body.height)) if side}
        if len(scales) > 1:
            raise UserError("hr_resize_x and hr_resize_y must keep the proportions of width and height", "unsupported")
        scale = scales.pop()
    order.values |= {"hires": scale, "hires_strength": body.denoising_strength}
    if body.hr_upscaler not in (None, "", "None", "Lanczos"):
        order.notes.append(f"there is no upscaler {body.hr_upscaler}; used: Lanczos")
    return order


def _image_order(body: ImageToImage, service: Service, options: Mapping[str, Any]) -> _Order:
    """A request that starts from an image, with its mask."""
    order = _order(body, service, options)
    if len(body.init_images) != 1:
        raise UserError(f"init_images has {len(body.init_images)} images; expected one", "unsupported")
    only_masked = bool(body.mask) and body.inpaint_full_res not in (False, 0)
    fit = "crop" if only_masked else fit_of(1 if body.resize_mode in (None, 3) else body.resize_mode, "the request")
    order.values |= {
        "image": order.collected.add("init_images[0]", body.init_images[0], fit=fit),
        "strength": 0.75 if body.denoising_strength is None else body.denoising_strength,
    }
    order.returns_start = bool(body.include_init_images)
    if not body.mask:
        return order
    blurs = [blur for blur in (body.mask_blur, body.mask_blur_x, body.mask_blur_y) if blur is not None]
    order.values |= {
        "mask": order.collected.add("mask", body.mask, fit=fit, invert=bool(body.inpainting_mask_invert)),
        "mask_blur": blurs[0] if blurs else 4,
        "only_masked": (body.inpaint_full_res_padding or 0) if only_masked else None,
    }
    if body.inpainting_fill not in (None, 1):
        order.notes.append(f"inpainting_fill is {body.inpainting_fill}; used: 1, the original image")
    return order


async def _answer(body: _Body, order: _Order, service: Service) -> Answer:
    maps = tuple(index for index, unit in enumerate(order.units) if unit.shows_map)
    spec = Spec(
        request=order.values,
        images=order.collected.images,
        lenient=True,
        maps=maps,
        ignored=tuple(order.ignored),
        notes=tuple(order.notes),
        start_image=order.returns_start,
    )
    job = await drawn(service, spec, order.collected.files)
    roles = ("images", "maps", *(["start"] if order.returns_start else []))
    images = [encode_base64(data) for role in roles for data in await service.files(job.id, role)]
    return Answer(images=images, parameters=_echo(body), info=json.dumps(_info(job, order.values)))


def _info(job: Job, asked: Mapping[str, Any]) -> dict[str, Any]:
    """`info` of A1111, from a request that is done."""
    result = job.result or {}
    used, seeds = result.get("used", {}), result.get("seeds", [])
    count = len(seeds)
    return {
        "prompt": result.get("prompt", asked["prompt"]),
        "all_prompts": [result.get("prompt")] * count,
        "negative_prompt": result.get("negative_prompt", asked["negative_prompt"]),
        "all_negative_prompts": [result.get("negative_prompt")] * count,
        "seed": (seeds or asked["seeds"])[0],
        "all_seeds": seeds,
        "subseed": -1,
        "all_subseeds": [-1] * count,
        "subseed_strength": 0,
        "width": result.get("width"),
        "height": result.get("height"),
        "sampler_name": SAMPLER_NAMES.get(used.get("sampler"), used.get("sampler")),
        "cfg_scale": used.get("guidance"),
        "steps": result.get("steps"),
        "batch_size": asked["batch_size"] or 1,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": result.get("base"),
        "sd_model_hash": None,
        "sd_vae_name": asked["vae"],
        "sd_vae_hash": None,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": used.get("strength", used.get("hires_strength")),
        "extra_generation_params": {},
        "index_of_first_image": 0,
        "infotexts": result.get("infotexts", []),
        "styles": [],
        "job_timestamp": time.strftime("%Y%m%d%H%M%S", time.localtime(job.created)),
        "clip_skip": result.get("clip_skip") or 1,
        "is_using_inpainting_conditioning": False,
        "version": f"controlkit {__version__}",
        "job": job.id,
        "interrupted": job.state == "cancelled",
        "ignored": result.get("ignored", []),
        "notes": result.get("notes", []),
    }


def _echo(body: _Body) -> dict[str, Any]:
    """The body without its images, as text that is valid."""
    values = body.model_dump(exclude={"init_images", "mask", "alwayson_scripts"})
    plain: dict[str, Any] = json.loads(json.dumps(values, default=str).encode("utf-8", "replace"))
    kept = {key: value for key, value in plain.items() if key not in ("controlnet_units", "auth")}
    return json.loads(json.dumps(kept, ensure_ascii=False).encode("utf-8", "replace"), parse_constant=lambda _: None)


def _means_nothing(key: str, value: Any) -> bool:
    """Whether a key that is not supported has a value with which it has no effect."""
    return key in _SAME and (value is None or value in _SAME[key])


def _is_foreign(name: str, script: Any) -> bool:
    """Whether a script is not known here, and asked to do something."""
    if name.lower() == "controlnet":
        return False
    args = script.get("args", []) if isinstance(script, Mapping) else script
    if not isinstance(args, list):
        return bool(args)
    return bool(args) and args[0] is not False  # which switches ADetailer and others off


def _loras(prompt: str, service: Service) -> tuple[str, list[dict[str, Any]], list[str]]:
    """A prompt without `<lora:NAME:WEIGHT>`, the LoRAs, and the names of those that are not here."""
    loras: list[dict[str, Any]] = []
    missing: list[str] = []
    for name, weight in _LORA.findall(prompt):
        try:
            found = service.catalogue.find("loras", name)
            loras.append({"file": found, "weight": float(weight or 1)})
        except (UserError, ValueError):
            missing.append(name)
    return _LORA.sub("", prompt).strip() if loras or missing else prompt, loras, missing


def _embeddings(prompts: str, service: Service) -> list[str]:
    """The textual inversions whose word is in the prompts."""
    words = {name: name.rpartition("/")[2] for name in service.catalogue.embeddings}
    return [
        name for name, word in words.items() if re.search(rf"(?<!\w){re.escape(word)}(?!\w)", prompts, re.IGNORECASE)
    ]


def _sampler(body: _Body, notes: list[str]) -> str | None:
    """The sampler of its name and that of its schedule."""
    name = body.sampler_name or body.sampler_index
    if name is None or str(name).lower() in ("", "automatic", "none"):
        return None
    scheduler = (body.scheduler or "automatic").lower()
    found = solver_name(str(name))
    if scheduler == "karras":
        if f"{found}-karras" in SOLVERS:
            return f"{found}-karras"
        if not found.endswith("-karras"):
            notes.append(f"{name} has no Karras spacing here; used: its own")
    elif scheduler not in ("", "automatic", "none", "uniform", "normal"):
        notes.append(f"there is no scheduler {body.scheduler}; used: the sampler's own")
    return found


def _base(options: Mapping[str, Any], service: Service) -> str:
    name = options.get("sd_model_checkpoint")
    return service.catalogue.find("bases", str(name)) if name else service.catalogue.base


def _vae(options: Mapping[str, Any], service: Service) -> str | None:
    name = options.get("sd_vae")
    if not name or str(name).lower() in ("automatic", "none"):
        return None
    return service.catalogue.find("vaes", str(name))


# Options

_OPTIONS = ("sd_model_checkpoint", "sd_vae", "CLIP_stop_at_last_layers")


async def current_options(service: Service) -> dict[str, Any]:
    """The options that mean something here."""
    stored = await run_in_threadpool(service.store.options)
    if stored.get("sd_model_checkpoint") not in service.catalogue.bases:
        stored["sd_model_checkpoint"] = service.catalogue.base
    if stored.get("sd_vae") not in service.catalogue.vaes:
        stored["sd_vae"] = "Automatic"
    return {"CLIP_stop_at_last_layers": 1, **stored}


@router.get("/options")
async def options(request: Request) -> dict[str, Any]:
    """The options that mean something here."""
    return {**await current_options(service_of(request)), "samples_format": "png", "sd_checkpoint_hash": None}


@router.post("/options")
async def set_options(body: dict[str, Any], request: Request) -> None:
    """Set options for all clients; others than those of `GET` change nothing."""
    service = service_of(request)
    values: dict[str, Any] = {}
    if (name := body.get("sd_model_checkpoint")) is not None:
        values["sd_model_checkpoint"] = service.catalogue.find("bases", str(name))
    if (name := body.get("sd_vae")) is not None:
        values["sd_vae"] = _vae({"sd_vae": name}, service) or "Automatic"
    if (layer := body.get("CLIP_stop_at_last_layers")) is not None:
        if isinstance(layer, bool) or not isinstance(layer, (int, float)) or not 1 <= layer <= 12:
            raise UserError(f"CLIP_stop_at_last_layers is {layer!r}; expected 1 to 12", "out-of-range")
        values["CLIP_stop_at_last_layers"] = int(layer)
    for key, value in values.items():
        await run_in_threadpool(service.store.set_option, key, value)


# Progress


@router.get("/progress")
async def progress(request: Request, skip_current_image: bool = False) -> dict[str, Any]:
    """How far the running request is, with a preview."""
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
    """The settings that an image carries."""
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
    """Samplers; `options` has their names here."""
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
    words = [name.rpartition("/")[2] for name in service_of(request).catalogue.embeddings]
    return {"loaded": {word: {} for word in words}, "skipped": {}}


@router.get("/scripts")
async def scripts() -> dict[str, list[str]]:
    """Names of scripts; `controlnet m2m` is what `webuiapi` looks for."""
    names = ["controlnet", "controlnet m2m"]
    return {"txt2img": names, "img2img": names}


@router.get("/script-info")
async def script_info() -> list[dict[str, Any]]:
    """Scripts and their arguments."""
    return [{"name": "controlnet", "is_alwayson": True, "is_img2img": is_img2img, "args": []} for is_img2img in (0, 1)]


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
    """Nothing: this server has none of these."""
    return []


@router.get("/cmd-flags")
async def cmd_flags() -> dict[str, Any]:
    """Nothing that concerns a client."""
    return {"api": True}


@router.get("/memory")
async def memory() -> dict[str, Any]:
    """Nothing: `/metrics` has what this server counts."""
    return {"ram": {}, "cuda": {}}


@router.post("/refresh-checkpoints")
@router.post("/refresh-vae")
@router.post("/refresh-loras")
@router.post("/refresh-embeddings")
async def refresh() -> None:
    """Nothing: models are listed once, at the start."""
