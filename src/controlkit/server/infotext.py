"""The settings of an image as A1111 writes them into a PNG (`parameters`), which its clients read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from controlkit._version import __version__
from controlkit.sampling.request import GenerateRequest
from controlkit.sampling.uses import ControlUse
from controlkit.server.catalogue import TASK, Catalogue
from controlkit.server.spec import Fit, SentImage, Spec, image_name

_FITS: Mapping[Fit, str] = {"crop": "Crop and Resize", "stretch": "Just Resize", "fill": "Resize and Fill"}
_MODES = {
    "balanced": "Balanced",
    "soft": "My prompt is more important",
    "guess": "ControlNet is more important",
}
"""Modes that A1111 has -> its words; others are written by their own names."""

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


def infotext(
    spec: Spec,
    request: GenerateRequest,
    catalogue: Catalogue,
    values: Mapping[str, Any],
    seed: int,
    *,
    reads_guidance: bool = False,
) -> str:
    """The prompts and all settings of one image, as text.

    Args:
        spec: as it was sent, with the names of models.
        request: made from it.
        values: `base`, `width`, `height` and `used` of the result.
        reads_guidance: whether the base is told the guidance scale, which Forge calls distilled.
    """
    used = values["used"]
    loras = [f"<lora:{use['file']}:{use['weight']:g}>" for use in spec.request.get("loras", ())]
    units = [_unit(spec, index, use, catalogue, used["mode"]) for index, use in enumerate(request.controls)]
    settings = {
        "Steps": request.steps,
        "Sampler": SAMPLER_NAMES.get(used.get("sampler"), used.get("sampler")),
        "CFG scale": 1.0 if reads_guidance else used.get("guidance"),
        "Distilled CFG Scale": used.get("guidance") if reads_guidance else None,
        "Seed": seed,
        "Size": f"{values['width']}x{values['height']}",
        "Model": values["base"],
        "VAE": spec.request.get("vae"),
        "Denoising strength": used.get("strength", used.get("hires_strength")),
        "Clip skip": request.clip_skip,
        "Hires upscale": request.hires,
        "Hires upscaler": None if request.hires is None else "Lanczos",
        "Mask blur": request.mask_blur if request.mask is not None else None,
        "Masked area padding": request.only_masked,
        **{f"ControlNet {index}": unit for index, unit in enumerate(units)},
        "Version": f"controlkit {__version__}",
    }
    lines = [" ".join([*filter(None, [request.prompt]), *loras])]
    if request.negative_prompt:
        lines.append(f"Negative prompt: {request.negative_prompt}")
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in settings.items() if value is not None))
    return "\n".join(lines)


def _unit(spec: Spec, index: int, use: ControlUse, catalogue: Catalogue, default_mode: str) -> str:
    """A control as a unit of A1111's ControlNet extension."""
    sent = spec.request["controls"][index]
    name = catalogue.find("controls", sent["control"])
    task = (use.inputs or {}).get(TASK)
    own = task if isinstance(task, str) else None
    module = "none" if use.prepared else own or catalogue.controls[name].condition or "auto"
    image = spec.images.get(image_name(sent) or "", SentImage(file=""))
    parameters = use.parameters or image.parameters
    mode = use.mode or default_mode
    fields = {
        "Module": image.condition or ("invert" if image.invert else module),
        "Model": name,
        "Weight": use.weight,
        "Resize Mode": _FITS[image.fit],
        **{name.replace("_", " ").capitalize(): value for name, value in parameters.items()},
        "Guidance Start": use.start,
        "Guidance End": use.end,
        "Control Mode": _MODES.get(mode, mode),
    }
    return ", ".join(f"{name}: {str(value).replace(', ', ',')}" for name, value in fields.items())


def _quoted(value: Any) -> str:
    """A value, in quotes if it could be read as several, as A1111 quotes it."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",\n:") else text
