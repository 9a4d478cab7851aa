"""What watches over a run: a loss that explodes, and a step that does not end."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from controlkit.training.log import clock

_SMOOTH = 0.05
"""Weight of a new loss in the running mean: about the last forty steps count."""
_SETTLE = 50
"""Steps before the running mean says anything."""
_FEW, _EXPLODED_EARLY = 10, 20.0
"""Until then, the mean of at least so many steps must rise by more to be told from chance."""
_RISEN, _EXPLODED = 2.0, 5.0
"""Of the lowest running mean so far. The loss of single steps of a diffusion model varies by more than that (it depends
on the times that were drawn), their running mean does not."""

_LEAST_SECONDS = 120.0
_TIMES_SLOWER = 20.0


class LossWatch:
    """The running mean of a loss, and whether it has exploded."""

    def __init__(self, step: int) -> None:
        """Start at `step`, with no history: an explosion is judged by what this process saw."""
        self.calm = step
        """Steps done when the mean was last near its lowest."""
        self.mean = 0.0
        self.lowest = float("inf")
        self._early = float("inf")
        self._seen = 0

    def exploded(self, loss: float, done: int) -> bool:
        """Note the loss of the step after which `done` steps are done; whether it is far above what it was."""
        self._seen += 1
        weight = max(_SMOOTH, 1 / self._seen)
        self.mean += weight * (loss - self.mean)
        if self._seen < _SETTLE:
            self.calm = done
            if self._seen >= _FEW:
                self._early = min(self._early, self.mean)
            return self.mean > _EXPLODED_EARLY * self._early
        self.lowest = min(self.lowest, self.mean)
        if self.mean <= _RISEN * self.lowest:
            self.calm = done
        return self.mean > _EXPLODED * self.lowest


class Patience:
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
