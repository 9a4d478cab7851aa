"""What a run tells: JSON lines always, TensorBoard where it is installed, and a line on standard error."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_WARM_UP, _TIMED = 2, 6
"""Steps before the first that is timed, and the step after which the first estimate is told."""


class RunLog:
    """Writes `log.jsonl` (and TensorBoard events) in `folder` and prints progress with an estimate."""

    def __init__(self, folder: Path, first_step: int, steps: int) -> None:
        """Drop lines after `first_step`, which a resumed run will write again."""
        self.path = folder / "log.jsonl"
        self.steps = steps
        self._first = first_step
        self._before = 0.0
        self._started = self._warm = time.monotonic()
        kept = []
        lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n") if self.path.exists() else []
        torn = 0
        for number, line in enumerate(lines, 1):
            try:
                told = json.loads(line)
                if told["step"] <= first_step:
                    self._before = float(told["seconds"])
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                torn += bool(line) and number < len(lines)  # the last line of a killed run may be torn
        if torn:
            print(f"note: {torn} lines of {self.path} cannot be read and are left out", file=sys.stderr, flush=True)
        self.path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self._stream = self.path.open("a", encoding="utf-8", buffering=1)
        self._board = _tensorboard(folder)

    def write(self, step: int, values: dict[str, float], settings: Mapping[str, Any] | None = None) -> None:
        """One line: `step`, `seconds` that the steps so far took, before an interruption too, and `values`.

        Args:
            settings: what the values depend on; they stand in the line alone.
        """
        seconds = round(self._before + time.monotonic() - self._started, 3)
        self._stream.write(json.dumps({"step": step, "seconds": seconds, **values, **(settings or {})}) + "\n")
        if self._board is not None:
            for key, value in values.items():
                self._board.add_scalar(key, value, step)

    def estimate(self, step: int) -> None:
        """Call after every step: tells once, after a few steps, how long the rest will take."""
        done = step - self._first
        if done == _WARM_UP:
            self._warm = time.monotonic()
        if done == _TIMED and step < self.steps:
            pace = (time.monotonic() - self._warm) / (_TIMED - _WARM_UP)
            left = clock(pace * (self.steps - step))
            print(
                f"{self.steps - step} steps will take about {left}, previews not counted", file=sys.stderr, flush=True
            )

    def say(self, step: int, values: dict[str, float], scored: str = "") -> None:
        """Progress on standard error, with the time that is left at the pace so far.

        Args:
            scored: how scores among the values were sampled.
        """
        seconds = time.monotonic() - self._started
        left = seconds / max(1, step - self._first) * (self.steps - step)
        shown = "  ".join(f"{key} {value:.4g}" for key, value in values.items())
        beside = f" ({scored})" if scored else ""
        print(f"step {step}/{self.steps}  {shown}{beside}  {clock(left)} left", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Flush and close."""
        self._stream.close()
        if self._board is not None:
            self._board.close()


class NullLog:
    """The log of a process that is not the first."""

    def write(self, step: int, values: dict[str, float], settings: Mapping[str, Any] | None = None) -> None:
        """Nothing."""

    def estimate(self, step: int) -> None:
        """Nothing."""

    def say(self, step: int, values: dict[str, float], scored: str = "") -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def total_seconds(folder: Path) -> float:
    """Seconds that the steps in a folder's `log.jsonl` took, over every time that the run was continued.

    In old logs each continuation begins at 0 again.
    """
    total = before = 0.0
    path = folder / "log.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        seconds = float(json.loads(line)["seconds"])
        total += seconds - before if seconds >= before else seconds
        before = seconds
    return total


def clock(seconds: float) -> str:
    """`0:42`, `12:05` or `3:07:00`."""
    whole = int(seconds + 0.5)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder))
