"""What the APIs share in reading requests and answering them."""

from __future__ import annotations

from fastapi import HTTPException, Request

from controlkit.errors import CODES, UserError
from controlkit.files import valid_text
from controlkit.sampling.seeds import settled_seeds
from controlkit.server.limits import TEXT
from controlkit.server.service import Service
from controlkit.server.spec import Spec
from controlkit.server.store import Job


def service_of(request: Request) -> Service:
    """The service of the application."""
    found: Service = request.app.state.service
    return found


async def drawn(service: Service, spec: Spec, files: dict[str, bytes]) -> Job:
    """Queue a request for images and wait until it has ended; one that was cancelled has what was finished.

    Raises:
        UserError: it cannot be drawn.
        HTTPException: it failed, by no fault of the client.
        QueueFull: too many wait.
    """
    job = await service.submit(spec, files)
    return ended(await service.wait(job.id))


def ended(job: Job | None) -> Job:
    """A request that has ended well, or was cancelled.

    Raises:
        UserError: it cannot be drawn.
        HTTPException: it is not known any more, or failed by no fault of the client.
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
    """A prompt that is valid text of a length that is allowed.

    Raises:
        UserError: it is not.
    """
    if len(text) > TEXT:
        raise UserError(f"{name} has {len(text)} characters; this server allows {TEXT}", "out-of-range")
    return valid_text(text, name)


def consecutive_seeds(seed: int, count: int) -> list[int]:
    """`count` seeds from `seed` on; -1 is a random one, settled here so that a request begun again is the same.

    Raises:
        UserError: a seed is not from 0 to 2^64 - 1.
    """
    (first,) = settled_seeds((seed,))
    return [first + index for index in range(count)]
