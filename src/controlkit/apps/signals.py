"""Ctrl-C and SIGTERM: exit codes 130 and 143, without a traceback."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(KeyboardInterrupt):
    """SIGTERM; code that cleans up after Ctrl-C cleans up after it, too."""


@contextmanager
def interruptible(*, restore: bool) -> Iterator[None]:
    """Raise `KeyboardInterrupt` or `Terminated` at the first signal, and end the process at the second.

    Args:
        restore: put the handlers back at the end. A program that is about to exit keeps them, so that a second Ctrl-C
            ends the interpreter's shutdown quietly.
    """
    received = False

    def handle(number: int, _frame: FrameType | None) -> None:
        nonlocal received
        if received:
            os._exit(128 + number)
        received = True
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    before = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                before[number] = signal.signal(number, handle)
    except ValueError:  # not the main thread: the caller handles signals
        pass
    try:
        yield
    finally:
        for number, handler in before.items() if restore else ():
            signal.signal(number, handler)
