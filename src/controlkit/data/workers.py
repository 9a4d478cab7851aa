"""Jobs on all cores: a pool of processes that survives the death of some of them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

import cv2

from controlkit.errors import UserError

Job = TypeVar("Job")
Result = TypeVar("Result")

_MOST_DEATHS = 3
_SURROUNDINGS = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    # glibc gives memory for pictures back to the system at once and asks for it again, page by page: a third of the
    # time of drawing edges. So large blocks stay with the process (32 MiB is the most that it takes for the first).
    "MALLOC_MMAP_THRESHOLD_": str(2**25),
    "MALLOC_TRIM_THRESHOLD_": str(2**28),
}
"""Environment of the processes of a pool, where it says nothing else: one thread each, and memory that is kept."""


def cores() -> int:
    """How many processes can work at once."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_jobs(make: Callable[[Job], Result], jobs: Sequence[Job], workers: int) -> Iterator[Result]:
    """`make(job)` of every job, as they finish; in this process with one worker, else in as many others.

    When a process dies (killed, out of memory) its jobs are done again by a new one, so `make` must not mind being run
    twice for a job.

    Raises:
        UserError: processes died again and again without a job being finished.
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
        with _surroundings(), _pool(min(workers, len(waiting))) as pool:
            try:
                while waiting or running:
                    while waiting and len(running) < 2 * workers:
                        running[pool.submit(make, waiting[0])] = waiting[0]
                        waiting.popleft()
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        result = future.result()
                        del running[future]
                        deaths = 0
                        yield result
            except BrokenProcessPool as error:
                waiting.extendleft(running.values())
                deaths += 1
                if deaths > _MOST_DEATHS:
                    raise UserError(
                        f"processes were killed {deaths} times in a row, perhaps for want of memory;"
                        " run again with fewer --workers, finished pictures are kept"
                    ) from error
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _pool(workers: int) -> ProcessPoolExecutor:
    # Forked copies of a process with threads (OpenCV, torch) can deadlock; spawned ones start clean.
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_begin)


def _begin() -> None:
    cv2.setNumThreads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends the pool
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
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
def _surroundings() -> Iterator[None]:
    """Processes started inside have the environment of a pool."""
    missing = {name: value for name, value in _SURROUNDINGS.items() if name not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)
