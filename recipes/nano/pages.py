"""The figures of nano, of speed and of memory in the pages, written from the JSON files in benchmarks/results.

A page marks a figure by comments:

    right for <!-- nano:base.top5 -->0.66<!-- /nano --> of the prompts

    <!-- nano:canny.table -->

    | ... |

    <!-- /nano -->

`figures.FIGURES` says what belongs between them. A figure whose JSON file is not there yet stays as it is.
"""

from __future__ import annotations

import re
from pathlib import Path

from figures import FIGURES
from results import Missing, Results

from controlkit.errors import UserError, nearest

PAGES = ("README.md", "docs/*.md", "src/controlkit/assets/nano/README.md")
"""Pages with figures, relative to the root of the repository."""

_OPEN = re.compile(r"<!-- nano:")
_MARK = re.compile(r"<!-- nano:(?P<name>[^ ]+) -->(?P<text>.*?)<!-- /nano -->", re.DOTALL)


def render(text: str, results: Results, page: str = "the page") -> tuple[str, list[str]]:
    """`text` with its figures as the results have them, and the names of those that have no results yet.

    Raises:
        UserError: a mark names no figure, is not closed, or begins a line inside a paragraph.
    """
    if len(_OPEN.findall(text)) != len(_MARK.findall(text)) or text.count("<!-- /nano -->") != len(_MARK.findall(text)):
        raise UserError(f"{page}: a mark of a figure is not closed, or closed without being opened", "bad-data")
    missing: list[str] = []

    def fill(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in FIGURES:
            raise UserError(f"{page}: no figure is called {name!r}{nearest(name, list(FIGURES))}", "unknown-name")
        figure = FIGURES[name]
        if not figure.block and text[: match.start()].rpartition("\n")[2].strip() == "":
            # GitHub reads a line that begins with a comment as HTML, without the markdown in it.
            raise UserError(f"{page}: the figure {name} begins a line; put a word before it", "bad-data")
        try:
            return f"<!-- nano:{name} -->{figure.text(results)}<!-- /nano -->"
        except Missing:
            missing.append(name)
            return match[0]

    return _MARK.sub(fill, text), missing


def marked(text: str) -> bool:
    """Whether a page has figures."""
    return _OPEN.search(text) is not None


def without_figures(text: str) -> str:
    """A page with the names of its figures in their place."""
    return _MARK.sub(lambda match: f"<!-- nano:{match['name']} -->", text)


def pages(root: Path) -> list[Path]:
    """The pages that may have figures."""
    return [path for pattern in PAGES for path in sorted(root.glob(pattern))]


def changed_figures(before: str, after: str) -> list[str]:
    """`name: before -> after` of the figures of a page that differ; tables by their name alone."""
    old, new = ([(m["name"], m["text"].strip()) for m in _MARK.finditer(text)] for text in (before, after))
    return [
        f"{name}: {was} -> {now}" if "\n" not in was + now else f"{name}: table"
        for (name, was), (_, now) in zip(old, new, strict=True)
        if was != now
    ]
