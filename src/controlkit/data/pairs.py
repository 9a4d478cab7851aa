"""Read, write and split pairs of condition image and image, in any layout of `data/readers/`."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from controlkit.data.pair import SOURCE, TARGET, Pair
from controlkit.data.prompts import PromptLimit, count_note, empty_note, is_empty
from controlkit.data.readers.columns import ANY_COLUMNS, Columns
from controlkit.data.readers.listing import problems_error
from controlkit.data.readers.recognise import PROMPT_JSON, pairs_folder, read_listing
from controlkit.data.sources import ComputedCondition, Source, read_file
from controlkit.errors import UserError
from controlkit.files import sha256_of, write_atomically
from controlkit.images import decode_rgb, shapes_differ, write_png

__all__ = [
    "MANIFEST",
    "Columns",
    "Pair",
    "PairSet",
    "load_pairs",
    "pairs_folder",
    "read_pairs",
    "split_pairs",
    "write_pairs",
]

MANIFEST = PROMPT_JSON
"""JSON lines, one per pair: `{"source": condition image, "target": image, "prompt": text}`, paths relative to the
folder, as in lllyasviel/ControlNet and xyfJASON/ctrlora. `write_pairs` writes it."""


@dataclass(frozen=True, kw_only=True)
class PairSet:
    """Pairs whose files have been checked."""

    pairs: list[Pair]
    where: list[str]
    """Where each is listed: `line 7`, or its key."""
    recorded: str | None
    """The condition that they record, if it is a known one and the only one."""
    notes: list[str]
    """Warnings."""

    def prompt_notes(self, limit: PromptLimit) -> list[str]:
        """Notes on empty prompts and on prompts longer than `limit`."""
        captions = [(where, text) for where, pair in zip(self.where, self.pairs, strict=True) for text in pair.captions]
        return empty_note(sum(is_empty(text) for _, text in captions), len(captions)) + count_note(captions, limit)


def read_pairs(path: str | Path, condition: str | None = None, columns: Columns = ANY_COLUMNS) -> list[Pair]:
    """Read the pairs at `path` and check every file. Layouts: docs/pairs.md.

    Args:
        path: a folder, a file or a glob; `PATH/NAME` is the condition NAME of the pairs at PATH.
        condition: the condition, if there are several.
        columns: names of uncommon columns of a table (JSON lines, CSV, Parquet).

    Raises:
        UserError: the layout is unknown, the condition is ambiguous, a named column is missing, or files are missing,
            damaged or mismatched, or differ from the SHA-256 in their manifest; all files are reported at once.
    """
    return load_pairs(path, condition, columns).pairs


def load_pairs(path: str | Path, condition: str | None = None, columns: Columns = ANY_COLUMNS) -> PairSet:
    """`read_pairs` with notes.

    Raises:
        UserError: as `read_pairs`.
    """
    listing = read_listing(path, condition, columns)
    listed, problems = listing.pairs(condition)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for (where, _), found in zip(listed, pool.map(lambda entry: _problems(entry[1]), listed), strict=True):
            problems += [f"{where}: {problem}" for problem in found]
    if problems:
        advice = "fix or remove these lines"
        if any(_CHANGED in problem for problem in problems):
            advice += (
                "; make pairs of changed images again with controlkit pairs, and remove `sha256` from lines whose files"
                " you changed on purpose"
            )
        raise problems_error(listing.origin, problems, advice)
    return PairSet(
        pairs=[pair for _, pair in listed],
        where=[where for where, _ in listed],
        recorded=listing.recorded,
        notes=[*listing.notes, *listing.renamed(condition), *listing.outside()],
    )


def write_pairs(folder: str | Path, pairs: Iterable[tuple[np.ndarray, np.ndarray, str]]) -> int:
    """Write `(condition image, image, prompt)` as a folder for `read_pairs`; returns the number of pairs.

    The manifest is written last, so a folder with one is complete.
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
    """Split into (training, held-out) pairs by the hash of their images, with at least one pair each.

    Of pairs whose manifest records the file that each image was made from, it is the hash of that file, so that pairs
    made again at another size or of another condition are split alike. Tiles of one image are not separated, unless all
    pairs are tiles of one image.

    Args:
        share: held-out fraction; with tiles at most about that.

    Raises:
        UserError: there are fewer than two pairs.
    """
    if len(pairs) < 2:
        raise UserError(
            f"got {len(pairs)} pairs; at least 2 are needed, one to train on and one held out", "empty-data"
        )
    count = min(len(pairs) - 1, max(1, round(share * len(pairs))))
    groups = _ranked(pairs)
    if len(groups) == 1:
        return groups[0][count:], groups[0][:count]
    chosen: set[int] = set()
    for index, group in enumerate(groups):
        if len(group) <= count:
            chosen.add(index)
            count -= len(group)
    chosen = chosen or {min(range(len(groups)), key=lambda index: len(groups[index]))}
    held_out = [pair for index, group in enumerate(groups) if index in chosen for pair in group]
    return [pair for index, group in enumerate(groups) if index not in chosen for pair in group], held_out


def _ranked(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """The pairs in an order that depends on their images alone, with tiles of one image together."""
    digests = [sha256_of(pair.target.read_bytes()) for pair in pairs]
    targets: dict[str, set[str]] = {}
    for pair, digest in zip(pairs, digests, strict=True):
        if pair.original is not None:
            targets.setdefault(pair.original, set()).add(digest)
    groups: dict[tuple[str, int], list[Pair]] = {}
    for index, (pair, digest) in enumerate(zip(pairs, digests, strict=True)):
        # Different images made from one file are tiles. Other pairs are ranked one by one, copies of an image too.
        tiled = pair.original is not None and len(targets[pair.original]) > 1
        made_from = digest if pair.original is None else sha256_of(pair.original)
        groups.setdefault((made_from, -1 if tiled else index), []).append(pair)
    return [groups[key] for key in sorted(groups)]


_CHANGED = "differs from the manifest (SHA-256)"


def _problems(pair: Pair) -> list[str]:
    found: list[str] = []
    sizes: list[tuple[int, int]] = []
    data = b""
    for side in (TARGET, SOURCE):
        source: Source = getattr(pair, side)
        try:
            if isinstance(source, ComputedCondition):
                if sizes:
                    source.check(sizes[0], data)
                continue
            data = read_file(source)
            sizes.append(decode_rgb(data, str(source)).size)
        except UserError as error:
            found.append(str(error))
            continue
        if side in pair.sha256 and pair.sha256[side] != hashlib.sha256(data).hexdigest():
            found.append(f"{source} {_CHANGED}")
    if len(sizes) == 2 and shapes_differ(sizes[0], sizes[1]):
        shapes = " and ".join(f"{width} x {height}" for width, height in reversed(sizes))
        found.append(f"{pair.source} and {pair.target} have different shapes ({shapes})")
    return found
