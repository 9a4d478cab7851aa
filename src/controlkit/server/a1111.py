"""A1111's API, `/sdapi/v1/`: `txt2img` and `img2img`.

`info` lists unsupported keys under `ignored` and replaced values under `notes`; unknown keys of ControlNet units are
refused.
"""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, ConfigDict, Field

from controlkit._version import __version__
from controlkit.bases.solver_names import SOLVERS, solver_name
from controlkit.errors import UserError
from controlkit.sampling.request import DEFAULT_STEPS
from controlkit.server.a1111_lists import OPTIONS, current_options, vae_of
from controlkit.server.bodies import Body, Number
from controlkit.server.infotext import SAMPLER_NAMES
from controlkit.server.native import Images
from controlkit.server.problems import responses
from controlkit.server.replies import (
    checked_prompt,
    consecutive_seeds,
    drawn,
    in_words_of_clients,
    service_of,
)
from controlkit.server.sent_images import encode_base64
from controlkit.server.service import Service
from controlkit.server.spec import Spec
from controlkit.server.store import Job
from controlkit.server.units import Start, Unit, enabled_units, fit_of

router = APIRouter(prefix="/sdapi/v1", tags=["A1111"], responses=responses(503))

_SAME: dict[str, tuple[Any, ...]] = {
    "subseed": (-1,), "subseed_strength": (0,), "seed_resize_from_h": (0, -1), "seed_resize_from_w": (0, -1),
    "s_churn": (0,), "s_tmax": (0,), "s_tmin": (0,), "s_noise": (1,), "s_min_uncond": (0,),
    "restore_faces": (False,), "tiling": (False,), "styles": ([],), "script_name": ("",), "script_args": ([],),
    "save_images": (False,), "send_images": (True,), "do_not_save_samples": (False, True),
    "do_not_save_grid": (False, True), "firstphase_width": (0,), "firstphase_height": (0,),
    "hr_second_pass_steps": (0,), "hr_prompt": ("",), "hr_negative_prompt": ("",), "hr_checkpoint_name": ("",),
    "hr_sampler_name": ("",), "hr_scheduler": ("",), "hr_cfg": (1,), "refiner_checkpoint": ("",),
    "refiner_switch_at": (0, 0.8, 1),
    "image_cfg_scale": (0, 1.5), "initial_noise_multiplier": (1,), "disable_extra_networks": (False,),
    "comments": ({},), "override_settings_restore_afterwards": (True, False), "infotext": ("",), "latent_mask": ("",),
    "force_task_id": ("",), "mask_round": (True,),
}  # fmt: skip
"""Key of A1111 that this server does not support -> values with which it has no effect in A1111."""
_ETA: dict[str, tuple[float, ...]] = {
    "ddim": (0,),
    **dict.fromkeys(("euler-a", "dpm2-a", "dpm2-a-karras", "dpm++-2m-sde", "dpm++-2m-sde-karras"), (1,)),
}
"""Sampler that has an `eta` in A1111 -> its value here."""
_SCHEDULES = {"dpm++": "Karras", "dpm2": "Karras", "dpm2-a": "Karras", "dpm++-2m-sde": "exponential"}
"""Sampler -> its schedule in A1111 1.9 (modules/sd_samplers_kdiffusion.py) if none is chosen. Others are uniform."""
_LORA = re.compile(r"<(?:lora|lyco):([^:<>]+)(?::([^<>]*))?>")
_WEIGHT = re.compile(r"[+-]?(\d{1,9}(\.\d*)?|\.\d+)", re.ASCII)


class _Body(Body, BaseModel):
    model_config = ConfigDict(extra="allow")

    prompt: str | None = None
    negative_prompt: str | None = None
    seed: int | None = None
    batch_size: int | None = Field(default=None, ge=1)
    n_iter: int | None = Field(default=None, ge=1)
    steps: int | None = None
    cfg_scale: Number | None = None
    distilled_cfg_scale: Number | None = None
    width: int | None = None
    height: int | None = None
    sampler_name: str | None = None
    sampler_index: str | int | None = None
    scheduler: str | None = None
    eta: Number | None = None
    clip_skip: int | None = None
    denoising_strength: Number | None = None
    override_settings: dict[str, Any] | None = None
    alwayson_scripts: dict[str, Any] | None = None


