"""Batches prepared by worker processes ahead of their steps, and their transfer to the device."""

from __future__ import annotations

import dataclasses
import gc
import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from typing import Any

import cv2
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from controlkit.bases.text import Text
from controlkit.data.workers import begin_forked, cores
from controlkit.errors import UserError

Prepare = Callable[[int], Any]
"""Number of a batch => what its step needs, on the CPU; always the same for the same number."""

_MOST_WORKERS = 8
"""Limit of the automatic number: more than a fast GPU needs."""
_AHEAD = 3
"""Batches that each worker prepares ahead."""
_JOIN_SECONDS = 5.0


class NotAhead(Exception):
    """Raised in a worker: this batch needs a network, so its step prepares it."""


def in_data_worker() -> bool:
    """Whether this process is a data worker, which has no networks and no GPU."""
    return get_worker_info() is not None


def number_of_workers(setting: int | None, device: torch.device, unsuitable: str = "") -> int:
    """Worker processes for the recipe setting `data_workers`.

    None is automatic: none on the CPU, whose cores the step itself uses, or where processes cannot be forked; else one
    per core but one, at most `_MOST_WORKERS`, shared by the processes that a launcher started on this machine.

    Args:
        setting: at least 0, or None.
        device: of the training.
        unsuitable: why batches cannot be prepared ahead; empty if they can.

    Returns:
        The number of workers of this process; 0 prepares each batch in its step.

    Raises:
        UserError: workers are requested and cannot run.
    """
    reason = unsuitable
    if not reason and not sys.platform.startswith("linux"):
        reason = "data workers are forked, which is safe on Linux only"
    if setting and reason:
        raise UserError(f"data_workers is {setting}, but {reason}; set data_workers=0", "unsupported")
    if setting is not None:
        return setting
    if reason or device.type == "cpu":
        return 0
    return max(0, min(_MOST_WORKERS, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1))


class DataAhead:
    """Calls `prepare` for consecutive batches in forked worker processes; the results equal those of this process.

    Workers share the memory of this process as of the fork, so they start at once and copy no data. Their errors are
    raised here, except `NotAhead`: such a batch is prepared here.

    Args:
        prepare: must use no network, GPU or thread of this process, except where it raises `NotAhead` in a worker.
        numbers: numbers of the batches, in the order of the calls.
        workers: number of processes, at least 1.
    """

    def __init__(self, prepare: Prepare, numbers: range, workers: int) -> None:
        self._prepare = prepare
        loader = DataLoader(
            _Prepared(prepare),
            batch_size=None,
            sampler=numbers,
            num_workers=workers,
            prefetch_factor=_AHEAD,
            collate_fn=_unchanged,
            worker_init_fn=_begin,
            multiprocessing_context="fork",
            generator=torch.Generator(),  # the loader draws a seed, and must not advance the default generator
        )
        before, threads = set(multiprocessing.active_children()), cv2.getNumThreads()
        gc.collect()  # what no one uses need not be in every worker
        # A forked child has none of OpenCV's threads, and must not wait for them.
        cv2.setNumThreads(1)
        try:
            self._iterator: Any = iter(loader)
        finally:
            cv2.setNumThreads(threads)
        self.processes: set[BaseProcess] = set(multiprocessing.active_children()) - before
        """The workers."""

    def __call__(self, number: int) -> Any:
        """The result of `prepare(number)`.

        Raises:
            UserError: `prepare` raised it, or a worker was killed.
            RuntimeError: a worker was killed (`worker_death`), or `prepare` raised it.
        """
        try:
            made_for, made = next(self._iterator)
        except (OSError, EOFError) as error:  # the worker died before its tensors were received
            raise _killed(error) from error
        assert made_for == number, f"batch {made_for} in place of {number}"
        if isinstance(made, UserError):
            raise made
        return self._prepare(number) if isinstance(made, NotAhead) else made

    def close(self) -> None:
        """End the workers; those that do not end by themselves are killed."""
        # The iterator's destructor does the same, but the traceback of an error keeps the iterator alive.
        try:
            self._iterator._shutdown_workers()
        except RuntimeError as error:  # torch's signal handler reports a death late; the other workers have ended
            if worker_death(error) is None:
                raise
        for process in self.processes:
            process.join(_JOIN_SECONDS)
            if process.is_alive():
                process.kill()
                process.join()


class _Prepared(Dataset[Any]):
    """Number of a batch -> (number, batch or error), as a dataset of torch's loader."""

    def __init__(self, prepare: Prepare) -> None:
        self._prepare = prepare

    def __getitem__(self, number: int) -> tuple[int, Any]:
        try:
            return number, self._prepare(number)
        except (UserError, NotAhead) as error:  # the loader would rebuild it from a traceback
            return number, error


def _unchanged(batch: Any) -> Any:
    return batch


def _begin(_worker: int) -> None:
    gc.freeze()  # garbage of the parent may hold CUDA graphs, which cannot be destroyed here
    begin_forked()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # their threads are not forked either


def worker_death(error: BaseException) -> UserError | None:
    """The error of a run whose worker was killed, which torch raises as a RuntimeError; None for other errors."""
    is_death = isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")
    return _killed(error) if is_death else None


def _killed(error: BaseException) -> UserError:
    reason = " ".join(str(error).split())
    return UserError(
        f"a data worker was killed, perhaps out of memory ({reason}); run the same command to resume, with a smaller"
        " data_workers, or 0 to prepare data in the step",
        "out-of-memory",
    )


def on_device(value: Any, device: torch.device) -> Any:
    """Copy all tensors of `value` to `device`: a tensor, `Text`, dataclass, named tuple, tuple, list or mapping.

    Copies to a GPU are from pinned memory and asynchronous. Other objects are returned as they are.
    """
    if isinstance(value, Tensor):
        if device.type == "cuda" and value.device.type == "cpu":
            value = value.pin_memory()
        return value.to(device, non_blocking=True)
    if isinstance(value, Text):
        return value.map(lambda tensor: on_device(tensor, device))
    if isinstance(value, Mapping):
        return {name: on_device(item, device) for name, item in value.items()}
    if isinstance(value, tuple | list):
        items = [on_device(item, device) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **{name: on_device(item, device) for name, item in fields.items()})
    return value
