"""Columns of a table with images, condition images and captions: found by common names, or named by the user."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from controlkit.errors import UserError, nearest

IMAGE_COLUMNS = ("image", "target", "picture", "jpg", "file_name", "image_file_name")
"""Names of image columns, in lower case, likeliest first."""
CAPTION_COLUMNS = (
    *("text", "prompt", "caption", "captions", "prompts", "texts", "txt", "description", "descriptions"),
    *("blip_caption", "image_caption", "text_prompt", "caption_text", "long_caption", "short_caption", "sentence"),
)
"""Names of caption columns, and of keys in JSON files of tar shards."""

_SHOWN = 80


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Column names of a table (JSON lines, CSV, Parquet); None: found by common names."""

    image: str | None = None
    conditioning_image: str | None = None
    caption: str | None = None

    @property
    def named(self) -> dict[str, str]:
        """Option -> column, of the columns that are set."""
        return {f"{option}_column": name for option, name in vars(self).items() if name is not None}

    def check(self, origin: object, known: Sequence[str]) -> None:
        """Reject columns that the table at `origin` does not have.

        Raises:
            UserError: lists the existing columns.
        """
        for option, name in self.named.items():
            if known and name not in known:
                raise UserError(
                    f"{option} is {name!r}, but {origin} has no such column; its columns are {', '.join(known)}"
                    f"{close(name, known)}",
                    "unknown-name",
                )

    def reject(self, origin: object, layout: str) -> None:
        """Reject column names for a layout without columns.

        Raises:
            UserError: a column is named.
        """
        for option, name in self.named.items():
            raise UserError(
                f"{option} is {name!r}, but {origin} is read as {layout}, which has no columns; leave the option out,"
                " or pass the path of a table (JSON lines, CSV, Parquet)",
                "contradiction",
            )

    def caption_notes(self, origin: object, known: Sequence[str]) -> list[str]:
        """Notes on missing or ambiguous caption columns, unless one is named."""
        if self.caption is not None or not known:
            return []
        found = all_of(CAPTION_COLUMNS, known)
        if not found:
            return [
                f"{origin} has no column called {', '.join(CAPTION_COLUMNS[:3])} or similar, so all prompts are empty;"
                f" pass --caption-column NAME (its columns are {', '.join(known)})"
            ]
        if len(found) > 1:
            others = ", then ".join(map(repr, found[1:]))
            return [
                f"captions of {origin} are read from {found[0]!r}, and where it is empty from {others}; choose one with"
                " --caption-column"
            ]
        return []


ANY_COLUMNS = Columns()


def first_of(wanted: Sequence[str], known: Iterable[str]) -> str | None:
    """The first of `wanted` in `known`, as spelled there; case is ignored."""
    found = all_of(wanted, known)
    return found[0] if found else None


def all_of(wanted: Sequence[str], known: Iterable[str]) -> list[str]:
    """All names of `known` that are in `wanted`, in the order of `wanted`; case is ignored."""
    by_name: dict[str, list[str]] = {}
    for name in known:
        by_name.setdefault(str(name).lower(), []).append(name)
    return [name for lower in wanted for name in by_name.get(lower, [])]


def captions_in(entry: Mapping[str, Any]) -> Any:
    """The value of the first non-empty caption column; None if there is none."""
    found = (entry[name] for name in all_of(CAPTION_COLUMNS, entry))
    return next((value for value in found if value not in (None, []) and str(value).strip()), None)


def captions_of(value: Any) -> tuple[str, ...]:
    """The captions in one cell: its text, or a list of texts; one empty caption if there is none.

    Raises:
        UserError: it is neither text nor a list of texts.
    """
    if value is None:
        return ("",)
    if isinstance(value, str):
        return (value,)
    if isinstance(value, (list, tuple)) and all(isinstance(text, str) for text in value):
        return tuple(value) or ("",)
    shown = repr(value)
    shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
    raise UserError(f"its caption is {shown}; expected text, or a list of texts", "bad-data")


def close(name: str, known: Sequence[str]) -> str:
    """`; did you mean a?` for close names, else nothing."""
    guess = nearest(name, list(known))
    return guess if "did you mean" in guess else ""
