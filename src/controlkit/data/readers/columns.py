"""Which columns of a table hold images, condition images and captions: found by common names, or named by the user."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from controlkit.errors import UserError, nearest

IMAGE_COLUMNS = ("image", "target", "picture", "jpg", "file_name", "image_file_name")
"""What a column of images is called, in lower case, the likeliest first."""
CAPTION_COLUMNS = (
    *("text", "prompt", "caption", "captions", "prompts", "texts", "txt", "description", "descriptions"),
    *("blip_caption", "image_caption", "text_prompt", "caption_text", "long_caption", "short_caption", "sentence"),
)
"""The same of captions. JSON files in tar shards use these as keys."""

_SHOWN = 80


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Columns of a table (JSON lines, CSV, Parquet) that the user names; None is found by its name."""

    image: str | None = None
    conditioning_image: str | None = None
    caption: str | None = None

    @property
    def named(self) -> dict[str, str]:
        """Option -> column, of those that are named."""
        both = {f"{option}_column": name for option, name in vars(self).items()}
        return {option: name for option, name in both.items() if name is not None}

    def check(self, origin: object, known: Sequence[str]) -> None:
        """Refuse columns that the table at `origin` does not have.

        Raises:
            UserError: lists the columns that there are.
        """
        for option, name in self.named.items():
            if known and name not in known:
                raise UserError(
                    f"{option} is {name!r}, and {origin} has no such column; its columns are {', '.join(known)}"
                    f"{close(name, known)}"
                )

    def refuse(self, origin: object, what: str) -> None:
        """Refuse columns for pairs that are no table.

        Raises:
            UserError: a column is named.
        """
        for option, name in self.named.items():
            raise UserError(
                f"{option} is {name!r}, but {origin} is read as {what}, which has no columns; columns are those of JSON"
                " lines, CSV and Parquet. Leave the option out, or give the path of the table itself"
            )

    def caption_notes(self, origin: object, known: Sequence[str]) -> list[str]:
        """What to tell of the captions of a table with these columns, if none are named."""
        if self.caption is not None or not known:
            return []
        found = all_of(CAPTION_COLUMNS, known)
        if not found:
            return [
                f"{origin} has no column called {', '.join(CAPTION_COLUMNS[:3])} or the like, so every prompt is empty;"
                f" name the one with captions: --caption-column (its columns are {', '.join(known)})"
            ]
        if len(found) > 1:
            others = ", then ".join(map(repr, found[1:]))
            return [
                f"captions of {origin} are read from {found[0]!r}, where it is empty from {others}; choose one with"
                " --caption-column"
            ]
        return []


ANY_COLUMNS = Columns()


def first_of(wanted: Sequence[str], known: Iterable[str]) -> str | None:
    """The first of `wanted` that is among `known`, as it is written there; capital letters do not count."""
    found = all_of(wanted, known)
    return found[0] if found else None


def all_of(wanted: Sequence[str], known: Iterable[str]) -> list[str]:
    """All of `known` that are called one of `wanted`, in the order of `wanted`."""
    by_name: dict[str, list[str]] = {}
    for name in known:
        by_name.setdefault(str(name).lower(), []).append(name)
    return [name for one in wanted for name in by_name.get(one, [])]


def captions_in(entry: Mapping[str, Any]) -> Any:
    """What the first column of captions that is not empty holds; None if there is none."""
    return next((entry[name] for name in all_of(CAPTION_COLUMNS, entry) if entry[name] not in (None, "", [])), None)


def captions_of(value: Any) -> tuple[str, ...]:
    """The captions in one cell: its text, the texts of a list, or one empty caption where there is none.

    Raises:
        UserError: it is neither text nor a list of texts.
    """
    if value is None:
        return ("",)
    if isinstance(value, str):
        return (value,)
    if isinstance(value, (list, tuple)) and all(isinstance(one, str) for one in value):
        return tuple(value) or ("",)
    shown = repr(value)
    shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
    raise UserError(f"its caption is {shown}; expected text, or a list of texts")


def close(name: str, known: Sequence[str]) -> str:
    """`; did you mean a?` where a known name is near, else nothing."""
    guess = nearest(name, list(known))
    return guess if "did you mean" in guess else ""
