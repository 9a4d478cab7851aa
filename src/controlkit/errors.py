"""`UserError`, the error for anything the user can fix, and its stable codes."""

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
    "upload-failed",
    "usage",
    "would-overwrite",
    "write-failed",
    "wrong-kind",
    "wrong-size",
    "wrong-type",
]
"""Stable names for scripts; docs/errors.md explains each."""

CODES: tuple[Code, ...] = get_args(Code)


class UserError(Exception):
    """Invalid input that the user can fix.

    Args:
        message: one sentence, or one per line: what was given, what was expected, what to do. The command line prints
            it without a traceback and exits with code 2.
        code: the kind of error. It stays the same when the wording changes.
    """

    def __init__(self, message: str, code: Code) -> None:
        super().__init__(message)
        self.code = code

    def __reduce__(self) -> tuple[type[UserError], tuple[str, Code]]:
        return type(self), (str(self), self.code)  # by default, unpickling in another process loses the code


class Interrupted(KeyboardInterrupt):
    """Work that Ctrl-C or SIGTERM stopped, saved, and that the same call resumes.

    Args:
        message: as of `UserError`.
        signal: number of the signal. The command line exits with 128 + signal.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.signal)


def reason_of(error: Exception) -> str:
    """What is wrong with an entry that could not be read, without Python's terms."""
    if isinstance(error, KeyError):
        return f"there is no {error.args[0]!r}"
    if isinstance(error, TypeError | AttributeError):
        return "a value has another type"
    return str(error)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means out of memory; on the CPU torch raises a plain RuntimeError."""
    # By name: this is also called where torch has not been imported.
    accelerator = type(error).__name__ == "OutOfMemoryError"
    return accelerator or isinstance(error, MemoryError) or "can't allocate memory" in str(error)


def nearest(name: str, known: list[str] | tuple[str, ...]) -> str:
    """``'; did you mean a, b?'`` for names close to `name`, else all known names."""
    from difflib import get_close_matches

    close = get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return f"; did you mean {', '.join(close)}?"
    return f"; known: {', '.join(sorted(known))}" if known else ""
