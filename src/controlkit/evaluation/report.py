"""`Report`: a table with notes and settings, as JSON, Markdown and for the terminal."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from controlkit.errors import UserError
from controlkit.files import read_json

if TYPE_CHECKING:
    from rich.table import Table


Row = tuple[str | int | float | None, ...]
"""The first entry names the row; None and NaN are numbers that do not exist, shown as `-`."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """One table of an evaluation."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    """Remarks under the table."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Numbers of the table by name, for programs."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings that the numbers depend on, as plain values: base, control, sets, sampling, device, versions."""
    images: tuple[dict[str, Any], ...] = ()
    """Scores of single images, one row of plain values each; not part of `to_json`."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        values = asdict(self)
        del values["images"]
        return values

    def to_markdown(self) -> str:
        """As Markdown."""
        head = ["| " + " | ".join(self.columns) + " |", "|" + "---|" * len(self.columns)]
        body = ["| " + " | ".join(_show(value) for value in row) + " |" for row in self.rows]
        notes = [f"\n{note}" for note in self.notes]
        return "\n".join([f"**{self.title}**", "", *head, *body, *notes])

    def table(self) -> Table:
        """For `rich.print`; columns of text are left-aligned, those of numbers right-aligned."""
        from rich.markup import escape
        from rich.table import Table

        table = Table(title=escape(self.title), caption=escape("\n".join(self.notes)) or None, title_justify="left")
        for index, column in enumerate(self.columns):
            is_text = index == 0 or any(isinstance(row[index], str) for row in self.rows)
            table.add_column(column, justify="left" if is_text else "right", overflow="fold")
        for row in self.rows:
            table.add_row(*(escape(_show(value)) for value in row))
        return table


def read_reports(path: str | Path) -> list[Report]:
    """The reports in the output of `controlkit evaluate --json` or `controlkit adapt --json`."""
    values = read_json(Path(path))
    found = values if isinstance(values, dict) else {}
    try:
        return [Report(**report) for report in found.get("reports", [found.get("report", found)])]
    except TypeError as error:
        raise UserError(f"{path} holds no report of `controlkit evaluate --json`", "wrong-kind") from error


def gap_closed(baseline: float, value: float, ceiling: float, *, higher_is_better: bool) -> float:
    """(value - baseline) / (ceiling - baseline): 0 at the baseline, 1 at the ceiling.

    NaN if the ceiling is not better than the baseline: there is no gap, and the ratio would praise a value that is
    worse than both.

    Args:
        higher_is_better: False for distances.
    """
    gap = ceiling - baseline
    has_gap = gap > 0 if higher_is_better else gap < 0
    return (value - baseline) / gap if has_gap else math.nan  # one object, so that equal reports are equal


def _show(value: str | int | float | None) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return f"{value:,}"
    if 0 < abs(value) < 0.001:
        return f"{value:.2g}"  # a learning rate, or a difference of rounding
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}"
