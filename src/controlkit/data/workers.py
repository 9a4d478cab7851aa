"""Process pool that survives killed workers and restarts hung ones."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import cv2

from controlkit.errors import UserError

Job = TypeVar("Job")
Result = TypeVar("Result")

_MOST_DEATHS = 3
_PATIENCE = 600.0
_NAMED = 4
"""Jobs named in a message."""
_LOOKS = 20
"""Checks for signs of life per period of patience."""
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    # By default glibc returns image-sized blocks to the system and faults them in again, a third of the time of
    # computing edges. So large blocks stay with the process (32 MiB is the maximum of the first setting).
    "MALLOC_MMAP_THRESHOLD_": str(2**25),
    "MALLOC_TRIM_THRESHOLD_": str(2**28),
    "CONTROLKIT_POOL": "1",
}
"""Default environment of workers: one thread each, and memory that is not returned."""


_RUN_AGAIN = 113
"""Exit code of a worker that began to run the calling script again."""

_life: Any = None
"""In a worker: shared counter of signs of life of the pool."""


def sign_of_life() -> None:
    """Tell the pool that this worker is alive; long jobs call it regularly."""
    if _life is not None:
        with _life.get_lock():
            _life.value += 1


def refuse_to_run_again() -> None:
    """Stop in a spawned process that is still importing the main script.

    A script without `if __name__ == "__main__":` reaches the same call there. A worker of this module exits silently,
    and the pool raises the error.

    Raises:
        UserError: called so in a process that something else started.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        if "CONTROLKIT_POOL" in os.environ:
            raise SystemExit(_RUN_AGAIN)
        raise _unguarded()


def _unguarded() -> UserError:
    return UserError(
        "worker processes import the calling script, which would run it again; put its code under"
        ' `if __name__ == "__main__":`, or pass workers=1',
        "usage",
    )


def cores() -> int:
    """CPU cores available to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_jobs(
    make: Callable[[Job], Result], jobs: Sequence[Job], workers: int, patience: float = _PATIENCE
) -> Iterator[Result]:
    """Yield `make(job)` of every job as it finishes; with one worker in this process, else in worker processes.

    The jobs of a killed worker (out of memory, say) are run again by a new one, with a message on standard error; so
    `make` must be idempotent.

    Args:
        patience: seconds without a finished job or a `sign_of_life` after which workers are killed and their jobs
            restarted, with a message on standard error.

    Raises:
        UserError: workers died or hung repeatedly without finishing a job, or run the calling script again.
    """
    if workers <= 1 or len(jobs) <= 1:
        with _one_thread():
            for job in jobs:
                yield make(job)
        return
    waiting = deque(jobs)
    deaths = 0
    while waiting:
        running: dict[Future[Result], Job] = {}
        watch = _Watch(patience)
        with _environment(), _pool(min(workers, len(waiting)), watch.life) as pool:
            try:
                while waiting or running:
                    while waiting and len(running) < 2 * workers:
                        running[pool.submit(make, waiting[0])] = waiting[0]
                        waiting.popleft()
                    watch.processes |= set(multiprocessing.active_children()) - watch.others
                    finished = wait(running, patience / _LOOKS, FIRST_COMPLETED).done
                    for future in finished:
                        result = future.result()
                        del running[future]
                        deaths = 0
                        yield result
                    watch.look(bool(finished), running.values())
            except BrokenProcessPool as error:
                if any(process.exitcode == _RUN_AGAIN for process in watch.processes):
                    raise _unguarded() from None
                waiting.extendleft(running.values())
                deaths += 1
                if deaths > _MOST_DEATHS:
                    raise watch.error(deaths, running.values()) from error
                if not watch.hung:
                    print(
                        f"\na process was killed, perhaps out of memory, in {_few(running.values())}: these run again"
                        " in new processes",
                        file=sys.stderr,
                        flush=True,
                    )
            except BaseException:
                # Jobs are idempotent: what runs is ended now, so that nothing writes any more once this returns.
                watch.kill()
                pool.shutdown(wait=True, cancel_futures=True)
                raise


class _Watch:
    """Watchdog of a pool: kills workers without signs of life, which breaks the pool."""

    def __init__(self, patience: float) -> None:
        self.patience = patience
        self.life = multiprocessing.get_context("spawn").Value("q", 0)
        self.hung = False
        self._last_count = 0
        self._alive = time.monotonic()
        self.processes: set[BaseProcess] = set()
        """Workers of the pool so far."""
        self.others = set(multiprocessing.active_children())

    def look(self, finished: bool, jobs: Iterable[object]) -> None:
        """Record whether a job was `finished`; kill the workers if nothing happened for too long."""
        now, count = time.monotonic(), self.life.value
        if finished or count != self._last_count:
            self._last_count, self._alive = count, now
        elif now - self._alive > self.patience:
            print(
                f"\nno process has finished anything for {self.patience:.0f} s, in {_few(jobs)}: all are restarted",
                file=sys.stderr,
                flush=True,
            )
            self.hung, self._alive = True, now
            self.kill()

    def kill(self) -> None:
        """End the workers."""
        for process in set(multiprocessing.active_children()) - self.others:
            process.kill()

    def error(self, deaths: int, jobs: Iterable[object]) -> UserError:
        """The error after repeated deaths."""
        if self.hung:
            return UserError(
                f"processes hung {deaths} times in a row, perhaps on a disk that does not respond, in {_few(jobs)}; run"
                " again without these files, finished images are kept",
                "unreadable-file",
            )
        return UserError(
            f"processes were killed {deaths} times in a row, perhaps out of memory, in {_few(jobs)}; run again with"
            " fewer --workers, finished images are kept",
            "out-of-memory",
        )


def _few(jobs: Iterable[object]) -> str:
    names = [str(job) for job in jobs]
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def _pool(workers: int, life: object) -> ProcessPoolExecutor:
    # Forks of a process with threads (OpenCV, torch) can deadlock.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(life,))


def _begin(life: object) -> None:
    global _life
    _life = life
    cv2.setNumThreads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and ends the pool
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


_LOOK_SECONDS = 0.2


def begin_forked() -> None:
    """Call first in a forked worker: its parent handles signals and ends it, and it does not outlive its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Launchers and schedulers send it to all processes of a run, which then needs its workers to finish the step.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parent = os.getppid()

    def end_with_parent() -> None:
        # Not the parent's sentinel, whose pipe is open in forked siblings, too.
        while os.getppid() == parent:
            time.sleep(_LOOK_SECONDS)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before)


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """Processes started inside inherit `_ENVIRONMENT`."""
    missing = {name: value for name, value in _ENVIRONMENT.items() if name not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)
