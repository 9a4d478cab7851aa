"""Asking for an error by its code and the facts in it, not by its wording."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from controlkit.errors import Code, UserError


@contextmanager
def refused(code: Code | None, *facts: object) -> Iterator[pytest.ExceptionInfo[UserError]]:
    """A block that ends with a `UserError` of this code, whose message has all the facts: paths, numbers, names.

    None stands for any code.
    """
    with pytest.raises(UserError) as caught:
        yield caught
    check(f"{caught.value} [{caught.value.code}]", code, *facts)


def check(said: str, code: Code | None, *facts: object) -> None:
    """Check an error that the command line printed, as `refused` does."""
    assert code is None or f"[{code}]" in said, said
    for fact in facts:
        assert str(fact) in said, (fact, said)
