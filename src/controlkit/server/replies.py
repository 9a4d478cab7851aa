"""Helpers of all APIs: reading requests and waiting for results."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import quote

from fastapi import HTTPException, Request, Response
from fastapi.concurrency import run_in_threadpool

from controlkit.errors import CODES, UserError
from controlkit.files import valid_text
from controlkit.sampling.seeds import settled_seeds
from controlkit.server.catalogue import Catalogue
from controlkit.server.limits import TEXT
from controlkit.server.service import Service
from controlkit.server.spec import Spec
from controlkit.server.store import Job

IGNORED = "X-Controlkit-Ignored"
"""Header of a response: fields of the request that this server does not support, separated by commas."""
_MOST_NAMED = 20
_LOOK_EVERY = 1.0
"""Seconds between looks whether a client that waits for its images is still there."""
_FILE = re.compile(r"\b(?:(image|mask|init_images\[0\])\.png|(control|unit)(\d+)(?:-(\w+))?(?:\.png)?)(?!\w)")
"""An image of a request, as errors and notes name it."""
_OPTION = re.compile(r"(?<![\w-])--(image|mask|prepared|vae|seed)\b")
"""An option of the command line that is also a field of requests."""
_PLACE = re.compile(r"\b(controlnet_(?:images|masks))\[0*(\d+)\]")
"""An image of `detect`, whose number has zeros before it, so that names have the order of the images."""
_ADVICE_ON_LORAS = re.compile(r"use --lora FILE@WEIGHT in place of it; or use prompt syntax plain")
_A1111 = "/sdapi/"
_A1111_FIELDS = {
    "strength": "denoising_strength",
    "hires_strength": "denoising_strength",
    "guidance": "cfg_scale",
    "hires": "hr_scale",
}
"""Field of `GenerateRequest`, with which an error begins -> its name in A1111."""
_A1111_FIELD = re.compile(rf"^({'|'.join(_A1111_FIELDS)})\b(?!\.)")

log = logging.getLogger("controlkit.server")


def service_of(request: Request) -> Service:
    """The service of the application that received `request`."""
    found: Service = request.app.state.service
    return found


def in_words_of_clients(text: str, catalogue: Catalogue, path: str = "") -> str:
    """A note or an error of a request without paths of the server, and with fields in place of files and options.

    Args:
        path: that of the request; below A1111's, fields have the names of its API.
    """
    is_a1111 = path.startswith(_A1111)
    text = _PLACE.sub(r"\1[\2]", _FILE.sub(_field_of, catalogue.without_paths(text)))
    place = "write it in prompt, not in negative_prompt" if is_a1111 else "send it in loras; or use prompt_syntax plain"
    text = _OPTION.sub(r"\1", _ADVICE_ON_LORAS.sub(place, text))
    return _A1111_FIELD.sub(lambda found: _A1111_FIELDS[found[1]], text) if is_a1111 else text


def _field_of(found: re.Match[str]) -> str:
    """The field in which a client sent an image."""
    field, kind, index, part = found.groups()
    if kind is None:
        return str(field)
    part = part or "image"
    part = f"images[{part}]" if part.isdecimal() else part
    return f"controls[{index}].{part}" if kind == "control" else f"the {part} of unit {index}"


def name_ignored(fields: Iterable[str], request: Request, response: Response) -> None:
    """Name unsupported fields in the response and in the log, percent-encoded: they are the client's text."""
    # A header must not end with a space, as it would after an empty name.
    names = [quote(name[:60], safe="[]", errors="replace") or '""' for name in dict.fromkeys(fields)][:_MOST_NAMED]
    if names:
        response.headers[IGNORED] = ", ".join(names)
        log.info("ignored fields", extra={"path": request.url.path, "fields": names})


