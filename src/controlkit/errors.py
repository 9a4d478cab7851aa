"""The one error that is a person's to fix."""


class UserError(Exception):
    """Something that was given cannot be used; the message is one plain sentence (or one a line).

    Every message says what was given, what was expected, and what to do next. The command line prints it
    without a traceback and exits with code 2.
    """


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
