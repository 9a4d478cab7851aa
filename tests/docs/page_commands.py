"""The shell commands of the pages: fenced `bash` blocks, and code spans that begin with `controlkit`.

A block may be annotated by a comment in the line above it:

    <!-- not run: needs 6 GB of weights -->    parsed, never run
    <!-- slow: trains for a minute -->         run with `pytest -m slow`
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "recipes/nano/README.md", *sorted(ROOT.glob("docs/*.md"))]

_BLOCK = re.compile(
    r"^(?:<!-- (?P<mark>not run|slow): (?P<reason>.+?) -->\n)?```(?:bash|sh|shell|console)\n(?P<text>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
_FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
_SPAN = re.compile(r"`((?:controlkit|python) [^`]+)`")


@dataclass(frozen=True)
class Block:
    """A fenced block of shell commands.

    Attributes:
        line: of its first command, counted from 1.
        mark: `not run`, `slow`, or None for a block that every run of the tests executes.
    """

    page: Path
    line: int
    text: str
    mark: str | None = None
    reason: str | None = None


def blocks(page: Path) -> list[Block]:
    """The shell blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text[: match.start("text")].count("\n") + 1, match["text"], match["mark"], match["reason"])
        for match in _BLOCK.finditer(text)
    ]


def commands(text: str) -> list[list[str]]:
    """Shell text -> the words of each simple command, without comments, operators and variable assignments."""
    found: list[list[str]] = []
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if not set(word) <= set(lexer.punctuation_chars):
                words.append(word)
                continue
            while words and re.match(r"^[A-Z_]+=", words[0]):
                words.pop(0)
            if words:
                found.append(words)
            words = []
    return found


def page_commands(page: Path) -> list[tuple[int, list[str]]]:
    """Every command of a page with its line: those of its blocks, and of code spans in the text."""
    found = [(block.line, words) for block in blocks(page) for words in commands(block.text)]
    prose = _FENCED.sub(lambda match: "\n" * match[0].count("\n"), page.read_text(encoding="utf-8"))
    for match in _SPAN.finditer(prose):
        words = shlex.split(match[1].replace("\n", " "))
        if words[0] == "python" or len(words) > 2:  # not the name of a verb alone
            found.append((prose[: match.start()].count("\n") + 1, words))
    return found
