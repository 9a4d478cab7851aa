"""Output of verbs: tables for people, one JSON object for programs."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from controlkit.errors import UserError

if TYPE_CHECKING:
    import argparse

    from controlkit.data.readers.columns import Columns

_COLUMNS = {
    "image_column": "images",
    "conditioning_image_column": "condition images",
    "caption_column": "captions",
}


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add `--json`."""
    parser.add_argument("--json", action="store_true", default=False, help="print one JSON object on standard output")


def add_columns(parser: argparse.ArgumentParser) -> None:
    """Add options for the columns of pairs in tables; by default they are found by name."""
    for option, what in _COLUMNS.items():
        name = f"--{option.replace('_', '-')}"
        parser.add_argument(name, metavar="NAME", help=f"column of {what}, in JSON lines, CSV or Parquet")


def named_columns(args: argparse.Namespace) -> dict[str, str]:
    """Option -> column, for the options on the command line."""
    return {option: getattr(args, option) for option in _COLUMNS if hasattr(args, option)}


def columns_of(args: argparse.Namespace) -> Columns:
    """The columns on the command line, for readers of pairs."""
    from controlkit.data.readers.columns import Columns

    return Columns(**{option.removesuffix("_column"): name for option, name in named_columns(args).items()})


def print_json(value: Any) -> None:
    """Print one JSON object on standard output."""
    from controlkit.files import with_null

    print(json.dumps(with_null(value), default=str, allow_nan=False))


class Reported(UserError):
    """An error that the verb's JSON object holds, so that no second object is printed."""


def error_json(error: UserError) -> dict[str, str | None]:
    """An error as `--json` prints it, under `error`."""
    return {"code": error.code, "message": str(error)}


def print_notes(notes: Sequence[str]) -> None:
    """Print notes on a result on standard error."""
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on standard output; columns of numbers are right-aligned."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title), title_justify="left")
    for index, column in enumerate(columns):
        numbers = index > 0 and all(_NUMBER.fullmatch(row[index]) for row in rows)
        table.add_column(column, justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    Console().print(table)


_NUMBER = re.compile(r"[-+]?[\d.,]+(e[-+]?\d+)?( ?%)?|-|", re.IGNORECASE)


def print_facts(title: str, facts: Sequence[tuple[str, str]]) -> None:
    """Print facts about one thing on standard output, one per line."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title), title_justify="left", show_header=False)
    for name, fact in facts:
        table.add_row(escape(name), escape(fact))
    Console().print(table)


def print_seconds(seconds: dict[str, float]) -> None:
    """Print a table of wall-clock times."""
    total = sum(seconds.values())
    rows = [(name, f"{value:.2f}", f"{value / total:.0%}") for name, value in seconds.items()]
    print_table("Time", ("part", "seconds", "share"), [*rows, ("total", f"{total:.2f}", "100%")])
