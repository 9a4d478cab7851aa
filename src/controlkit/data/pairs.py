"""Pairs of a condition image and an image, from any layout that `data/readers/` knows."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from controlkit.data.pair import Pair
from controlkit.data.prompts import PromptLimit, count_note, empty_note, is_empty
from controlkit.data.readers.columns import ANY_COLUMNS, Columns
from controlkit.data.readers.listing import refuse
from controlkit.data.readers.recognise import PROMPT_JSON, pairs_folder, read_listing
from controlkit.data.sources import ComputedCondition, Source, open_image
from controlkit.errors import UserError
from controlkit.files import sha256_of, write_atomically
from controlkit.images import write_png

__all__ = [
    "MANIFEST",
    "Columns",
    "Pair",
    "PairSet",
    "load_pairs",
    "pairs_folder",
    "read_pairs",
    "shapes_differ",
    "split_pairs",
    "write_pairs",
]

MANIFEST = PROMPT_JSON
"""JSON lines, one pair each: `{"source": condition image, "target": image, "prompt": text}`, paths relative to
the folder (as lllyasviel/ControlNet and xyfJASON/ctrlora read it). `write_pairs` writes it."""


@dataclass(frozen=True, kw_only=True)
class PairSet:
    """Pairs whose files have been looked at."""

    pairs: list[Pair]
    where: list[str]
    """Where each is listed."""
    notes: list[str]
    """What is no problem, but should not pass in silence."""

    def prompt_notes(self, limit: PromptLimit) -> list[str]:
        """How many prompts are empty, and how many are longer than a base reads."""
        told = [(where, text) for where, pair in zip(self.where, self.pairs, strict=True) for text in pair.captions]
        return empty_note(sum(is_empty(text) for _, text in told), len(told)) + count_note(told, limit)


def read_pairs(path: str | Path, condition: str | None = None, columns: Columns = ANY_COLUMNS) -> list[Pair]:
    """The pairs at `path`, every file looked at. What the layouts are: docs/pairs.md.

    Args:
        path: a folder, a file or a glob; `PATH/NAME` is the condition NAME of the pairs at PATH.
        condition: which condition, where there are several.
        columns: names of columns, where a table (JSON lines, CSV, Parquet) has uncommon ones.

    Raises:
        UserError: no layout is recognised, the condition has to be named, a named column is not there, or pairs have
            missing, torn or mismatched files; all of these are listed at once.
    """
    return load_pairs(path, condition, columns).pairs


def load_pairs(path: str | Path, condition: str | None = None, columns: Columns = ANY_COLUMNS) -> PairSet:
    """What `read_pairs` reads, with notes on it.

    Raises:
        UserError: as `read_pairs`.
    """
    listing = read_listing(path, condition, columns)
    listed, problems = listing.pairs(condition)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for (where, _), found in zip(listed, pool.map(lambda entry: _problems(entry[1]), listed), strict=True):
            problems += [f"{where}: {problem}" for problem in found]
    if problems:
        raise refuse(listing.origin, problems, "mend or remove these lines")
    return PairSet(
        pairs=[pair for _, pair in listed],
        where=[where for where, _ in listed],
        notes=[*listing.notes, *listing.outside()],
    )


def write_pairs(folder: str | Path, pairs: Iterable[tuple[np.ndarray, np.ndarray, str]]) -> int:
    """Write `(condition image, image, prompt)` as a folder that `read_pairs` reads; returns how many there are.

    The manifest comes last, so a folder that has one is whole.
    """
    folder = Path(folder)
    lines = []
    for number, (source, target, prompt) in enumerate(pairs):
        entry = {"source": f"source/{number:05d}.png", "target": f"target/{number:05d}.png", "prompt": prompt}
        write_png(folder / entry["source"], Image.fromarray(source))
        write_png(folder / entry["target"], Image.fromarray(target))
        lines.append(json.dumps(entry, ensure_ascii=False) + "\n")
    write_atomically(folder / MANIFEST, lambda temporary: temporary.write_text("".join(lines), encoding="utf-8"))
    return len(lines)


def split_pairs(pairs: Sequence[Pair], share: float = 0.1) -> tuple[list[Pair], list[Pair]]:
    """(to train on, held out): a share of the pairs by the hash of their image, at least one on either side.

    Raises:
        UserError: there are fewer than two.
    """
    if len(pairs) < 2:
        raise UserError(f"{len(pairs)} pair is too few: one to train on and one to judge by are needed at least")
    ranked = sorted(pairs, key=lambda pair: sha256_of(pair.target.read_bytes()))
    count = min(len(pairs) - 1, max(1, round(share * len(pairs))))
    return ranked[count:], ranked[:count]


def shapes_differ(first: tuple[int, int], second: tuple[int, int]) -> bool:
    """Whether two sizes (width, height) are not one shape scaled, give or take a pixel."""
    return abs(first[0] * second[1] - first[1] * second[0]) > max(first + second)


def _problems(pair: Pair) -> list[str]:
    found: list[str] = []
    sizes: list[tuple[int, int]] = []
    looked_at: list[Source] = (
        [pair.target] if isinstance(pair.source, ComputedCondition) else [pair.source, pair.target]
    )
    for source in looked_at:
        try:
            sizes.append(open_image(source).size)
        except UserError as error:
            found.append(str(error))
    if len(sizes) == 2 and shapes_differ(sizes[0], sizes[1]):
        shapes = " and ".join(f"{width} x {height}" for width, height in sizes)
        found.append(f"{pair.source} and {pair.target} have different shapes ({shapes})")
    return found
