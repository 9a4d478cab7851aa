"""What watches over a run: a loss that explodes, and a step that does not end."""

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
"""Weight of a new loss in the running mean: about the last forty steps count."""
_SETTLE = 50
"""Steps before the running mean says anything."""
_FEW, _EXPLODED_EARLY = 10, 20.0
"""Until then, the mean of at least so many steps must rise by more to be told from chance."""
_RISEN, _EXPLODED = 2.0, 5.0
"""Of the lowest running mean so far."""

_SMOOTH_IN_TIME = 0.02
"""Weight of a new sample in the mean of the samples of about its time."""
_SETTLE_IN_TIME = 20
"""Samples of about one time before their mean says anything."""
_MOST = 20.0
"""The most that one step counts, relative to its reference: three odd samples in a row end no run, five do."""
_TINY = 1e-12

_LEAST_SECONDS = 120.0
_TIMES_SLOWER = 20.0


@dataclass
class _Level:
    """The running mean of some losses, and its lowest value once it has settled."""

    seen: float = 0.0
    mean: float = 0.0
    lowest: float | None = None

    def note(self, loss: float, count: float, least: float, settle: int) -> None:
        """Add `count` losses whose mean is `loss`; each counts `least` of the whole at least."""
        self.seen += count
        self.mean += max(1 - (1 - least) ** count, count / self.seen) * (loss - self.mean)
        if self.seen >= settle:
            self.lowest = self.mean if self.lowest is None else min(self.lowest, self.mean)


class LossMonitor:
    """Whether a loss has exploded: whether it is on average far above what it was at its best.

    The loss of a diffusion model depends on the time t of a sample more than on anything else: predicting noise, it is
    a hundred times as high at the first times as at the last. At batch size 1 the mean over some forty steps therefore
    rises and falls with the times that were drawn. So a sample is compared with the best mean of samples of about its
    own time; until there are enough of those, with the power of the target, which is the error of a network that
    predicts nothing. A loss without times is compared with its own lowest running mean.
    """

    def __init__(self, step: int) -> None:
        """Start at `step`, with no history."""
        self.healthy_step = step
        """Steps done when the loss was last near its best."""
        self.excess = 1.0
        """The running mean of recent losses, as a multiple of the best."""
        self._all = _Level()
        self._early = float("inf")
        self._times: list[_Level] = []

    def has_diverged(self, loss: float, done: int, by_time: Sequence[Sequence[float]] | None = None) -> bool:
        """Note the loss of the step after which `done` steps are done; whether it is far above what it was.

        Args:
            by_time: `Objective.by_time`, for a loss that depends on time.
        """
        self.excess = self._of_all(loss) if by_time is None else self._of_times(by_time)
        if self.excess <= _RISEN:
            self.healthy_step = done
        return self.excess > _EXPLODED

    def state(self) -> dict[str, Any]:
        """What `restore` takes, as values of JSON."""
        early = None if math.isinf(self._early) else self._early
        levels = {"all": astuple(self._all), "times": [astuple(level) for level in self._times]}
        return {"calm": self.healthy_step, "excess": self.excess, "early": early, **levels}

    def restore(self, state: dict[str, Any], step: int) -> None:
        """Go on with what `state` gave after `step` steps."""
        self.healthy_step = step if state["calm"] >= step - 1 else state["calm"]
        self.excess = state["excess"]
        self._early = float("inf") if state["early"] is None else state["early"]
        self._all = _Level(*state["all"])
        self._times = [_Level(*level) for level in state["times"]]

    def _of_all(self, loss: float) -> float:
        level = self._all
        level.note(loss, 1, _SMOOTH, _SETTLE)
        if level.lowest is not None:
            return level.mean / max(level.lowest, _TINY)
        if level.seen >= _FEW:
            self._early = min(self._early, level.mean)
        return level.mean / max(self._early, _TINY) * _EXPLODED / _EXPLODED_EARLY

    def _of_times(self, by_time: Sequence[Sequence[float]]) -> float:
        if len(self._times) != len(by_time[0]):
            self._times = [_Level() for _ in by_time[0]]
        total = 0.0
        for level, error, power, count in zip(self._times, *by_time, strict=True):
            if count:
                reference = power / count if level.lowest is None else level.lowest
                total += error / max(reference, _TINY)
                level.note(error / count, count, _SMOOTH_IN_TIME, _SETTLE_IN_TIME)
        relative = min(total / sum(by_time[2]), _MOST)
        return self.excess + _SMOOTH * (relative - self.excess)


class StallMonitor:
    """Tells on standard error when a step takes far longer than the ones before, and where it is.

    It ends nothing: a step may be slow because a disk or another process is, and go on.

    Args:
        least: seconds that any step may take.
        slower: times the mean of the steps so far, beyond which one is told about.
        say: what tells.
    """

    def __init__(
        self,
        least: float = _LEAST_SECONDS,
        slower: float = _TIMES_SLOWER,
        say: Callable[[str], object] = lambda text: print(text, file=sys.stderr, flush=True),
    ) -> None:
        self.least = least
        self.slower = slower
        self.say = say
        self._thread = threading.get_ident()
        self._mean = 0.0
        self._done = 0

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """A block that is step `number`."""
        allowed = max(self.least, self.slower * self._mean)
        timer = threading.Timer(allowed, self._tell, (number, allowed))
        timer.daemon = True
        started = time.monotonic()
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
        self._done += 1
        self._mean += (time.monotonic() - started - self._mean) / self._done

    def _tell(self, number: int, allowed: float) -> None:
        usual = f", the steps before took {self._mean:.2g} s" if self._done else ""
        self.say(
            f"step {number} has taken {clock(allowed)} so far{usual}; it waits in {_place(self._thread)}."
            " The run goes on if the step does; Ctrl-C twice ends it, and the same command resumes from the last state"
        )


def _place(thread: int) -> str:
    """The innermost line of ours that a thread is in, and what it called."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return "a thread that has ended"
    lines = traceback.extract_stack(frame)
    root = Path(__file__).parents[1]
    mine = [line for line in lines if Path(line.filename).is_relative_to(root)]
    told = [f"{Path(line.filename).name}:{line.lineno} ({line.name})" for line in (mine[-1:] or []) + lines[-1:]]
    return " -> ".join(dict.fromkeys(told))
