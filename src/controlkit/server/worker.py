"""The worker process: holds the models and runs one request at a time.

It is a separate process, so that the server answers while images are generated, and survives a crash of the worker or a
lack of memory: the queue continues with a new worker.
"""

from __future__ import annotations

import signal
import time
import traceback
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

from controlkit.errors import UserError, is_out_of_memory
from controlkit.server.catalogue import Catalogue
from controlkit.server.limits import Limits
from controlkit.server.spec import Execution

_PREVIEW_EVERY = 0.4
"""Least seconds between previews: each costs time, and people cannot follow more."""


def run_worker(connection: Connection, catalogue: Catalogue, limits: Limits, execution: Execution) -> None:
    """Run the requests that the connection sends, until it closes.

    Messages to the worker: `("job", id, kind, spec, files, catalogue)`, `("cancel", id)`. From it: `("ready",)`, and
    for a request any number of `("step", id, done, total, preview)`, then one of `("done", id, values, files)`,
    `("cancelled", id, values, files)` and `("failed", id, text, code, traceback)`; no code means that the server is at
    fault.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the server ends the worker
    from controlkit.server.drawing import Studio

    worker = _Worker(connection, Studio(catalogue=catalogue, limits=limits, execution=execution))
    try:
        worker.send("ready")
        while True:
            worker.next()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the server has ended


class _Worker:
    def __init__(self, connection: Connection, studio: Any) -> None:
        self.connection, self.studio = connection, studio

    def send(self, *message: Any) -> None:
        self.connection.send(message)

    def next(self) -> None:
        """Handle the next message; a cancellation of a request that has ended has no effect."""
        message = self.connection.recv()
        if message[0] == "job":
            self._work(*message[1:])

    def _work(
        self, job: str, kind: str, spec: Mapping[str, Any], files: Mapping[str, bytes], catalogue: Catalogue
    ) -> None:
        import torch

        self.studio.use(catalogue)
        try:
            self._answer(job, kind, spec, files)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise
        except UserError as error:
            self.send("failed", job, str(error), error.code, None)
        except Exception as error:
            if is_out_of_memory(error):
                self.studio.models = type(self.studio.models)()
                self.send("failed", job, "out of memory; ask for a smaller or fewer images", "out-of-memory", None)
            else:
                text = f"the server failed ({type(error).__name__}); its log has the details"
                self.send("failed", job, text, None, traceback.format_exc())
        finally:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _answer(self, job: str, kind: str, spec: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
        from controlkit.server.drawing import Cancelled, preview
        from controlkit.server.spec import Spec

        if kind == "detect":
            result = self.studio.detect(spec, files)
            self.send("done", job, result.values, result.files)
            return
        shown = time.monotonic()

        def watch(step: Any) -> None:
            nonlocal shown
            while self.connection.poll():
                if self.connection.recv() == ("cancel", job):
                    raise Cancelled
            image = None
            if time.monotonic() - shown >= _PREVIEW_EVERY:
                image, shown = preview(step), time.monotonic()
            self.send("step", job, step.done, step.total, image)

        result, cancelled = self.studio.draw(Spec.from_json(spec), files, watch)
        self.send("cancelled" if cancelled else "done", job, result.values, result.files)
