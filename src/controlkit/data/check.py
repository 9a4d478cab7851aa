"""Check a folder of pairs and report all problems at once, with how certain they are."""

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
from controlkit.conditions.condition import BLACK
from controlkit.conditions.pixels import packed
from controlkit.data.prompts import PromptLimit, count_note, empty_note, is_empty
from controlkit.data.readers.columns import ANY_COLUMNS, Columns
from controlkit.data.readers.listing import Listing, Record
from controlkit.data.readers.recognise import read_listing
from controlkit.data.sources import ComputedCondition, Source, open_image, read_condition_image
from controlkit.data.swap_check import Verdict, find_swapped_sides
from controlkit.errors import UserError
from controlkit.files import valid_text
from controlkit.images import shapes_differ

KINDS = {
    "entry": "invalid entries",
    "file": "missing or damaged files",
    "changed": "files that differ from the manifest",
    "size": "condition images of another shape than their image",
    "scale": "condition images of another size than their image",
    "duplicate": "duplicate images",
    "prompt": "empty prompts",
    "flat": "condition images of one flat colour",
    "swapped": "condition image and image swapped",
    "not drawn": "condition images that do not match the manifest",
}
"""Kind of problem -> heading."""
_STRICT = ("scale", "prompt")
"""Kinds that are problems in a strict check only: training scales both sides, and empty prompts train."""

_ALIKE = 12.0
"""Mean difference, of 255, up to which two condition images count as equal: versions of OpenCV differ by less, other
images by more."""
_FLAT = 2
"""Range of values, of 255, within which an image is one flat colour."""
_SIDE = 768
"""Longest side, in pixels, of images in the check for swapped sides."""
_OUTSIDE = 0.1
"""Share of pixels outside the palette from which a map is unusual; scaling mixes colours at the borders of regions."""
_SAMPLE = 48
"""Pairs per condition in the check for swapped sides, where no manifest records parameters."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One problem to fix."""

    kind: str
    """A key of `KINDS`."""
    where: str
    text: str

    def __str__(self) -> str:
        return f"{self.where}: {self.text}"


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """Result of a check."""

    origin: Path | str
    conditions: list[str]
    pairs: int
    problems: list[Problem]
    notes: list[str]
    """Findings that need not be problems."""
    shown: list[tuple[Source, Source]]
    """Condition image and image of some pairs, those with problems first."""

    @property
    def counts(self) -> dict[str, int]:
        """Number of problems of each kind that occurs."""
        found = Counter(problem.kind for problem in self.problems)
        return {kind: found[kind] for kind in KINDS if found[kind]}


@dataclass
class _Findings:
    """Findings about one record."""

    problems: list[Problem] = field(default_factory=list)
    pixels: str | None = None
    """Hash of the image's pixels; None if it cannot be read."""
    forward: dict[str, bool] = field(default_factory=dict)
    """Condition -> whether its image matches the recorded parameters; empty where none are recorded."""
    unusual: dict[str, str] = field(default_factory=dict)
    """Condition -> how its image differs from those that the condition computes."""


def check_pairs(
    path: str | Path,
    conditions: Sequence[str] = (),
    sheet: int = 12,
    *,
    columns: Columns = ANY_COLUMNS,
    limit: PromptLimit | None = None,
    strict: bool = False,
) -> CheckReport:
    """Check every file of the pairs at `path`.

    Where a manifest records a condition's parameters, the condition image is computed again and compared, so swapped
    sides are certain. Elsewhere they are judged from a sample.

    Args:
        conditions: check only these.
        sheet: number of pairs in the contact sheet.
        columns: names of uncommon columns of a table (JSON lines, CSV, Parquet).
        limit: token limit of prompts; longer ones are counted in a note.
        strict: also list empty prompts, and condition images of another size (but the same shape), as problems.
            Otherwise a note counts them: one can train on these pairs.

    Raises:
        UserError: there are no pairs, or a named column is missing.
    """
    listing = read_listing(path, conditions[0] if len(conditions) == 1 else None, columns)
    names = [_chosen(listing, name) for name in conditions] or listing.conditions
    # Column or folder name -> condition: the requested one, else what the name says.
    kinds = dict(zip(names, conditions or names, strict=True))
    if not names and not listing.problems:
        raise UserError(
            f"{listing.origin} lists no condition images; make them: controlkit pairs {listing.origin} --conditions"
            " canny --out DIR",
            "empty-data",
        )
    problems = [_entry_problem(text) for text in listing.problems]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        findings = list(pool.map(lambda record: _check_record(record, kinds), listing.records))
    found = [problem for finding in findings for problem in finding.problems]
    problems += [problem for problem in found if strict or problem.kind not in _STRICT]
    problems += _duplicates(listing.records, findings)
    notes = [*listing.notes, *listing.outside(), *_prompt_notes(listing, limit), *_size_notes(found)]
    notes += _unusual_notes(listing.records, findings)
    for name in names:
        verdict = _swapped(listing, name, findings)
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
    """Condition images above their images, in rows of six; unreadable files are red."""
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
        raise UserError(f"{listing.origin} has no condition {name!r}; it has {known or 'none'}", "unknown-name")
    return found


def _entry_problem(text: str) -> Problem:
    where, _, rest = text.partition(": ")
    return Problem(kind="entry", where=where if rest else "list", text=rest or text)


def _prompt_notes(listing: Listing, limit: PromptLimit | None) -> list[str]:
    captions = [(record.where, text) for record in listing.records for text in record.captions]
    empty = empty_note(sum(is_empty(text) for _, text in captions), len(captions))
    return empty + (count_note(captions, limit) if limit is not None else [])


