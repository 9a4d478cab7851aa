"""What is wrong with a folder of pairs: everything at once, with how certain it is."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from controlkit.conditions import find
from controlkit.data.pairs import shapes_differ
from controlkit.data.prompts import PromptLimit, count_note, empty_note, is_empty
from controlkit.data.readers.columns import ANY_COLUMNS, Columns
from controlkit.data.readers.listing import Listing, Record
from controlkit.data.readers.recognise import read_listing
from controlkit.data.sources import ComputedCondition, Source, open_image, read_condition_image
from controlkit.data.swap_check import Verdict, find_swapped_sides
from controlkit.errors import UserError

KINDS = {
    "entry": "entries that cannot be understood",
    "file": "missing or torn files",
    "changed": "files that are not the ones that were listed",
    "size": "condition images of another shape or size than their image",
    "duplicate": "images that occur more than once",
    "prompt": "empty prompts",
    "flat": "condition images of one flat colour",
    "swapped": "condition image and image exchanged",
    "not drawn": "condition images that are not what the manifest says",
}
"""Every kind of problem."""

_ALIKE = 12.0
"""Mean difference, of 255, below which two condition images pass as the same one. Versions of OpenCV differ by less,
two images' by more."""
_FLAT = 2
"""Range of values, of 255, within which an image is one flat colour."""
_SIDE = 768
"""Longer sides are reduced to so many pixels before sides are judged."""
_SAMPLE = 48
"""Pairs of each condition that are looked at for exchanged sides where nothing says how they were made."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing to mend."""

    kind: str
    """A key of `KINDS`."""
    where: str
    text: str

    def __str__(self) -> str:
        return f"{self.where}: {self.text}"


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """All that was found."""

    origin: Path
    conditions: list[str]
    pairs: int
    problems: list[Problem]
    notes: list[str]
    """What is no problem for certain."""
    shown: list[tuple[Source, Source]]
    """Condition image and image of some pairs, those with problems first."""

    @property
    def counts(self) -> dict[str, int]:
        """How many problems there are of each kind that occurs."""
        found = Counter(problem.kind for problem in self.problems)
        return {kind: found[kind] for kind in KINDS if found[kind]}


@dataclass
class _Findings:
    """What one look at a record found."""

    problems: list[Problem] = field(default_factory=list)
    pixels: str | None = None
    forward: dict[str, bool] = field(default_factory=dict)


def check_pairs(
    path: str | Path,
    conditions: Sequence[str] = (),
    sheet: int = 12,
    *,
    columns: Columns = ANY_COLUMNS,
    limit: PromptLimit | None = None,
) -> CheckReport:
    """Look at every file of the pairs at `path`.

    Where a manifest says how a condition image was made it is made again and compared, so that exchanged sides are
    certain. Elsewhere they are judged by a sample, and the verdict says by what.

    Args:
        conditions: look at these alone.
        sheet: how many pairs to show.
        columns: names of columns, where a table (JSON lines, CSV, Parquet) has uncommon ones.
        limit: of the prompts; longer ones are counted in a note.

    Raises:
        UserError: there are no pairs at all, or a named column is not there.
    """
    listing = read_listing(path, conditions[0] if len(conditions) == 1 else None, columns)
    names = [_chosen(listing, name) for name in conditions] or listing.conditions
    # What the images of a name are: the condition that was asked for, or what the name says.
    kinds = dict(zip(names, conditions or names, strict=True))
    if not names and not listing.problems:
        raise UserError(f"{listing.origin} lists no condition images")
    problems = [_entry_problem(text) for text in listing.problems]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        seen = list(pool.map(lambda record: _look(record, kinds), listing.records))
    problems += [problem for one in seen for problem in one.problems]
    problems += _duplicates(listing.records, seen)
    notes = [*listing.notes, *listing.outside(), *_prompt_notes(listing, limit)]
    for name in names:
        verdict = _exchanged(listing, name, seen)
        if verdict is not None and verdict.certainty == "possible":
            notes.append(f"{name}: {verdict.text}")
        elif verdict is not None:
            problems.append(Problem(kind="swapped", where=name, text=verdict.text))
    bad = {problem.where for problem in problems}
    first = sorted(listing.records, key=lambda record: record.where not in bad)
    shown = [(r.conditions[name], r.image) for r in first for name in names if name in r.conditions]
    return CheckReport(
        origin=listing.origin,
        conditions=names,
        pairs=len(listing.records),
        problems=problems,
        notes=notes,
        shown=shown[:sheet],
    )


def check_sheet(report: CheckReport, cell: int = 128) -> Image.Image:
    """Condition images above their images, in rows of six; what cannot be read is red."""
    from controlkit.images import contact_sheet

    rows: list[list[Image.Image]] = []
    titles: list[str] = []
    for first in range(0, len(report.shown), 6):
        group = report.shown[first : first + 6]
        rows += [[_shown(source, cell) for source, _ in group], [_shown(target, cell) for _, target in group]]
        titles += ["condition image", "image"]
    return contact_sheet(rows or [[_shown(None, cell)]], row_titles=titles or ["nothing"], cell=cell)


def _chosen(listing: Listing, name: str) -> str:
    found = listing.chosen(name)
    if found is None:
        known = ", ".join(listing.conditions)
        raise UserError(f"{listing.origin} has no condition {name!r}; it has {known or 'none'}")
    return found


def _entry_problem(text: str) -> Problem:
    where, _, rest = text.partition(": ")
    return Problem(kind="entry", where=where if rest else "list", text=rest or text)


def _prompt_notes(listing: Listing, limit: PromptLimit | None) -> list[str]:
    told = [(record.where, text) for record in listing.records for text in record.captions]
    empty = empty_note(sum(is_empty(text) for _, text in told), len(told))
    return empty + (count_note(told, limit) if limit is not None else [])