class TextToImage(_Body):
    """Body of `txt2img`. Other keys are allowed, and listed in `info`."""

    enable_hr: bool | None = None
    hr_scale: Number | None = None
    hr_resize_x: int | None = None
    hr_resize_y: int | None = None
    hr_upscaler: str | None = None


class ImageToImage(_Body):
    """Body of `img2img`. Other keys are allowed, and listed in `info`."""

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
    """Response of `txt2img` and `img2img`."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    images: list[str]
    """Base64 of PNG files: the images, then condition images."""
    parameters: dict[str, Any]
    """The body of the request without its images; with `include_init_images`, those of `img2img` are kept."""
    info: str
    """JSON text: the settings that were used, `ignored` and `notes`."""


@router.post("/txt2img")
async def txt2img(body: TextToImage, request: Request) -> Answer:
    """Generate images from a prompt, and wait for them."""
    service = service_of(request)
    options = await current_options(service)
    return await _answer(body, await run_in_threadpool(_text_order, body, service, options), request)


@router.post("/img2img")
async def img2img(body: ImageToImage, request: Request) -> Answer:
    """Generate images that start from one, and wait for them."""
    service = service_of(request)
    options = await current_options(service)
    return await _answer(body, await run_in_threadpool(_image_order, body, service, options), request)


@dataclasses.dataclass
class _Order:
    """A request while it is built from a body."""

    values: dict[str, Any]
    collected: Images
    units: list[Unit]
    ignored: list[str]
    notes: list[str]


def _order(
    body: _Body, service: Service, options: Mapping[str, Any], collected: Images, start: Start | None = None
) -> _Order:
    """The part of a request that `txt2img` and `img2img` share.

    Args:
        collected: has the images of `start`, and gets those of the units.

    Raises:
        UserError: a model, an image or a value cannot be used, or is above the limits.
    """
    options = {**options, **(body.override_settings or {})}
    ignored = [key for key, value in (body.model_extra or {}).items() if not _means_nothing(key, value)]
    ignored += [f"override_settings.{key}" for key in body.override_settings or () if key not in OPTIONS]
    scripts = body.alwayson_scripts or {}
    ignored += [f"alwayson_scripts.{name}" for name, script in scripts.items() if _is_foreign(name, script)]
    units = enabled_units(scripts, service, collected, start)
    ignored += [key for unit in units for key in unit.ignored]
    count = (body.batch_size or 1) * (body.n_iter or 1)
    service.limits.check("images", count)
    prompt = checked_prompt(body.prompt or "", "prompt")
    negative = checked_prompt(body.negative_prompt or "", "negative_prompt")
    prompt, loras, missing = _loras(prompt, service)
    notes = [f"there is no LoRA {name!r} on this server" for name in missing]
    clip_skip = body.clip_skip or options.get("CLIP_stop_at_last_layers")
    sampler = _sampler(body, notes)
    if _has_eta(body, sampler):
        ignored.append("eta")
    values = {
        "base": _base(options, service),
        "vae": vae_of(options, service),
        "prompt": prompt,
        "negative_prompt": negative,
        "prompt_syntax": "weighted",
        "clip_skip": clip_skip if clip_skip is not None and clip_skip != 1 else None,
        "embeddings": service.catalogue.embeddings_in(f"{prompt}\n{negative}"),
        "loras": loras,
        "seeds": consecutive_seeds(-1 if body.seed is None else body.seed, count),
        "steps": min(DEFAULT_STEPS, service.limits.steps) if body.steps is None else body.steps,
        "guidance": body.cfg_scale,
        "width": body.width,
        "height": body.height,
        "sampler": sampler,
        "batch_size": body.batch_size or 1,
        "controls": [unit.control for unit in units],
    }
    return _Order(values, collected, units, ignored, notes)


def _text_order(body: TextToImage, service: Service, options: Mapping[str, Any]) -> _Order:
    """The request of `txt2img`, with its second pass (Hires. fix)."""
    order = _order(body, service, options, Images(service))
    if not body.enable_hr:
        return order
    scale = 2.0 if body.hr_scale is None else body.hr_scale
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
    """The request of `img2img`, with its mask."""
    if len(body.init_images) != 1:
        raise UserError(f"init_images has {len(body.init_images)} images; expected one", "unsupported")
    only_masked = bool(body.mask) and body.inpaint_full_res not in (False, 0)
    mode = 0 if body.resize_mode in (None, 3) else body.resize_mode
    collected, fit = Images(service), "crop" if only_masked else fit_of(mode, "the request")
    image = collected.add("init_images[0]", body.init_images[0], fit=fit)
    mask = None
    if body.mask:
        inverts = bool(body.inpainting_mask_invert)
        mask = collected.add("mask", body.mask, fit=fit, mask=True, by_alpha=True, invert=inverts)
    order = _order(body, service, options, collected, Start(image="init_images[0]", mask=mask, fit=fit))
    order.values |= {
        "image": image,
        "strength": 0.75 if body.denoising_strength is None else body.denoising_strength,
    }
    if body.resize_mode == 3:
        order.notes.append("resize_mode is 3 (latent upscale); used: 0, stretched")
    if mask is None:
        return order
    order.values |= {
        "mask": mask,
        "mask_blur": _mask_blur(body),
        "only_masked": (body.inpaint_full_res_padding or 0) if only_masked else None,
    }
    if body.inpainting_fill not in (None, 1):
        order.notes.append(f"inpainting_fill is {body.inpainting_fill}; used: 1, the original image")
    return order


def _mask_blur(body: ImageToImage) -> float:
    """The blur of the mask in pixels. As in A1111, `mask_blur` replaces that of both axes, whose default is 4.

    Raises:
        UserError: the axes have different ones.
    """
    if body.mask_blur is not None:
        return body.mask_blur
    across, down = (4.0 if blur is None else blur for blur in (body.mask_blur_x, body.mask_blur_y))
    if across != down:
        raise UserError(
            f"mask_blur_x is {across:g} and mask_blur_y is {down:g}; one blur for both is supported, send mask_blur",
            "unsupported",
        )
    return across


async def _answer(body: _Body, order: _Order, request: Request) -> Answer:
    service = service_of(request)
    maps = tuple(index for index, unit in enumerate(order.units) if unit.shows_map)
    spec = Spec(
        request=order.values,
        images=order.collected.images,
        lenient=True,
        read_guidance=body.distilled_cfg_scale,
        maps=maps,
        ignored=tuple(order.ignored),
        notes=tuple(order.notes),
    )
    echo = _echo(body)
    _release_images(body)
    job = await drawn(request, spec, order.collected.files)
    images = [encode_base64(data) for role in ("images", "maps") for data in await service.files(job.id, role)]
    return Answer(images=images, parameters=echo, info=json.dumps(_info(job, order.values, service)))


def _info(job: Job, asked: Mapping[str, Any], service: Service) -> dict[str, Any]:
    """`info` of A1111, for a request that has ended."""
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
        "batch_size": asked["batch_size"],
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
        "notes": [in_words_of_clients(note, service.catalogue) for note in result.get("notes", ())],
    }


def _echo(body: _Body) -> dict[str, Any]:
    """`parameters` of the response, as values that JSON and UTF-8 can represent."""
    values = body.model_dump(exclude={"init_images", "mask", "alwayson_scripts"})
    if isinstance(body, ImageToImage):
        keeps = bool(body.include_init_images)
        values |= {"init_images": body.init_images if keeps else None, "mask": body.mask if keeps else None}
    plain: dict[str, Any] = json.loads(json.dumps(values, default=str).encode("utf-8", "replace"))
    kept = {key: value for key, value in plain.items() if key not in ("controlnet_units", "auth")}
    return json.loads(json.dumps(kept, ensure_ascii=False).encode("utf-8", "replace"), parse_constant=lambda _: None)


def _release_images(body: _Body) -> None:
    """Remove the images from a body, which is in memory as long as its client waits."""
    body.alwayson_scripts = None
    if isinstance(body, ImageToImage):
        body.init_images, body.mask = [], None


def _means_nothing(key: str, value: Any) -> bool:
    """Whether an unsupported key has a value without effect."""
    return key in _SAME and (value is None or value in _SAME[key])


def _is_foreign(name: str, script: Any) -> bool:
    """Whether a script is unsupported and would have an effect."""
    if name.lower() == "controlnet":
        return False
    args = script.get("args", []) if isinstance(script, Mapping) else script
    if not isinstance(args, list):
        return bool(args)
    return bool(args) and args[0] is not False  # False switches ADetailer and others off


def _loras(prompt: str, service: Service) -> tuple[str, list[dict[str, Any]], list[str]]:
    """A prompt without `<lora:NAME:WEIGHT>` and `<lyco:NAME:WEIGHT>`, which are the same in A1111; the LoRAs in it, and
    the names of those that are not listed.

    Raises:
        UserError: a weight is not one number.
    """
    loras: list[dict[str, Any]] = []
    missing: list[str] = []
    for each in _LORA.finditer(prompt):
        name, weight = each.groups()
        number = _lora_weight(each[0], weight)
        try:
            found = service.catalogue.find("loras", name)
        except UserError:
            missing.append(name)
        else:
            loras.append({"file": found, "weight": number})
    return _LORA.sub("", prompt).strip() if loras or missing else prompt, loras, missing


def _lora_weight(tag: str, text: str | None) -> float:
    """The weight `text` of a tag such as `<lora:NAME:TEXT>`; 1 for None.

    Raises:
        UserError: it is not one number.
    """
    if text is None:
        return 1.0
    if _WEIGHT.fullmatch(text.strip()):
        return float(text)
    given = f"{tag}: the weight is {text!r}; expected one number, such as 0.8"
    if ":" in text or "=" in text:
        raise UserError(f"{given}: separate weights for the text encoder and the UNet are not supported", "unsupported")
    raise UserError(given, "wrong-type")


def _sampler(body: _Body, notes: list[str]) -> str | None:
    """The sampler for A1111's sampler and scheduler; None for the base's default.

    Args:
        notes: gets a note if the schedule is not available.

    Raises:
        UserError: there is no such sampler.
    """
    name = body.sampler_name or body.sampler_index
    if name is None or str(name).lower() in ("", "automatic", "none"):
        return None
    scheduler = (body.scheduler or "automatic").lower()
    found = solver_name(str(name))
    if scheduler in ("", "automatic", "none"):
        own = _SCHEDULES.get(found)
        if own == "exponential":
            notes.append(f"A1111 has an exponential schedule for {name}, which is not available here; used: uniform")
        return f"{found}-karras" if own == "Karras" else found
    if scheduler == "karras":
        if f"{found}-karras" in SOLVERS:
            return f"{found}-karras"
        if not found.endswith("-karras"):
            notes.append(f"{name} has no Karras spacing here; used: its own")
    elif scheduler not in ("uniform", "normal"):
        notes.append(f"there is no scheduler {body.scheduler}; used: the sampler's own")
    return found


def _has_eta(body: _Body, sampler: str | None) -> bool:
    """Whether `eta` asks for another value than the sampler has here."""
    values = _ETA.get(sampler) if sampler is not None else ()
    return body.eta is not None and values is not None and body.eta not in values


def _base(options: Mapping[str, Any], service: Service) -> str:
    name = options.get("sd_model_checkpoint")
    return service.catalogue.find("bases", str(name)) if name else service.catalogue.base
