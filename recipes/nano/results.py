"""The JSON files in benchmarks/results/nano, and text made from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from controlkit.files import read_json


class Missing(Exception):
    """There is no such result yet."""


class Results:
    """The JSON files of results: `runs` maps a label to a command and its reports.

    Args:
        folder: of the files.
        benchmarks: folder of the results of benchmarks; default: the one that `folder` is in.
    """

    def __init__(self, folder: Path, benchmarks: Path | None = None) -> None:
        self.folder = folder
        self.benchmarks = folder.parent if benchmarks is None else benchmarks
        self._files: dict[str, Any] = {}

    def run(self, file: str, label: str = "default") -> Mapping[str, Any]:
        """One command's entry.

        Raises:
            Missing: it was not run yet.
        """
        if file not in self._files:
            path = self.folder / f"{file}.json"
            if not path.is_file():
                raise Missing(file)
            self._files[file] = read_json(path)["runs"]
        if label not in self._files[file]:
            raise Missing(f"{file}, {label}")
        entry: Mapping[str, Any] = self._files[file][label]
        return entry

    def labels(self, file: str) -> list[str]:
        """Labels of a file's runs, in order."""
        path = self.folder / f"{file}.json"
        if not path.is_file():
            raise Missing(file)
        return list(read_json(path)["runs"])

    def report(self, file: str, label: str = "default", index: int = 0) -> Mapping[str, Any]:
        """One report of a command."""
        found: Mapping[str, Any] = self.run(file, label)["reports"][index]
        return found

    def base_of(self, file: str) -> str | None:
        """Fingerprint of the base that a file's figures were measured on, where its settings say it."""
        for label in self.labels(file):
            for report in self.run(file, label)["reports"]:
                if (base := report.get("settings", {}).get("base")) is not None:
                    return str(base["fingerprint"])
        return None


@dataclass(frozen=True)
class Figure:
    """Text that is made from results."""

    file: str
    """The JSON file that it is about."""
    make: Callable[[Results], str]
    block: bool = False
    """Whether it stands in lines of its own."""

    def text(self, results: Results) -> str:
        """What belongs between the marks; figures of an earlier base say so.

        Raises:
            Missing: a result is not there.
        """
        base, now = results.base_of(self.file), results.base_of("base")
        if not self.block:
            return f"{self.make(results)}{' (earlier nano weights)' if base != now else ''}"
        earlier = f"\n\nMeasured with earlier weights of nano (base {base})." if base != now else ""
        return f"\n\n{self.make(results)}{earlier}\n\n"


@dataclass(frozen=True)
class Speed:
    """Text that is made from results of benchmarks, which do not depend on nano's weights."""

    make: Callable[[Results], str]
    block: bool = False
    """Whether it stands in lines of its own."""
    file: str = "benchmarks"
    """What `Figure.file` is for others."""

    def text(self, results: Results) -> str:
        """What belongs between the marks.

        Raises:
            Missing: a result is not there.
        """
        return f"\n\n{self.make(results)}\n\n" if self.block else self.make(results)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table."""

    def line(cells: Sequence[str]) -> str:
        return f"|{'|'.join(f' {cell} ' if cell else ' ' for cell in cells)}|"

    return "\n".join((line(head), "|---" * len(head) + "|", *map(line, rows)))


def rounded(value: float | None, digits: int) -> str:
    """A number with so many decimals; empty for None."""
    return "" if value is None else f"{value:z.{digits}f}"


def two(value: float | None) -> str:
    """Two decimals; empty for None."""
    return rounded(value, 2)


def three(value: float | None) -> str:
    """Three decimals; empty for None."""
    return rounded(value, 3)


def measure_of(report: Mapping[str, Any], name: str) -> tuple[str, int]:
    """What a control's rows in a report of several measure, and the decimals that it is told with."""
    measure = next(str(row[1]) for row in report["rows"] if row[0].startswith(f"{name},")).partition(" (")[0]
    return measure, 2 if "PSNR" in measure or "distance" in measure else 3


def report_titled(results: Results, file: str, start: str) -> Mapping[str, Any]:
    """The report whose title begins so."""
    found: Mapping[str, Any] = next(
        report for report in results.run(file)["reports"] if report["title"].startswith(start)
    )
    return found
