"""Prompt syntax of A1111: weights, escapes, and `BREAK`. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

from controlkit.errors import UserError, nearest

SYNTAXES = ("plain", "weighted")
"""How a prompt is read: as it stands, or with weights, escapes and `BREAK`."""
STRONGER, WEAKER = 1.1, 1 / 1.1
"""Factors of a pair of round and of square brackets."""

_TOKEN = re.compile(
    r"\\(?P<escaped>[()\[\]\\])"
    r"|(?P<open>[(\[])"
    r"|:\s*(?P<weight>[+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*\)"
    r"|(?P<close>[)\]])"
    r"|(?:(?<!\s)\s+)?\b(?P<stop>BREAK)\b\s*"  # white space is tried from its start only: in linear time
)
_ESCAPED = re.compile(r"\\[()\[\]\\]")
_OTHER_SYNTAX = (
    (re.compile(r"<(?:lora|lyco)\s*:[^>]*>"), "use --lora FILE@WEIGHT in place of it"),
    (re.compile(r"<hypernet\s*:[^>]*>"), "hypernetworks are not supported; remove it"),
    (re.compile(r"\[[^\[\]|]*\|[^\[\]]*\]"), r"alternating words are not supported; escape the brackets (\[ \])"),
    (
        re.compile(r"\[[^\[\]]*:\s*[\d.]+\s*\]"),
        r"prompt editing is not supported; escape the brackets (\[ \]), or write (word:weight) for a weight",
    ),
    (re.compile(r"\bAND\b"), "composing several prompts is not supported; write 'and'"),
)
"""Syntax of A1111 that would be read as something else, and what to do."""


@dataclass(frozen=True)
class Span:
    """Words of one weight."""

    text: str
    weight: float


def check_syntax(syntax: str) -> None:
    """Check the name of a syntax.

    Raises:
        UserError: it is none of `SYNTAXES`.
    """
    if syntax not in SYNTAXES:
        raise UserError(f"there is no prompt syntax {syntax!r}{nearest(syntax, SYNTAXES)}", "unknown-name")


def parse_weighted(prompt: str) -> list[list[Span]]:
    r"""Parse a weighted prompt.

    `(words)` multiplies their weight by 1.1, `[words]` divides it by 1.1, `(words:1.3)` multiplies it by 1.3; brackets
    nest. `\(`, `\)`, `\[`, `\]` and `\\` are the characters themselves. Brackets that never close act to the end, and
    closing ones without a partner are text, as in A1111. `BREAK` ends a chunk.

    Returns:
        The parts between `BREAK`s, each as its spans.

    Raises:
        UserError: the prompt has syntax of A1111 that is not supported, such as `[from:to:0.5]`.
    """
    _check_supported(prompt)
    texts: list[str | None] = []  # None is a BREAK
    factors: list[tuple[int, int, float]] = []  # first text, the one after the last, factor of their weights
    opened: dict[str, list[int]] = {"(": [], "[": []}
    add = texts.append

    def multiply(first: int, factor: float) -> None:
        factors.append((first, len(texts), factor))

    place = 0
    for token in _TOKEN.finditer(prompt):
        add(prompt[place : token.start()])
        place = token.end()
        kind = token.lastgroup
        if kind == "escaped":
            add(token["escaped"])
        elif kind == "stop":
            add(None)
        elif kind == "open":
            opened[token["open"]].append(len(texts))
        elif kind == "weight" and opened["("]:
            multiply(opened["("].pop(), float(token["weight"]))
        elif kind == "close" and opened[partner := "(" if token["close"] == ")" else "["]:
            multiply(opened[partner].pop(), STRONGER if partner == "(" else WEAKER)
        else:
            add(token[0])
    add(prompt[place:])
    for partner, factor in (("(", STRONGER), ("[", WEAKER)):
        for first in opened[partner]:
            multiply(first, factor)
    return _parts(texts, _products(factors, len(texts)))


def _products(factors: list[tuple[int, int, float]], count: int) -> list[float]:
    """The product of the factors of each text, in their order."""
    import numpy as np  # not with the module, which every verb's --help imports

    weights = np.ones(count)  # thousands of brackets may each have thousands of texts
    with np.errstate(over="ignore"):
        for first, end, factor in factors:
            weights[first:end] *= factor
    found: list[float] = weights.tolist()
    return found


def _check_supported(prompt: str) -> None:
    bare = _ESCAPED.sub("", prompt)
    for pattern, advice in _OTHER_SYNTAX:
        if found := pattern.search(bare):
            raise UserError(f"{found[0]!r} in the prompt: {advice}; or use prompt syntax plain", "unsupported")


def _parts(texts: list[str | None], weights: list[float]) -> list[list[Span]]:
    """Parts between breaks, with neighbours of equal weight joined, so that their words are tokenized together."""
    parts: list[list[Span]] = [[]]
    for text, weight in zip(texts, weights, strict=True):
        if text is None:
            parts.append([])
        elif not text:
            continue
        elif parts[-1] and parts[-1][-1].weight == weight:
            parts[-1][-1] = Span(parts[-1][-1].text + text, weight)
        else:
            parts[-1].append(Span(text, weight))
    return parts
