"""How verbs show what they made: tables for people, one JSON object for programs."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse


def add_json(parser: argparse.ArgumentParser) -> None:
    """The `--json` switch."""
    parser.add_argument("--json", action="store_true", default=False, help="print one JSON object on standard output")


def print_json(value: Any) -> None:
    """One JSON object on standard output."""
    print(json.dumps(_with_null(value), default=str, allow_nan=False))


def _with_null(value: Any) -> Any:
    """`value` with null in place of numbers that JSON has not."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _with_null(inner) for key, inner in value.items()}
    return [_with_null(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def print_notes(notes: Sequence[str]) -> None:
    """What a person should know about a result, on standard error."""
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on standard output; the first column is left-aligned."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title), title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    Console().print(table)


def print_facts(title: str, facts: Sequence[tuple[str, str]]) -> None:
    """What is known about one thing, a line each, on standard output."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title), title_justify="left", show_header=False)
    for name, told in facts:
        table.add_row(escape(name), escape(told))
    Console().print(table)


def print_seconds(seconds: dict[str, float]) -> None:
    """Where the time went."""
    total = sum(seconds.values())
    rows = [(name, f"{value:.2f}", f"{value / total:.0%}") for name, value in seconds.items()]
    print_table("Where the time went", ("part", "seconds", "share"), [*rows, ("all", f"{total:.2f}", "100%")])