async def drawn(request: Request, spec: Spec, files: dict[str, bytes]) -> Job:
    """Queue a request for images and wait until it has ended; if it was cancelled, it has the finished images. It is
    cancelled if its client disconnects.

    Args:
        files: name -> bytes of its images; empty once they are on the disk.

    Raises:
        UserError: it is invalid, or failed with an error that the client can fix.
        HTTPException: as in `ended`; 503, the server stops.
        QueueFull: the queue is full.
        QueueStopped: the queue has stopped.
    """
    job = await service_of(request).submit(spec, files)
    # Many clients may wait, each with megabytes of images.
    files.clear()
    if request.headers.get("content-type", "").startswith("application/json"):
        (await request.json()).clear()  # it was parsed once, and FastAPI keeps what it was parsed to
    return ended(await _waited(service_of(request), job, request))


async def _waited(service: Service, job: Job, request: Request | None) -> Job | None:
    """Wait until a request has ended, and return it; None if it has been removed.

    Args:
        request: that of its client; it is cancelled if the client disconnects.

    Raises:
        HTTPException: 503, the server stops.
    """
    waiting = asyncio.ensure_future(service.wait(job.id))
    try:
        while not (await asyncio.wait([waiting], timeout=_LOOK_EVERY))[0]:
            if request is not None and await request.is_disconnected():
                log.info("the client has gone", extra={"job": job.id})
                await service.cancel(job.id)
                break
        return await waiting
    except asyncio.CancelledError:
        later = "send it again later"
        if job.kind == "generate":  # the queue's file keeps it
            later = f"it runs when the server starts again, with the result at /controlkit/v1/jobs/{job.id}/result"
        raise HTTPException(503, f"the server is stopping before the request {job.id} has ended; {later}") from None
    finally:
        waiting.cancel()


async def detected(
    service: Service, spec: Mapping[str, Any], files: Mapping[str, bytes], request: Request | None = None
) -> list[bytes]:
    """Compute condition images, and wait for them. They are not kept.

    Args:
        spec: as `Studio.detect` takes it.
        files: name -> bytes of the images, in order.
        request: that of the client; the computation is cancelled if the client disconnects.

    Returns:
        PNG files, in that order.

    Raises:
        UserError: an image or a parameter cannot be used.
        HTTPException: as in `ended`; 409, it was cancelled; 503, the server stops.
        QueueFull: the queue is full.
        QueueStopped: the queue has stopped.
    """
    job = await service.queue("detect", spec, files)
    found = await _waited(service, job, request)
    try:
        if ended(found).state == "cancelled":
            raise HTTPException(409, f"the request {job.id} was cancelled before it had ended; send it again")
        return await service.files(job.id, "images")
    finally:
        await run_in_threadpool(service.store.remove, job.id)


def ended(job: Job | None) -> Job:
    """`job`, checked to be done or cancelled.

    Raises:
        UserError: it failed with an error that the client can fix.
        HTTPException: 404, its result has been removed (`job` is None); 500, it failed by a fault of the server.
    """
    if job is None:
        raise HTTPException(404, "the result has been removed; the server keeps the last ones (--keep)")
    if job.state == "failed":
        for code in CODES:
            if code == job.code:
                raise UserError(job.error or "", code)
        raise HTTPException(500, job.error)
    return job


def checked_prompt(text: str, name: str) -> str:
    """`text`, checked to be valid Unicode of at most `TEXT` characters.

    Args:
        name: the prompt's name in errors.

    Raises:
        UserError: it is not.
    """
    if len(text) > TEXT:
        raise UserError(f"{name} has {len(text)} characters; this server allows {TEXT}", "out-of-range")
    return valid_text(text, name)


def consecutive_seeds(seed: int, count: int) -> list[int]:
    """`count` seeds from `seed` on. -1 is a random seed, chosen here so that a request that runs again is the same.

    Raises:
        UserError: `seed` is neither -1 nor from 0 to 2^64 - 1.
    """
    (first,) = settled_seeds((seed,))
    return [first + index for index in range(count)]
