"""OpenAI's images API: `/v1/images/generations` and `/v1/images/edits`, and the list of models."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import FormData
from starlette.datastructures import UploadFile as SentFile

from controlkit.errors import UserError
from controlkit.images import decode_image
from controlkit.server.bodies import Body
from controlkit.server.native import ControlBody, GenerateBody, Images, build
from controlkit.server.problems import responses
from controlkit.server.replies import checked_prompt, consecutive_seeds, drawn, name_ignored, service_of
from controlkit.server.sent_images import checked_image, encode_base64
from controlkit.server.service import Service
from controlkit.server.spec import Spec

router = APIRouter(prefix="/v1", tags=["OpenAI"], responses=responses(503, openai=True))

_WORDS = ("prompt", "model", "n", "size", "response_format")
"""Text fields of `images/edits`."""
_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})", re.ASCII)


class GenerationsBody(Body, BaseModel):
    """Body of `images/generations`. Other keys are allowed; a header of the response names them."""

    model_config = ConfigDict(extra="allow")

    prompt: str
    model: str | None = None
    n: int | None = Field(default=None, ge=1)
    size: str | None = None
    response_format: str | None = None
    seed: int | None = None
    controls: list[ControlBody] = []
    """Not of OpenAI: controls, as in `/controlkit/v1/jobs`."""


class Created(BaseModel):
    """Response of both endpoints."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    created: int
    """Unix time in seconds."""
    data: list[dict[str, str]]
    """`{"b64_json": ...}` for each image: base64 of a PNG file."""


@router.get("/models")
async def models(request: Request) -> dict[str, Any]:
    """The bases, as models."""
    names = service_of(request).catalogue.bases
    return {
        "object": "list",
        "data": [{"id": name, "object": "model", "created": 0, "owned_by": "controlkit"} for name in names],
    }


@router.post("/images/generations")
async def generations(body: GenerationsBody, request: Request, response: Response) -> Created:
    """Generate images from a prompt, and wait for them."""
    service = service_of(request)
    name_ignored(body.model_extra or {}, request, response)
    asked = _request(service, body.prompt, body.model, body.n, body.size, body.response_format, body.seed)
    asked = asked.model_copy(update={"controls": body.controls})
    spec, files = await run_in_threadpool(build, asked, service)
    spec.maps = ()
    body.controls.clear()  # their images are in `files`, and the body stays in memory while the client waits
    return await _created(request, spec, files)


@router.post(
    "/images/edits",
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": {
                    "schema": {
                        "type": "object",
                        "required": ["image", "prompt"],
                        "properties": {
                            "image": {"type": "string", "format": "binary"},
                            "mask": {"type": "string", "format": "binary"},
                            "prompt": {"type": "string"},
                            "model": {"type": "string"},
                            "n": {"type": "integer", "minimum": 1},
                            "size": {"type": "string"},
                            "response_format": {"type": "string"},
                        },
                    }
                }
            },
        }
    },
)
async def edits(request: Request, response: Response) -> Created:
    """Generate images that start from one, and wait for them; with a mask, only its transparent part changes."""
    service = service_of(request)
    async with request.form(max_files=4, max_fields=50) as form:
        images = [each for name in ("image", "image[]") for each in form.getlist(name)]
        if len(images) != 1 or not isinstance(images[0], SentFile):
            raise UserError(f"expected one image, an uploaded file, got {_told(images)}", "unsupported")
        data = checked_image(await images[0].read(), "image", service.limits)
        mask_data = None
        masks = form.getlist("mask")
        if masks:
            if len(masks) != 1 or not isinstance(masks[0], SentFile):
                raise UserError(f"expected one mask, an uploaded file, got {_told(masks)}", "unsupported")
            mask_data = checked_image(await masks[0].read(), "mask", service.limits)
            await run_in_threadpool(_check_mask, mask_data)
        words = {name: _field(form, name) for name in _WORDS}
        if words["prompt"] is None:
            raise UserError("prompt is missing; send what the image is to show", "missing-setting")
        name_ignored((name for name in form if name not in (*_WORDS, "image", "image[]", "mask")), request, response)
    count = words["n"]
    if count is not None and not re.fullmatch(r"[1-9]\d{0,5}", count, re.ASCII):
        raise UserError(f"n is {count!r}; expected a whole number from 1", "wrong-type")
    asked = _request(
        service,
        words["prompt"] or "",
        words["model"],
        None if count is None else int(count),
        words["size"],
        words["response_format"],
        None,
    )
    spec, files = build(asked, service)
    collected = Images(service)
    spec.request["image"] = collected.add_bytes("image", data)
    if mask_data is not None:
        spec.request["mask"] = collected.add_bytes("mask", mask_data, transparent=True)
    spec.images, files = collected.images, collected.files
    return await _created(request, spec, files)


def _told(fields: Sequence[object]) -> str:
    """What was sent in place of one file, for an error."""
    return "text" if len(fields) == 1 else str(len(fields))


def _check_mask(data: bytes) -> None:
    """Check that a mask has a transparent pixel: where none is, nothing would change.

    Raises:
        UserError: it has none, or is damaged.
    """
    alpha = np.asarray(decode_image(data, "mask").convert("RGBA").getchannel("A"))
    if alpha.min() > 127:
        raise UserError("mask has no transparent pixel; make it transparent where the image changes", "bad-image")


def _field(form: FormData, name: str) -> str | None:
    """A text field of a form; None if it was not sent.

    Raises:
        UserError: it was sent as a file.
    """
    value = form.get(name)
    if isinstance(value, SentFile):
        raise UserError(f"{name} is an uploaded file; expected text, a field without a file name", "wrong-type")
    return value


def _request(
    service: Service,
    prompt: str,
    model: str | None,
    count: int | None,
    size: str | None,
    response_format: str | None,
    seed: int | None,
) -> GenerateBody:
    """The request as a body of controlkit's own API.

    Raises:
        UserError: a value cannot be used, or is above the limits.
    """
    if response_format not in (None, "b64_json"):
        raise UserError(
            f"response_format is {response_format!r}; this server keeps no images at URLs, use b64_json", "unsupported"
        )
    service.limits.check("images", count or 1)
    width, height = _size(size)
    return GenerateBody(
        prompt=checked_prompt(prompt, "prompt"),
        base=model or None,
        seeds=consecutive_seeds(-1 if seed is None else seed, count or 1),
        width=width,
        height=height,
    )


def _size(text: str | None) -> tuple[int | None, int | None]:
    """Width and height in pixels of a size such as `512x512`; None for `auto`, the size of the base.

    Raises:
        UserError: it is not of this form.
    """
    if text is None or text in ("", "auto"):
        return None, None
    found = _SIZE.fullmatch(text)
    if found is None:
        raise UserError(f"size is {text!r}; expected WIDTHxHEIGHT, such as 512x512, or auto", "wrong-type")
    return int(found[1]), int(found[2])


async def _created(request: Request, spec: Spec, files: dict[str, bytes]) -> Created:
    job = await drawn(request, spec, files)
    images = await service_of(request).files(job.id, "images")
    return Created(created=int(time.time()), data=[{"b64_json": encode_base64(data)} for data in images])
