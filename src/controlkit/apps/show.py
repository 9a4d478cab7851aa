"""How verbs show what they made: tables for people, one JSON object for programs."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse

    from controlkit.data.readers.columns import Columns

_COLUMNS = {
    "image_column": "images",
    "conditioning_image_column": "condition images",
    "caption_column": "captions",
}


def add_json(parser: argparse.ArgumentParser) -> None:
    """The `--json` switch."""
    parser.add_argument("--json", action="store_true", default=False, help="print one JSON object on standard output")


def add_columns(parser: argparse.ArgumentParser) -> None:
    """The columns of pairs that are a table; they are found by name where none are named."""
    for option, what in _COLUMNS.items():
        name = f"--{option.replace('_', '-')}"
        parser.add_argument(name, metavar="NAME", help=f"column of {what}, in JSON lines, CSV or Parquet")


def named_columns(args: argparse.Namespace) -> dict[str, str]:
    """Option -> column, of those that are named."""
    return {option: getattr(args, option) for option in _COLUMNS if hasattr(args, option)}


def columns_of(args: argparse.Namespace) -> Columns:
    """The columns that are named, as readers of pairs take them."""
    from controlkit.data.readers.columns import Columns

    return Columns(**{option.removesuffix("_column"): name for option, name in named_columns(args).items()})


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
