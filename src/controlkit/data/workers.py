"""Jobs on all cores: a pool of processes that survives the death of some of them, and ends those that hang."""

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
_TOLD = 4
_LOOKS = 20
"""How often in the time of patience the pool looks for signs of life."""
_SURROUNDINGS = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    # glibc gives memory for images back to the system at once and asks for it again, page by page: a third of the
    # time of drawing edges. So large blocks stay with the process (32 MiB is the most that it takes for the first).
    "MALLOC_MMAP_THRESHOLD_": str(2**25),
    "MALLOC_TRIM_THRESHOLD_": str(2**28),
    "CONTROLKIT_POOL": "1",
}
"""Environment of the processes of a pool, where it says nothing else: one thread each, and memory that is kept."""


_RUN_AGAIN = 113
"""Exit code of a process of a pool in which the script that made the pool began to run from its start."""

_life: Any = None
"""In a process of a pool: the number of signs of life that all of them have given, shared."""


def sign_of_life() -> None:
    """Tell the pool that this process has not stopped; jobs that take long call it now and then."""
    if _life is not None:
        with _life.get_lock():
            _life.value += 1


def refuse_to_run_again() -> None:
    """Refuse to work in a process that has just been spawned and is still importing the main script.

    There a script without `if __name__ == "__main__":` comes to the same call again. In a pool of ours the process ends
    without a word, and the pool says why.

    Raises:
        UserError: it is so, in a process that something else started.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        if "CONTROLKIT_POOL" in os.environ:
            raise SystemExit(_RUN_AGAIN)
        raise _unguarded()


def _unguarded() -> UserError:
    return UserError(
        "the processes that make pairs import the script that asks for them, which thereby runs again from its start;"
        ' put what it does under `if __name__ == "__main__":`, or give workers=1'
    )


def cores() -> int:
    """How many processes can work at once."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_jobs(
    make: Callable[[Job], Result], jobs: Sequence[Job], workers: int, patience: float = _PATIENCE
) -> Iterator[Result]:
    """`make(job)` of every job, as they finish; in this process with one worker, else in as many others.

    When a process dies (killed, out of memory) its jobs are done again by a new one, which is told on standard error;
    so `make` must not mind being run twice for a job.

    Args:
        patience: seconds without a finished job or a `sign_of_life`, after which the processes are ended, which is told
            on standard error, and their jobs given to new ones.

    Raises:
        UserError: processes died or hung again and again without a job being finished, or run the script that called
            this from its start.
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
        with _surroundings(), _pool(min(workers, len(waiting)), watch.life) as pool:
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
                    raise watch.end(deaths, running.values()) from error
                if not watch.hung:
                    print(
                        f"\na process was killed, perhaps for want of memory, in {_few(running.values())}: these are"
                        " done again by new processes",
                        file=sys.stderr,
                        flush=True,
                    )
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


class _Watch:
    """Whether the processes of a pool give signs of life; those that do not are ended, which breaks the pool."""

    def __init__(self, patience: float) -> None:
        self.patience = patience
        self.life = multiprocessing.get_context("spawn").Value("q", 0)
        self.hung = False
        self._last_count = 0
        self._alive = time.monotonic()
        self.processes: set[BaseProcess] = set()
        """Those of the pool that were seen."""
        self.others = set(multiprocessing.active_children())

    def look(self, finished: bool, jobs: Iterable[object]) -> None:
        """Note whether something was `finished`; end the processes if nothing happened for too long."""
        now, count = time.monotonic(), self.life.value
        if finished or count != self._last_count:
            self._last_count, self._alive = count, now
        elif now - self._alive > self.patience:
            print(
                f"\nno process has finished anything for {self.patience:.0f} s, in {_few(jobs)}: they are ended and"
                " started again",
                file=sys.stderr,
                flush=True,
            )
            self.hung, self._alive = True, now
            for process in set(multiprocessing.active_children()) - self.others:
                process.kill()

    def end(self, deaths: int, jobs: Iterable[object]) -> UserError:
        """What to say when it makes no sense to go on."""
        why, cause, advice = (
            ("hung", "a disk that does not answer", "without these files")
            if self.hung
            else ("were killed", "want of memory", "with fewer --workers")
        )
        return UserError(
            f"processes {why} {deaths} times in a row, perhaps for {cause}, in {_few(jobs)}; run again {advice},"
            " finished images are kept"
        )


def _few(jobs: Iterable[object]) -> str:
    names = [str(job) for job in jobs]
    return ", ".join(names[:_TOLD]) + (f" and {len(names) - _TOLD} more" if len(names) > _TOLD else "")


def _pool(workers: int, life: object) -> ProcessPoolExecutor:
    # Forked copies of a process with threads (OpenCV, torch) can deadlock; spawned ones start clean.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(life,))


def _begin(life: object) -> None:
    global _life
    _life = life
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
