"""The thread that passes requests from the queue to the worker process, and starts a new worker if it ends."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from typing import Any

from controlkit.server.catalogue import Catalogue
from controlkit.server.limits import Limits
from controlkit.server.metrics import Metrics
from controlkit.server.spec import Execution
from controlkit.server.store import Job, Store
from controlkit.server.worker import run_worker

_GRACE = 30.0
"""Seconds after a cancellation until a worker that does not follow it (it loads a model, or hangs) is killed."""
_WRITE_AGAIN = 1.0
"""Seconds between attempts to write to a full disk."""
_LONGEST_PAUSE = 30.0
"""Longest pause in seconds before a new worker starts, if several in a row ended while starting."""

log = logging.getLogger("controlkit.server")


@dataclass(frozen=True)
class Progress:
    """Progress of the running request."""

    job: str
    """Its id."""
    done: int = 0
    total: int = 0
    """Denoising steps; 0 of 0 while models are loaded."""
    since: float | None = None
    """Time of the first step, in seconds of the monotonic clock."""
    preview: bytes | None = None
    """A PNG."""
    previews: int = 0
    """Number of previews so far, by which clients know whether this one is new."""

    @property
    def fraction(self) -> float:
        """Fraction of the steps that are done, in [0, 1]."""
        return self.done / self.total if self.total else 0.0

    @property
    def seconds_left(self) -> float | None:
        """Estimated seconds until the last step; None before the second step."""
        if self.since is None or self.done < 2:
            return None
        return (time.monotonic() - self.since) / (self.done - 1) * (self.total - self.done)


class Supervisor(threading.Thread):
    """Runs the queue. `wake` and `stop` may be called from any other thread.

    Args:
        execution: how the worker runs requests.
        changed: called in this thread with the id of a request whose progress or state has changed.
    """

    def __init__(
        self,
        store: Store,
        catalogue: Catalogue,
        limits: Limits,
        metrics: Metrics,
        *,
        execution: Execution,
        changed: Callable[[str], object],
    ) -> None:
        super().__init__(name="supervisor", daemon=True)
        self._store, self._limits, self._metrics, self._changed = store, limits, metrics, changed
        self.catalogue = catalogue
        """The models that requests may use from now on."""
        self._execution = execution
        self._wakes, self._wake = multiprocessing.Pipe(duplex=False)
        self._waking = threading.Lock()
        self._stopping = False
        self._process: Any = None
        self._connection: Connection | None = None
        self._ready = False
        self._job: Job | None = None
        self._begun = 0.0
        self._cancelled_at: float | None = None
        self._reason: str | None = None
        self._failures = 0
        self._no_start_before = 0.0
        self.progress: Progress | None = None
        """Progress of the running request, if there is one."""

    @property
    def worker_pid(self) -> int | None:
        """Process id of the worker; None if there is none."""
        return None if self._process is None else self._process.pid

    @property
    def ready(self) -> bool:
        """Whether the worker has started and accepts requests."""
        return self._ready

    def wake(self) -> None:
        """Make the thread look at the queue, after a request was added or cancelled."""
        with self._waking, contextlib.suppress(OSError):
            self._wake.send_bytes(b"\0")

    def stop(self) -> None:
        """End the worker and the thread; a running request returns to the queue."""
        self._stopping = True
        self.wake()
        if self.is_alive():
            self.join()

    def run(self) -> None:
        """Run the queue until `stop`."""
        try:
            while not self._stopping:
                try:
                    self._start_worker()
                    self._give_work()
                    self._listen()
                    self._watch_time()
                except Exception as error:  # accepted requests must run, whatever happens
                    if not self._stopping:
                        self._begin_anew(error)
        finally:
            self._end_worker()
            if self._job is not None:
                with contextlib.suppress(sqlite3.Error):  # then it counts as killed
                    self._store.put_back(self._job.id, counted=False)

    def _begin_anew(self, error: Exception) -> None:
        """Go on after an unexpected exception, with a new worker and without its request."""
        log.error("the queue failed and goes on", exc_info=error)
        time.sleep(_WRITE_AGAIN)
        try:
            self._lost_worker()
        except Exception as second:
            log.error("the queue failed again", exc_info=second)

    def _start_worker(self) -> None:
        if self._process is not None or time.monotonic() < self._no_start_before:
            return
        context = multiprocessing.get_context("spawn")  # a fork would share locks and CUDA with this process
        try:
            ours, theirs = context.Pipe()
            try:
                arguments = (theirs, self.catalogue, self._limits, self._execution)
                process = context.Process(target=run_worker, args=arguments, daemon=True)
                process.start()
            except OSError:
                ours.close()
                raise
            finally:
                theirs.close()  # so that the worker's end is the only one, and its death closes ours
        except OSError as error:  # too many open files or processes, or no memory
            log.error("cannot start the worker", extra={"error": str(error)})
            self._pause_after_failure()
            return
        self._process, self._connection, self._ready = process, ours, False
        self._metrics.add("controlkit_worker_starts_total")

    def _end_worker(self) -> None:
        process, connection = self._process, self._connection
        self._process = self._connection = None
        self._ready = False
        with contextlib.suppress(OSError):
            if connection is not None:
                connection.close()
        with contextlib.suppress(OSError):
            if process is not None:
                process.kill()
                process.join()

    def _pause_after_failure(self) -> None:
        """Count a worker that ended or did not start, and start no other for longer after each in a row."""
        self._failures += 1
        pause = 0.0 if self._failures == 1 else min(2.0**self._failures, _LONGEST_PAUSE)
        self._no_start_before = time.monotonic() + pause

    def _give_work(self) -> None:
        if not self._ready or self._job is not None or self._connection is None:
            return
        job = self._insist(self._store.begin)
        if job is None:
            return
        self._job, self._begun, self._cancelled_at, self._reason = job, time.monotonic(), None, None
        self.progress = Progress(job.id)
        log.info("began", extra={"job": job.id, "kind": job.kind, "attempt": job.attempts})
        files = self._insist(lambda: self._store.files(job.id, "input"))
        with contextlib.suppress(OSError):  # a worker that has just ended; `_listen` sees it
            self._connection.send(("job", job.id, job.kind, job.spec, files, self.catalogue))
        self._changed(job.id)

    def _listen(self) -> None:
        """Wait for the worker, the queue, or the next check of the time."""
        sources: list[Any] = [self._wakes]
        if self._connection is not None:
            sources += [self._connection, self._process.sentinel]
        timeout = 1.0 if self._job is not None or self._connection is None else None
        ready = wait(sources, timeout)
        if self._wakes in ready:
            self._wakes.recv_bytes()
            self._pass_on_cancellation()
        if self._connection is not None and self._connection in ready:
            try:
                message = self._connection.recv()
            except (EOFError, OSError):
                self._lost_worker()
            else:
                self._hear(message)
        elif self._process is not None and self._process.sentinel in ready:
            self._lost_worker()

    def _pass_on_cancellation(self) -> None:
        if self._job is None or self._cancelled_at is not None:
            return
        name = self._job.id
        job = self._insist(lambda: self._store.get(name))
        if job is not None and job.cancelling:
            self._cancel()

    def _cancel(self) -> None:
        assert self._job is not None and self._connection is not None
        self._cancelled_at = time.monotonic()
        with contextlib.suppress(OSError):
            self._connection.send(("cancel", self._job.id))

    def _watch_time(self) -> None:
        if self._job is None:
            return
        now = time.monotonic()
        if self._cancelled_at is None and now - self._begun > self._limits.seconds:
            self._reason = f"it took longer than the {self._limits.seconds:g} seconds that this server allows"
            self._cancel()
        if self._cancelled_at is not None and now - self._cancelled_at > _GRACE:
            name = self._job.id
            self._end_worker()
            self._finish(name, "cancelled", {}, {})

    def _hear(self, message: tuple[Any, ...]) -> None:
        kind = message[0]
        if kind == "ready":
            self._ready, self._failures = True, 0
        elif kind == "step":
            self._step(*message[1:])
        elif kind == "failed":
            _, name, text, code, trace = message
            if trace is not None:
                log.error("failed", extra={"job": name, "traceback": trace})
            self._finish(name, "failed", None, None, error=text, code=code)
        else:
            _, name, values, files = message
            self._finish(name, kind, values, files)

    def _step(self, name: str, done: int, total: int, preview: bytes | None) -> None:
        before = self.progress
        if before is None or before.job != name:
            return
        since = time.monotonic() if before.since is None else before.since
        now = replace(before, done=done, total=total, since=since)
        self.progress = now if preview is None else replace(now, preview=preview, previews=before.previews + 1)
        self._metrics.add("controlkit_steps_total")
        self._changed(name)

    def _finish(self, name: str, state: Any, values: Any, files: Any, **error: Any) -> None:
        if state == "cancelled" and self._reason is not None:
            state, values, files, error = "failed", None, None, {"error": self._reason, "code": "out-of-range"}
        self._insist(lambda: self._store.finish(name, state, result=values, files=files, **error))
        seconds = time.monotonic() - self._begun
        self._metrics.add("controlkit_jobs_total", state=state)
        self._metrics.add("controlkit_job_seconds_sum", seconds)
        self._metrics.add("controlkit_job_seconds_count")
        self._metrics.add("controlkit_images_total", len((files or {}).get("images", ())))
        log.info("ended", extra={"job": name, "state": state, "seconds": round(seconds, 3), **_known(error)})
        self._job = self.progress = None
        self._changed(name)

    def _insist(self, write: Callable[[], Any]) -> Any:
        """Call `write`, which uses the queue's file, until it succeeds: on a full disk, a result waits here."""
        while True:
            try:
                return write()
            except sqlite3.Error as error:
                log.error("cannot write the queue", extra={"error": str(error)})
                if self._stopping:
                    raise
                time.sleep(_WRITE_AGAIN)

    def _lost_worker(self) -> None:
        """Clean up after a worker that ended. Its request returns to the queue, unless it has no attempts left."""
        code = None
        if self._process is not None:
            self._process.join(5)
            code = self._process.exitcode
        self._end_worker()
        self._pause_after_failure()
        log.error("the worker ended", extra={"exitcode": code, "job": None if self._job is None else self._job.id})
        self._metrics.add("controlkit_worker_losses_total")
        if self._job is not None:
            name = self._job.id
            state = self._insist(lambda: self._store.put_back(name, counted=True))
            if state != "pending":
                self._metrics.add("controlkit_jobs_total", state=state)
            self._job = self.progress = None
            self._changed(name)


def _known(error: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in error.items() if value is not None}
