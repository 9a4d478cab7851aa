"""The service behind the endpoints of all APIs: queue, models, and waiting for results."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi.concurrency import run_in_threadpool

from controlkit.errors import UserError
from controlkit.server.catalogue import Catalogue
from controlkit.server.limits import Limits
from controlkit.server.metrics import Metrics
from controlkit.server.spec import Execution, Spec
from controlkit.server.store import FINISHED, Job, QueueFull, Store
from controlkit.server.supervisor import Progress, Supervisor


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a server."""

    catalogue: Catalogue
    queue: Path
    """File of the queue."""
    limits: Limits = field(default_factory=Limits)
    token: str | None = None
    """Token that clients must send; None for no access control."""
    origins: tuple[str, ...] = ()
    """Origins of web pages that may use the server (CORS); `*` for all."""
    hosts: tuple[str, ...] | None = None
    """Names allowed in the header `Host`; None for all."""
    execution: Execution = field(default_factory=Execution)


class QueueStopped(Exception):
    """The thread that runs the queue has ended, so nothing would run a request."""


class Service:
    """The running server.

    Raises:
        UserError: the file of the queue cannot be used.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings, self.limits = settings, settings.limits
        self.metrics = Metrics()
        self._offering = threading.Lock()
        self.store = Store(settings.queue, queue=settings.limits.queue, kept=settings.limits.kept)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: dict[str, set[asyncio.Event]] = {}
        self.supervisor = Supervisor(
            self.store,
            settings.catalogue,
            self.limits,
            self.metrics,
            execution=settings.execution,
            changed=self._changed,
        )

    @property
    def catalogue(self) -> Catalogue:
        """The models that clients may name."""
        return self.supervisor.catalogue

    def offer_control(self, name: str, path: Path) -> None:
        """Offer one more control, or a new file of one, from the next request on. May be called from any thread.

        Args:
            path: of a file that the server itself has written; never of a client.

        Raises:
            UserError: it is not a control.
        """
        with self._offering:
            self.supervisor.catalogue = self.catalogue.with_control(name, path)

    def start(self) -> None:
        """Start the worker, and continue with the queue in its file. Called in the event loop."""
        self._loop = asyncio.get_running_loop()
        self.store.recover()
        self.supervisor.start()

    def stop(self) -> None:
        """End the worker; requests that have not ended stay in the queue."""
        self.supervisor.stop()
        self.store.close()

    def _changed(self, name: str) -> None:
        """Wake the coroutines that wait for a request; called by the supervisor's thread."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._set_events, name)

    def _set_events(self, name: str) -> None:
        for event in self._waiting.get(name, ()):
            event.set()

    async def submit(self, spec: Spec, files: Mapping[str, bytes]) -> Job:
        """Check a request for images and queue it.

        Args:
            files: name -> bytes of its images.

        Raises:
            UserError: it is invalid or above the limits. Its message names no path of the server.
            QueueFull: the queue is full.
            QueueStopped: the queue has stopped.
        """
        try:
            await run_in_threadpool(spec.check, self.catalogue, self.limits)
        except UserError as error:
            raise UserError(self.catalogue.without_paths(str(error)), error.code) from error
        return await self.queue("generate", spec.to_json(), files)

    async def queue(self, kind: str, spec: Mapping[str, Any], files: Mapping[str, bytes]) -> Job:
        """Queue a request that was checked.

        Args:
            kind: `generate` or `detect`.
            spec: values of JSON.
            files: name -> bytes of its images.

        Raises:
            QueueFull: the queue is full.
            QueueStopped: the queue has stopped.
        """
        if not self.supervisor.is_alive():
            raise QueueStopped
        try:
            job = await run_in_threadpool(self.store.submit, kind, spec, files)
        except QueueFull:
            self.metrics.add("controlkit_refused_total")
            raise
        self.supervisor.wake()
        return job

    async def job(self, name: str) -> Job | None:
        """The request of this id, or None."""
        return await run_in_threadpool(self.store.get, name)

    async def wait(self, name: str) -> Job | None:
        """Wait until the request of this id has ended, and return it; None if it is unknown or has been removed."""
        with _Event(self._waiting, name) as event:
            while True:
                event.clear()
                job = await self.job(name)
                if job is None or job.state in FINISHED:
                    return job
                await event.wait()

    async def wait_for_change(self, event: asyncio.Event, seconds: float) -> None:
        """Wait until the request that `event` watches changes, at most `seconds`; its place in the queue changes
        without an event."""
        try:
            await asyncio.wait_for(event.wait(), seconds)
        except TimeoutError:
            return

    def watch(self, name: str) -> _Event:
        """A context manager that yields an event, which is set at each change of a request."""
        return _Event(self._waiting, name)

    async def cancel(self, name: str) -> Job | None:
        """Cancel a request, and return its state after that; None if it is unknown."""
        before = await self.job(name)
        job = await run_in_threadpool(self.store.cancel, name)
        if before is not None and before.state == "pending" and job is not None and job.state == "cancelled":
            self.metrics.add("controlkit_jobs_total", state="cancelled")
        self._set_events(name)
        self.supervisor.wake()
        return job

    async def running(self) -> Job | None:
        """The running request, or None."""
        return await run_in_threadpool(self.store.running)

    async def counts(self) -> dict[str, int]:
        """State -> number of requests."""
        return await run_in_threadpool(self.store.counts)

    async def place(self, job: Job) -> int:
        """Number of requests before `job`, the running one included; 0 if it does not wait."""
        return await run_in_threadpool(self.store.place, job)

    async def files(self, name: str, role: str) -> list[bytes]:
        """Images of a result, in order; `role` is `images`, `maps` or `start`."""
        return list((await run_in_threadpool(self.store.files, name, role)).values())

    def progress_of(self, job: Job) -> Progress | None:
        """The progress of a request; None if it does not run."""
        progress = self.supervisor.progress
        return progress if progress is not None and progress.job == job.id else None


@dataclass
class _Event:
    """Registers an event for the changes of one request, for the length of a `with` block."""

    waiting: dict[str, set[asyncio.Event]]
    name: str
    event: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)

    def __enter__(self) -> asyncio.Event:
        self.waiting.setdefault(self.name, set()).add(self.event)
        return self.event

    def __exit__(self, *error: object) -> None:
        events = self.waiting[self.name]
        events.discard(self.event)
        if not events:
            del self.waiting[self.name]
