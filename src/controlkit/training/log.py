"""Logs of a training run: JSON lines, TensorBoard if installed, and progress on standard error."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from controlkit.files import with_null

_WARM_UP, _TIMED = 2, 6
"""Untimed steps, and the step after which the remaining time is first estimated."""


def is_timed(steps: int) -> bool:
    """Whether `RunLog.estimate` takes the time after this number of steps, whose work must then be done."""
    return steps in (_WARM_UP, _TIMED)


class RunLog:
    """Writes `log.jsonl` (and TensorBoard events) in `folder` and prints progress with an estimate."""

    def __init__(self, folder: Path, first_step: int, steps: int) -> None:
        """Drop lines after `first_step`, which a resumed run writes again."""
        self.path = folder / "log.jsonl"
        self.steps = steps
        self.last_step = 0
        """The step of the last line that was kept."""
        self._first = first_step
        self._before = 0.0
        self._started = self._warm = time.monotonic()
        kept = []
        lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n") if self.path.exists() else []
        unreadable = 0
        for number, line in enumerate(lines, 1):
            try:
                values = json.loads(line)
                if values["step"] <= first_step:
                    self._before, self.last_step = float(values["seconds"]), values["step"]
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                # The last line of a killed run may be truncated.
                unreadable += bool(line) and number < len(lines)
        if unreadable:
            print(f"note: dropped {unreadable} unreadable lines of {self.path}", file=sys.stderr, flush=True)
        self.path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self._stream = self.path.open("a", encoding="utf-8", buffering=1)
        self._board = _tensorboard(folder)

    def write(self, step: int, values: dict[str, float], settings: Mapping[str, Any] | None = None) -> None:
        """Write a line: `step`, `seconds` of all steps so far including earlier parts of the run, and `values`.

        Args:
            settings: how the values were computed; in the JSON line only.
        """
        seconds = round(self._before + time.monotonic() - self._started, 3)
        line = with_null({"step": step, "seconds": seconds, **values, **(settings or {})})
        self._stream.write(json.dumps(line, allow_nan=False) + "\n")
        if self._board is not None:
            for key, value in values.items():
                self._board.add_scalar(key, value, step)

    def estimate(self, step: int) -> None:
        """Call after every step; prints the remaining time once, after a few steps."""
        done = step - self._first
        if done == _WARM_UP:
            self._warm = time.monotonic()
        if done == _TIMED and step < self.steps:
            pace = (time.monotonic() - self._warm) / (_TIMED - _WARM_UP)
            left = clock(pace * (self.steps - step))
            print(f"{self.steps - step} steps will take about {left} without previews", file=sys.stderr, flush=True)

    def progress(self, step: int, values: dict[str, float], scored: str = "") -> None:
        """Print progress and the remaining time on standard error.

        Args:
            scored: how the samples of the scores were generated, or of which earlier step they are.
        """
        done, seconds = step - self._first, time.monotonic() - self._started
        left = f"  {clock(seconds / done * (self.steps - step))} left" if done else ""
        shown = "  ".join(f"{key} {value:.4g}" for key, value in values.items())
        beside = f" ({scored})" if scored else ""
        print(f"step {step}/{self.steps}  {shown}{beside}{left}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Flush and close."""
        self._stream.close()
        if self._board is not None:
            self._board.close()


class NullLog:
    """The log of all processes but the first: nothing."""

    last_step = 0

    def write(self, step: int, values: dict[str, float], settings: Mapping[str, Any] | None = None) -> None:
        """Do nothing."""

    def estimate(self, step: int) -> None:
        """Do nothing."""

    def progress(self, step: int, values: dict[str, float], scored: str = "") -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def total_seconds(folder: Path) -> float:
    """Total time in seconds of the steps in a folder's `log.jsonl`, over all parts of the run.

    In old logs, each part starts at 0.
    """
    total = previous = 0.0
    path = folder / "log.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        seconds = float(json.loads(line)["seconds"])
        total += seconds - previous if seconds >= previous else seconds
        previous = seconds
    return total


def clock(seconds: float) -> str:
    """`0:42`, `12:05` or `3:07:00`."""
    rounded = int(seconds + 0.5)
    hours, minutes = divmod(rounded // 60, 60)
    return f"{hours}:{minutes:02d}:{rounded % 60:02d}" if hours else f"{minutes}:{rounded % 60:02d}"


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder))