def _look(record: Record, kinds: Mapping[str, str]) -> _Findings:
    seen = _Findings()
    if any(map(is_empty, record.captions)):
        seen.problems.append(_problem("prompt", record, "empty prompt"))
    target = _opened(record, record.image, record.recorded("sha256", "picture"), seen)
    if target is not None:
        seen.pixels = hashlib.sha256(repr(target.size).encode() + target.tobytes()).hexdigest()
    for name, kind in kinds.items():
        source = record.conditions.get(name)
        if source is None:
            seen.problems.append(_problem("file", record, f"there is no condition image {name!r}"))
            continue
        if isinstance(source, ComputedCondition) and (target is None or find(source.condition).requires is not None):
            continue  # a learned one takes too long to draw it for this alone
        image = _opened(record, source, record.recorded("sha256", "conditions", name), seen, condition=kind)
        colour = None if image is None else _flat_colour(image)
        if colour is not None:
            seen.problems.append(_problem("flat", record, f"{name} is one flat colour, {colour}: it tells nothing"))
        if image is None or target is None or isinstance(source, ComputedCondition):
            continue
        if image.size != target.size:
            worse = "shape" if shapes_differ(image.size, target.size) else "size"
            sizes = " and ".join(f"{width} x {height}" for width, height in (image.size, target.size))
            seen.problems.append(_problem("size", record, f"{name} and image differ in {worse} ({sizes})"))
            continue
        seen.forward |= _compared(record, name, image, target, seen)
    return seen


def _compared(record: Record, name: str, image: Image.Image, target: Image.Image, seen: _Findings) -> dict[str, bool]:
    """Whether the condition image is what its recorded parameters make of the image; empty if none are recorded."""
    parameters = record.recorded("parameters", name)
    if not isinstance(parameters, Mapping) or "objects" in parameters:
        return {}
    try:
        if find(name).requires is not None:
            return {}
        forward = _distance(find(name)(np.asarray(target), **parameters), image)
        if forward <= _ALIKE:
            return {name: True}
        backward = _distance(find(name)(np.asarray(image), **parameters), target)
    except (UserError, ValueError):
        return {}
    if backward <= _ALIKE:
        text = f"{name} and image are exchanged (certain: the image is what {name} makes of the condition image)"
        seen.problems.append(_problem("swapped", record, text))
    else:
        text = f"{name} is not what its parameters make of the image (mean difference {forward:.0f} of 255)"
        seen.problems.append(_problem("not drawn", record, text))
    return {name: False}


def _flat_colour(image: Image.Image) -> tuple[int, ...] | None:
    """The colour of an image that has no other, but for what JPEG leaves of it; None for all others."""
    ranges = np.array(image.getextrema()).reshape(-1, 2)
    return tuple(int(low) for low, _ in ranges) if (np.ptp(ranges, axis=1) <= _FLAT).all() else None


def _opened(
    record: Record, source: Source, digest: str | None, seen: _Findings, condition: str | None = None
) -> Image.Image | None:
    try:
        image = read_condition_image(source, condition)
        if digest is not None and hashlib.sha256(source.read_bytes()).hexdigest() != digest:
            seen.problems.append(_problem("changed", record, f"{source} is not the file that was listed (SHA-256)"))
        return image
    except UserError as error:
        seen.problems.append(_problem("file", record, str(error)))
        return None


def _duplicates(records: Sequence[Record], seen: Sequence[_Findings]) -> Iterator[Problem]:
    first: dict[str, str] = {}
    for record, one in zip(records, seen, strict=True):
        if one.pixels is None:
            continue
        if one.pixels in first:
            yield _problem("duplicate", record, f"the same image as {first[one.pixels]}")
        else:
            first[one.pixels] = record.where


def _exchanged(listing: Listing, name: str, seen: Sequence[_Findings]) -> Verdict | None:
    """A verdict about all pairs of a condition, where no manifest says how they were made."""
    if any(name in one.forward for one in seen):
        return None
    pairs = []
    for record, one in zip(listing.records, seen, strict=True):
        source = record.conditions.get(name)
        if (
            source is None
            or isinstance(source, ComputedCondition)
            or any(p.kind in ("file", "size") for p in one.problems)
        ):
            continue
        pairs.append((_reduced(source, name), _reduced(record.image)))
        if len(pairs) == _SAMPLE:
            break
    return find_swapped_sides(pairs, name)


def _reduced(source: Source, condition: str | None = None) -> np.ndarray:
    image = read_condition_image(source, condition)
    scale = min(1.0, _SIDE / max(image.size))
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return np.asarray(image if size == image.size else image.resize(size, Image.Resampling.BOX))


def _distance(made: np.ndarray, image: Image.Image) -> float:
    return float(np.abs(made.astype(np.int16) - np.asarray(image, dtype=np.int16)).mean())


def _problem(kind: str, record: Record, text: str) -> Problem:
    return Problem(kind=kind, where=record.where, text=text)


def _shown(source: Source | None, cell: int) -> Image.Image:
    """The image, reduced to about what a cell shows, so that a sheet of large ones fits into memory."""
    try:
        image = open_image(source) if source is not None else Image.new("RGB", (64, 64), "red")
    except UserError:
        return Image.new("RGB", (64, 64), "red")
    image.thumbnail((2 * cell, 2 * cell))
    return image


def to_json(report: CheckReport) -> dict[str, Any]:
    """The report as plain values."""
    return {
        "pairs": report.pairs,
        "conditions": report.conditions,
        "counts": report.counts,
        "problems": [vars(problem) for problem in report.problems],
        "notes": report.notes,
    }