def _size_notes(problems: Sequence[Problem]) -> list[str]:
    sizes = [problem for problem in problems if problem.kind == "scale"]
    if not sizes:
        return []
    return [f"{len(sizes)} condition images have another size than their image, and training scales both: {sizes[0]}"]


def _check_record(record: Record, kinds: Mapping[str, str]) -> _Findings:
    findings = _Findings()
    if any(map(is_empty, record.captions)):
        findings.problems.append(_problem("prompt", record, "empty prompt"))
    for caption in record.captions:
        try:
            valid_text(caption, "the prompt")
        except UserError as error:
            findings.problems.append(_problem("entry", record, str(error)))
    target = _opened(record, record.image, record.sha256(), findings)
    if target is not None:
        findings.pixels = hashlib.sha256(repr(target.size).encode() + target.tobytes()).hexdigest()
    for name, kind in kinds.items():
        source = record.conditions.get(name)
        if source is None:
            findings.problems.append(_problem("file", record, f"there is no condition image {name!r}"))
            continue
        if isinstance(source, ComputedCondition) and (target is None or find(source.condition).requires is not None):
            continue  # detectors are too slow to run for a check
        image = _opened(record, source, record.sha256(name), findings, condition=kind)
        colour = None if image is None else _flat_colour(image)
        if colour is not None:
            findings.problems.append(_problem("flat", record, f"{name} is one flat colour, {colour}"))
        elif image is not None and (text := _unusual(kind, np.asarray(image))) is not None:
            findings.unusual[name] = text
        if image is None or target is None or isinstance(source, ComputedCondition):
            continue
        if image.size != target.size:
            wrong, difference = ("size", "shape") if shapes_differ(image.size, target.size) else ("scale", "size")
            sizes = " and ".join(f"{width} x {height}" for width, height in (image.size, target.size))
            findings.problems.append(_problem(wrong, record, f"{name} and image differ in {difference} ({sizes})"))
            continue
        findings.forward |= _compared(record, name, image, target, findings)
    return findings


def _compared(
    record: Record, name: str, image: Image.Image, target: Image.Image, findings: _Findings
) -> dict[str, bool]:
    """Whether the condition image matches the image and the recorded parameters; empty if none are recorded."""
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
        text = f"{name} and image are swapped (certain: the image is {name} of the condition image)"
        findings.problems.append(_problem("swapped", record, text))
    else:
        text = f"{name} does not match the image and the recorded parameters (mean difference {forward:.0f} of 255)"
        findings.problems.append(_problem("not drawn", record, text))
    return {name: False}


def _unusual(name: str, image: np.ndarray) -> str | None:
    """How a condition image `uint8 [H, W, 3]` differs from those that the condition computes; None if it does not, or
    the condition is unknown."""
    try:
        condition = find(name)
    except UserError:
        return None
    lines = condition.values == (0, 255) and condition.resize == "smooth"
    if lines and condition.background == BLACK and np.median(image) == 255:
        return f"are mostly white, and {condition.name} is white on black: inverted?"
    if condition.palette is None:
        return None
    known = packed(np.vstack([condition.palette, [condition.background]])[None].astype(np.uint8))
    if np.isin(packed(image), known).mean() >= 1 - _OUTSIDE:
        return None
    return f"have other colours than {condition.name}: indices of classes, or another palette?"


def _unusual_notes(records: Sequence[Record], findings: Sequence[_Findings]) -> list[str]:
    where: dict[tuple[str, str], list[str]] = {}
    for record, finding in zip(records, findings, strict=True):
        for found in finding.unusual.items():
            where.setdefault(found, []).append(record.where)
    return [f"{name}: {len(all_)} images {text} Such as {all_[0]}" for (name, text), all_ in where.items()]


def _flat_colour(image: Image.Image) -> tuple[int, ...] | None:
    """The colour of a single-colour image, within JPEG noise; None for all others."""
    ranges = np.array(image.getextrema()).reshape(-1, 2)
    return tuple(int(low) for low, _ in ranges) if (np.ptp(ranges, axis=1) <= _FLAT).all() else None


def _opened(
    record: Record, source: Source, digest: str | None, findings: _Findings, condition: str | None = None
) -> Image.Image | None:
    try:
        image = read_condition_image(source, condition)
        if digest is not None and hashlib.sha256(source.read_bytes()).hexdigest() != digest:
            findings.problems.append(_problem("changed", record, f"{source} differs from the manifest (SHA-256)"))
        return image
    except UserError as error:
        findings.problems.append(_problem("file", record, str(error)))
        return None


def _duplicates(records: Sequence[Record], findings: Sequence[_Findings]) -> Iterator[Problem]:
    first: dict[str, str] = {}
    for record, finding in zip(records, findings, strict=True):
        if finding.pixels is None:
            continue
        if finding.pixels in first:
            yield _problem("duplicate", record, f"same image as {first[finding.pixels]}")
        else:
            first[finding.pixels] = record.where


def _swapped(listing: Listing, name: str, findings: Sequence[_Findings]) -> Verdict | None:
    """A verdict about all pairs of a condition, where no manifest records their parameters."""
    if any(name in finding.forward for finding in findings):
        return None
    pairs = []
    for record, finding in zip(listing.records, findings, strict=True):
        source = record.conditions.get(name)
        if (
            source is None
            or isinstance(source, ComputedCondition)
            or any(p.kind in ("file", "size", "scale") for p in finding.problems)
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


def _distance(first: np.ndarray, second: Image.Image) -> float:
    return float(np.abs(first.astype(np.int16) - np.asarray(second, dtype=np.int16)).mean())


def _problem(kind: str, record: Record, text: str) -> Problem:
    return Problem(kind=kind, where=record.where, text=text)


def _shown(source: Source | None, cell: int) -> Image.Image:
    """The image reduced to about the size of a cell, so that a sheet of large images fits into memory."""
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
