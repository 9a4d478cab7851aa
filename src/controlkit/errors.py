"""The one error that a person can fix, and its codes."""

from __future__ import annotations

from typing import Any, Literal, get_args

Code = Literal[
    "bad-data",
    "bad-image",
    "contradiction",
    "damaged-file",
    "device-unavailable",
    "diverged",
    "download-failed",
    "empty-data",
    "in-use",
    "incompatible",
    "interrupted",
    "missing-companion",
    "missing-file",
    "missing-package",
    "missing-setting",
    "missing-weights",
    "not-finite",
    "out-of-memory",
    "out-of-range",
    "plugin-failed",
    "resume-mismatch",
    "unknown-key",
    "unknown-name",
    "unreadable-file",
    "unsafe-pickle",
    "unsupported",
    "usage",
    "would-overwrite",
    "write-failed",
    "wrong-kind",
    "wrong-size",
    "wrong-type",
]
"""What went wrong, in a word that scripts can rely on; docs/errors.md explains each."""

CODES: tuple[Code, ...] = get_args(Code)


class UserError(Exception):
    """An input that cannot be used.

    Args:
        message: one plain sentence, or one a line: what was given, what was expected, what to do. The command line
            prints it without a traceback and exits with code 2.
        code: what kind of error it is. It stays the same when the wording changes.
    """

    def __init__(self, message: str, code: Code | None = None) -> None:
        super().__init__(message)
        self.code = code


class Interrupted(UserError):
    """Work that a signal stopped and that the same command resumes.

    Args:
        message: as of `UserError`.
        signal: number of the signal. The command line exits with 128 + signal.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message, "interrupted")
        self.signal = signal

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.signal)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory did not suffice; on the CPU torch says so by a plain RuntimeError."""
    # By its name, since this is used where torch has not been imported.
    accelerator = type(error).__name__ == "OutOfMemoryError"
    return accelerator or isinstance(error, MemoryError) or "can't allocate memory" in str(error)


def nearest(name: str, known: list[str] | tuple[str, ...]) -> str:
    """``'; did you mean a, b?'`` for names close to `name`, else every known name."""
    from difflib import get_close_matches

    close = get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return f"; did you mean {', '.join(close)}?"
    return f"; known: {', '.join(sorted(known))}" if known else ""
