"""What the page asks of the server: it queues requests as clients of the API do, and watches them."""

from __future__ import annotations

import asyncio
import io
import logging
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from fastapi.concurrency import run_in_threadpool
from PIL import Image
from pydantic import ValidationError

from controlkit import conditions
from controlkit.errors import UserError
from controlkit.server.native import GenerateBody, build
from controlkit.server.replies import detected
from controlkit.server.service import Service
from controlkit.server.spec import Spec
from controlkit.server.store import FINISHED, Job, QueueFull
from controlkit.ui.files import png_bytes

log = logging.getLogger("controlkit.server")

FAILED = "the server failed; its log has the details"


def sentence(error: BaseException) -> str:
    """What a person is told of an error; what is no fault of theirs goes to the log."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, QueueFull):
        return "the queue is full; try again later"
    log.error("failed", exc_info=error)
    return FAILED


_OPTIONS = {
    "a width and height": "a Width and Height in Settings",
    "drop --prepared": "untick that it is a condition image",
    "image.png": "the start image",
    "mask.png": "the mask of the start image",
}


def in_words_of_page(text: str, numbers: Sequence[int]) -> str:
    """A note or an error of a request, with what the page shows in place of files and options.

    Args:
        numbers: those of the page for the controls of the request, in order.
    """

    def control(found: re.Match[str]) -> str:
        index = int(found[1])
        number = numbers[index] if index < len(numbers) else index + 1
        return f"the {found[2] or 'image'} of control {number}"

    text = re.sub(r"\bcontrol(\d+)(?:-(mask))?\.png", control, text)
    for words, shown in _OPTIONS.items():
        text = re.sub(rf"(?<![\w-]){re.escape(words)}(?!\w)", shown, text)
    return text


@dataclass(frozen=True)
class Watched:
    """A request as it is at one moment."""

    job: Job
    line: str
    """Its place or its progress, in words."""
    preview: bytes | None
    """A PNG, if there is a new one."""


class Client:
    """The page's side of a running server. Methods are called in the event loop of the server."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._computing = asyncio.Semaphore()

    @property
    def sizes(self) -> str:
        """The limits of a request, in words."""
        limits = self.service.limits
        return f"at most {limits.images} images, {limits.controls} controls and {limits.steps} steps"

    async def spec(self, values: Mapping[str, Any]) -> tuple[Spec, dict[str, bytes]]:
        """The spec and the images of a request.

        Args:
            values: the body of `POST /controlkit/v1/jobs`.

        Raises:
            UserError: it cannot be drawn.
        """
        try:
            body = GenerateBody.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"])
            raise UserError(f"{name}: {first['msg']}", "wrong-type") from error
        return await run_in_threadpool(build, body, self.service)

    async def submit(self, spec: Spec, files: Mapping[str, bytes]) -> Job:
        """Queue a request.

        Raises:
            UserError: it cannot be drawn.
            QueueFull: too many wait.
        """
        return await self.service.submit(spec, files)

    async def watch(self, name: str) -> AsyncIterator[Watched]:
        """The request of this id at each change, until it has ended.

        Raises:
            UserError: it failed.
        """
        shown = 0
        with self.service.watch(name) as event:
            while True:
                event.clear()
                job = await self.service.job(name)
                if job is None:
                    raise UserError("the request was removed from the queue", "missing-file")
                if job.state == "failed":
                    raise UserError(job.error or FAILED, "unsupported")
                progress, preview = self.service.progress_of(job), None
                if progress is not None and progress.previews != shown:
                    shown, preview = progress.previews, progress.preview
                yield Watched(job, await self._line(job), preview)
                if job.state in FINISHED:
                    return
                await self.service.wait_for_change(event, 5.0)

    async def _line(self, job: Job) -> str:
        if job.state == "pending":
            place = await self.service.place(job)
            return f"waiting; {place} before it" if place else "waiting for the worker to start"
        progress = self.service.progress_of(job)
        if job.state == "running":
            if progress is None or not progress.total:
                return "loading models"
            left = progress.seconds_left
            estimate = "" if left is None else f", about {left:.0f} s left"
            return f"step {progress.done} of {progress.total}{estimate}"
        return str(job.state)

    async def condition_image(
        self, image: Image.Image, condition: str | None, parameters: Mapping[str, Any]
    ) -> Image.Image:
        """The condition image of an image; None for the image as it is.

        One that a model computes waits in the queue; others are computed here, one after the other.

        Raises:
            UserError: it cannot be computed.
            QueueFull: too many wait.
        """
        if condition is None:
            return image
        kind = conditions.find(condition)
        if kind.requires is None and not kind.is_own:
            async with self._computing:
                return Image.fromarray(await run_in_threadpool(kind, np.asarray(image), **parameters))
        spec: dict[str, Any] = {"module": condition, "parameters": dict(parameters), "side": None}
        (found,) = await detected(self.service, spec, {"image": png_bytes(image)})
        return Image.open(io.BytesIO(found))
