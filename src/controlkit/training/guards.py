"""Watchdogs of a training run: diverging loss and stalled steps."""

from __future__ import annotations

import math
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from controlkit.training.log import clock

_SMOOTH = 0.05
"""Weight of a new loss in the running mean, which averages about forty steps."""
_SETTLE = 50
"""Steps before the running mean counts."""
_FEW, _DIVERGED_EARLY = 10, 20.0
"""Until then, the mean of at least so many steps must rise by this factor, to be significant."""
_RISEN, _DIVERGED = 2.0, 5.0
"""Multiples of the lowest running mean."""

_SMOOTH_IN_TIME = 0.02
"""Weight of a new sample in the mean of its time bin."""
_SETTLE_IN_TIME = 20
"""Samples in a time bin before its mean counts."""
_MAX_RATIO = 20.0
"""Maximum ratio of a step to its reference: three outliers in a row do not end a run, five do."""
_TINY = 1e-12

_LEAST_SECONDS = 120.0
_TIMES_SLOWER = 20.0


@dataclass
class _Level:
    """The running mean of some losses, and its lowest value once it has settled."""

    count: float = 0.0
    mean: float = 0.0
    lowest: float | None = None

    def update(self, loss: float, count: float, least: float, settle: int) -> None:
        """Add `count` losses whose mean is `loss`, each with a weight of at least `least`."""
        self.count += count
        self.mean += max(1 - (1 - least) ** count, count / self.count) * (loss - self.mean)
        if self.count >= settle:
            self.lowest = self.mean if self.lowest is None else min(self.lowest, self.mean)


class LossMonitor:
    """Detects divergence: a recent mean loss far above the lowest.

    A diffusion loss depends most of all on the sample's time t: for noise prediction it is a hundred times as high at
    the first times as at the last, so at batch size 1 a mean over forty steps varies with the times sampled. A sample
    is therefore compared with the lowest mean of its time bin, or, until that has enough samples, with the power of the
    target, which is the error of predicting zero. A loss without times is compared with its lowest running mean.
    """

    def __init__(self, step: int) -> None:
        """Start at `step`, with no history."""
        self.healthy_step = step
        """Steps done when the loss was last near its lowest."""
        self.excess = 1.0
        """The running mean of recent losses, as a multiple of the lowest."""
        self._all = _Level()
        self._early = float("inf")
        self._times: list[_Level] = []

    def has_diverged(self, loss: float, done: int, by_time: Sequence[Sequence[float]] | None = None) -> bool:
        """Add the loss of the step before which `done` steps were done; whether the loss has diverged.

        Args:
            by_time: `Objective.by_time`, if the loss has times.
        """
        self.excess = self._overall_excess(loss) if by_time is None else self._excess_by_time(by_time)
        if self.excess <= _RISEN:
            self.healthy_step = done
        return self.excess > _DIVERGED

    def state(self) -> dict[str, Any]:
        """State for `restore`, as JSON values."""
        early = None if math.isinf(self._early) else self._early
        levels = {"all": astuple(self._all), "times": [astuple(level) for level in self._times]}
        return {"calm": self.healthy_step, "excess": self.excess, "early": early, **levels}

    def restore(self, state: dict[str, Any], step: int) -> None:
        """Restore what `state` returned after `step` steps."""
        self.healthy_step = step if state["calm"] >= step - 1 else state["calm"]
        self.excess = state["excess"]
        self._early = float("inf") if state["early"] is None else state["early"]
        self._all = _Level(*state["all"])
        self._times = [_Level(*level) for level in state["times"]]

    def _overall_excess(self, loss: float) -> float:
        level = self._all
        level.update(loss, 1, _SMOOTH, _SETTLE)
        if level.lowest is not None:
            return level.mean / max(level.lowest, _TINY)
        if level.count >= _FEW:
            self._early = min(self._early, level.mean)
        return level.mean / max(self._early, _TINY) * _DIVERGED / _DIVERGED_EARLY

    def _excess_by_time(self, by_time: Sequence[Sequence[float]]) -> float:
        if len(self._times) != len(by_time[0]):
            self._times = [_Level() for _ in by_time[0]]
        total = 0.0
        for level, error, power, count in zip(self._times, *by_time, strict=True):
            if count:
                reference = power / count if level.lowest is None else level.lowest
                total += error / max(reference, _TINY)
                level.update(error / count, count, _SMOOTH_IN_TIME, _SETTLE_IN_TIME)
        relative = min(total / sum(by_time[2]), _MAX_RATIO)
        return self.excess + _SMOOTH * (relative - self.excess)


class StallMonitor:
    """Warns on standard error when a step takes far longer than those before, and where it waits.

    It does not end the run: a disk or another process may be slow.

    Args:
        least: seconds that any step may take.
        slower: multiple of the mean step time from which to warn.
        warn: receives the warning.
    """

    def __init__(
        self,
        least: float = _LEAST_SECONDS,
        slower: float = _TIMES_SLOWER,
        warn: Callable[[str], object] = lambda text: print(text, file=sys.stderr, flush=True),
    ) -> None:
        self.least = least
        self.slower = slower
        self.warn = warn
        self._thread = threading.get_ident()
        self._mean = 0.0
        self._done = 0

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Run step `number` in this block."""
        allowed = max(self.least, self.slower * self._mean)
        timer = threading.Timer(allowed, self._report, (number, allowed))
        timer.daemon = True
        started = time.monotonic()
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
        self._done += 1
        self._mean += (time.monotonic() - started - self._mean) / self._done

    def _report(self, number: int, allowed: float) -> None:
        usual = f" (before: {self._mean:.2g} s per step)" if self._done else ""
        self.warn(
            f"step {number} has taken {clock(allowed)} so far{usual}; it waits in {_location(self._thread)}. The run"
            " continues when the step ends; Ctrl-C twice ends it, and the same command resumes from the last state"
        )


def _location(thread: int) -> str:
    """The innermost line of this package in a thread's stack, and the innermost of all."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return "a finished thread"
    lines = traceback.extract_stack(frame)
    root = Path(__file__).parents[1]
    own = [line for line in lines if Path(line.filename).is_relative_to(root)]
    places = [f"{Path(line.filename).name}:{line.lineno} ({line.name})" for line in own[-1:] + lines[-1:]]
    return " -> ".join(dict.fromkeys(places))
