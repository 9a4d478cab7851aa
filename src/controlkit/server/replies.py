"""Helpers of all APIs: reading requests and waiting for results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import HTTPException, Request
from fastapi.concurrency import run_in_threadpool

from controlkit.errors import CODES, UserError
from controlkit.files import valid_text
from controlkit.sampling.seeds import settled_seeds
from controlkit.server.limits import TEXT
from controlkit.server.service import Service
from controlkit.server.spec import Spec
from controlkit.server.store import Job


def service_of(request: Request) -> Service:
    """The service of the application that received `request`."""
    found: Service = request.app.state.service
    return found


async def drawn(service: Service, spec: Spec, files: dict[str, bytes]) -> Job:
    """Queue a request for images and wait until it has ended; if it was cancelled, it has the finished images.

    Args:
        files: name -> bytes of its images.

    Raises:
        UserError: it is invalid, or failed with an error that the client can fix.
        HTTPException: as in `ended`.
        QueueFull: the queue is full.
    """
    job = await service.submit(spec, files)
    return ended(await service.wait(job.id))


async def detected(service: Service, spec: Mapping[str, Any], files: Mapping[str, bytes]) -> list[bytes]:
    """Compute condition images, and wait for them. They are not kept.

    Args:
        spec: as `Studio.detect` takes it.
        files: name -> bytes of the images, in order.

    Returns:
        PNG files, in that order.

    Raises:
        UserError: an image or a parameter cannot be used.
        HTTPException: as in `ended`.
        QueueFull: the queue is full.
    """
    job = await service.queue("detect", spec, files)
    try:
        ended(await service.wait(job.id))
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
