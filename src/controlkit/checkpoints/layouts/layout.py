"""The contract of a layout: one way of writing a control into a file or a folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from controlkit.checkpoints.content import Content, Options
from controlkit.checkpoints.recognise import Found


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One layout, as data: what it carries, and how it is read and written."""

    name: str
    says: str
    """In a few words, for lists and errors."""
    reads: Callable[[Found, Options], Content] | None = None
    """Raises `UserError` where names, shapes or what it needs besides do not fit."""
    writes: Callable[[Content, Path, Options], list[str]] | None = None
    """Write a content to a path; returns notes on what had no place. Raises `UserError` where it cannot."""
    kinds: tuple[str, ...] = ()
    """Kinds of content that it can be written from."""
    files: tuple[str, ...] = ()
    """Names of the files that are written into its folder; none if it is one file."""

    @property
    def folder(self) -> bool:
        """Whether it is a folder instead of a file."""
        return bool(self.files)

    def written(self, out: Path) -> list[Path]:
        """The files that writing to `out` makes."""
        return [out / name for name in self.files] or [out]
