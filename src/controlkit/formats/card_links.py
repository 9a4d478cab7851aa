"""Local files that a model card, in Markdown with HTML, links to."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from urllib.parse import unquote, urlsplit

_TEXT = r"\[(?:[^\[\]]|\[[^\[\]]*\])*\]"
_TARGET = r"""\(\s*(<[^<>\n]*>|(?:[^()\n]|\([^()\n]*\))+?)(?:\s+(?:"[^"]*"|'[^']*'))?\s*\)"""
_IMAGE = re.compile("!" + _TEXT + _TARGET)
_LINK = re.compile("(?<!!)" + _TEXT + _TARGET)
_TAG = re.compile(r"""<img\b[^>]*?\ssrc\s*=\s*(?:"([^"]*)"|'([^']*)'|([^\s"'>]+))""", re.IGNORECASE)


def images_in(text: str) -> list[str]:
    """Paths of the local images that a card shows: `![alt](path "title")`, `![alt](<path>)` or `<img src="path">`."""
    links = [found[1] for found in _IMAGE.finditer(text)]
    links += [html.unescape(found[found.lastindex or 1]) for found in _TAG.finditer(text)]
    return list(dict.fromkeys(_local(links)))


def links_in(text: str) -> list[str]:
    """Paths of the local files that a card links to without showing them."""
    return list(dict.fromkeys(_local(found[1] for found in _LINK.finditer(text))))


def _local(links: Iterator[str] | list[str]) -> Iterator[str]:
    """The links that are paths, decoded (`%20` is a space)."""
    for link in links:
        try:
            parts = urlsplit(link.removeprefix("<").removesuffix(">"))
        except ValueError:  # `http://[`
            continue
        path = unquote(parts.path)
        if path and not parts.scheme and not parts.netloc and "\0" not in path:
            yield path
