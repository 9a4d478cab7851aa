"""Progress of long work on standard error, with the time left."""

from __future__ import annotations

import sys
import time

_INTERVAL, _INTERVAL_PLAIN = 0.5, 10.0
"""Seconds between two updates, on a terminal and elsewhere."""
_SILENT = 3.0
"""Seconds of work that show nothing."""

_verbose = False
_line_open = False


def set_verbose(verbose: bool) -> None:
    """Show progress also where standard error is not a terminal."""
    global _verbose
    _verbose = verbose


def is_verbose() -> bool:
    """Whether `set_verbose` is on."""
    return _verbose


def end_line() -> None:
    """End a progress line that was interrupted, so that other output starts on its own line."""
    global _line_open
    if _line_open:
        print(file=sys.stderr, flush=True)
    _line_open = False


class Progress:
    """Reports `12 of 60 images, 3/s, 0:16 left` for work of more than a few seconds.

    Args:
        what: the unit of the work, in the plural.
        total: how much there is; may also be given with each report.
        always: report also without a terminal and for short work. Otherwise standard error has to be a terminal, or
            `set_verbose` on.
    """

    def __init__(self, what: str, total: int = 0, *, always: bool = False) -> None:
        self._what = what
        self._total = total
        self._done = 0
        self._always = always
        self._live = sys.stderr.isatty()
        self._shown = self._live or always or _verbose
        self._started = self._reported = time.monotonic()
        self._first = -1

    def __call__(self, done: int, total: int | None = None) -> None:
        """Report that `done` of `total` are finished."""
        global _line_open
        total = self._total if total is None else total
        now, finished = time.monotonic(), done >= total
        if self._first < 0:  # the pace does not include loading, nor what an earlier run finished
            self._first, self._started = done, now
        self._done = done
        seconds = now - self._started
        if not self._shown or (not self._always and seconds < _SILENT):
            return
        if now - self._reported < (_INTERVAL if self._live else _INTERVAL_PLAIN) and not finished:
            return
        self._reported = now
        pace = (done - self._first) / max(seconds, 1e-9)
        left = f", {_rate(pace)}, {clock((total - done) / pace)} left" if pace and not finished else ""
        start, end = ("\r", "" if not finished else "\n") if self._live else ("", "\n")
        # The spaces cover what remains of a longer line.
        spaces = " " * 8 if self._live else ""
        print(f"{start}{done} of {total} {self._what}{left}{spaces}", end=end, file=sys.stderr, flush=True)
        _line_open = end == ""

    def advance(self, count: int = 1) -> None:
        """Report `count` more."""
        self(self._done + count)


def clock(seconds: float) -> str:
    """`0:16`, or `1:02:03` from an hour on."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


def _rate(pace: float) -> str:
    return f"{pace:.0f}/s" if pace >= 1 else f"{1 / pace:.1f} s each"
