"""Pairs of a condition image and a picture, from a folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from controlkit.errors import UserError
from controlkit.files import sha256_of, write_atomically
from controlkit.images import read_image, resize_cover, write_png

MANIFEST = "prompt.json"
"""JSON lines, one pair each: `{"source": condition image, "target": picture, "prompt": text}`, paths relative to
the folder (as lllyasviel/ControlNet and xyfJASON/ctrlora read it)."""

_SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One pair, on disk."""

    source: Path
    """The condition image."""
    target: Path
    """The picture."""
    prompt: str

    def images(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Condition image and picture, both `uint8 [size, size, 3]`, cropped around their centres alike."""
        source, target = (np.asarray(resize_cover(read_image(path), size, size)) for path in (self.source, self.target))
        return source, target

    def key(self) -> str:
        """Hash of both files' bytes."""
        return sha256_of(self.source.read_bytes(), self.target.read_bytes())


def read_pairs(folder: str | Path) -> list[Pair]:
    """The pairs that the manifest of `folder` lists, every file looked at.

    Raises:
        UserError: there is no manifest, or pairs have missing, torn or mismatched files; all are listed at once.
    """
    folder = Path(folder)
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise UserError(
            f"{folder} has no {MANIFEST}; it should hold one line for each pair:"
            ' {"source": "source/0.png", "target": "target/0.png", "prompt": "..."}'
        )
    pairs: list[Pair] = []
    problems: list[str] = []
    for number, line in enumerate(manifest.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            pair = Pair(source=folder / entry["source"], target=folder / entry["target"], prompt=str(entry["prompt"]))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            problems.append(f"line {number}: not an object with source, target and prompt ({error!r})")
            continue
        problems += [f"line {number}: {problem}" for problem in _problems(pair)]
        pairs.append(pair)
    if not pairs and not problems:
        raise UserError(f"{manifest} lists no pairs")
    if problems:
        more = f"\n... and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        listed = "\n".join(problems[:_SHOWN])
        raise UserError(f"{len(problems)} problems in {manifest}; mend or remove these lines:\n{listed}{more}")
    return pairs


def write_pairs(folder: str | Path, pairs: Iterable[tuple[np.ndarray, np.ndarray, str]]) -> int:
    """Write `(condition image, picture, prompt)` as a folder that `read_pairs` reads; returns how many there are.

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
    """(to train on, held out): a share of the pairs by the hash of their picture, at least one on either side.

    Raises:
        UserError: there are fewer than two.
    """
    if len(pairs) < 2:
        raise UserError(f"{len(pairs)} pair is too few: one to train on and one to judge by are needed at least")
    ranked = sorted(pairs, key=lambda pair: sha256_of(pair.target.read_bytes()))
    count = min(len(pairs) - 1, max(1, round(share * len(pairs))))
    return ranked[count:], ranked[:count]


def _problems(pair: Pair) -> list[str]:
    found: list[str] = []
    sizes: list[tuple[int, int]] = []
    for path in (pair.source, pair.target):
        try:
            sizes.append(_size(path))
        except UserError as error:
            found.append(str(error))
    if len(sizes) == 2 and abs(sizes[0][0] * sizes[1][1] - sizes[0][1] * sizes[1][0]) > max(sizes[0] + sizes[1]):
        shapes = " and ".join(f"{width} x {height}" for width, height in sizes)
        found.append(f"{pair.source} and {pair.target} have different shapes ({shapes})")
    return found


def _size(path: Path) -> tuple[int, int]:
    image: Image.Image = read_image(path)
    return image.size
