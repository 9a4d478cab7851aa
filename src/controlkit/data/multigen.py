"""MultiGen-20M (Qin et al. 2023, arXiv 2305.11147): 2.8 million images with the conditions of a dozen tasks.

Its folder holds `json_files/aesthetics_plus_all_group_TASK_all.json`, JSON lines with `source` (a path below
`images/`), `prompt` and `control_TASK` (a path below `conditions/`).
"""

from __future__ import annotations

import json
import mmap
import re
from pathlib import Path

import numpy as np

from controlkit.conditions.condition import background_of
from controlkit.data.transforms import CENTRE, View, apply_view
from controlkit.errors import UserError, nearest, reason_of
from controlkit.files import valid_text
from controlkit.images import read_image

_EMPTY = re.compile(rb'"prompt"\s*:\s*(?:null|"(?:\s|\\[tnr])*")')
"""Quotation marks inside JSON strings are escaped, so this matches keys only."""
_CONTROL_KEYS = {"segbase": "control_seg"}
_BLOCK = 1 << 24


class MultiGen:
    """One task of MultiGen-20M, read in place.

    Only line offsets are kept in memory (8 bytes each), not the lines.

    Args:
        folder: with `json_files`, `images` and `conditions`.
        task: such as `hed`, `canny`, `depth`.

    Raises:
        UserError: the folder has no such task.
    """

    def __init__(self, folder: str | Path, task: str) -> None:
        self.folder = Path(folder)
        self.task = task
        self.path = self.folder / "json_files" / f"aesthetics_plus_all_group_{task}_all.json"
        if not self.path.is_file():
            stem, end = "aesthetics_plus_all_group_", "_all.json"
            found = [p.name.removeprefix(stem).removesuffix(end) for p in self.path.parent.glob(f"{stem}*{end}")]
            raise UserError(
                f"MultiGen-20M in {self.folder} has no task {task!r}: no {self.path}{nearest(task, found)}",
                "unknown-name",
            )
        self._starts = _line_starts(self.path)
        if not len(self._starts):
            raise UserError(f"{self.path} lists no pairs", "empty-data")

    def __len__(self) -> int:
        return len(self._starts)

    def entry(self, index: int) -> tuple[Path, Path, str]:
        """Paths of condition image and image, and the prompt, of line `index`.

        Raises:
            UserError: the line is not an entry of the task.
        """
        with self.path.open("rb") as stream:
            stream.seek(int(self._starts[index]))
            line = stream.readline()
        try:
            listed = json.loads(line)
            control = listed[_CONTROL_KEYS.get(self.task, f"control_{self.task}")]
            source, prompt = listed["source"], listed["prompt"]
            return (
                self.folder / "conditions" / control.removeprefix("./"),
                self.folder / "images" / source.removeprefix("./"),
                valid_text(_text(prompt), "the prompt"),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{self.path}, line {index + 1}: not an entry of the task {self.task} ({reason_of(error)})", "bad-data"
            ) from error

    def empty_prompts(self) -> int:
        """Number of lines with an empty prompt, by a text search: seconds for millions of lines."""
        with self.path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return sum(1 for _ in _EMPTY.finditer(data))

    def pair(self, index: int, size: int, rng: np.random.Generator | None = None) -> tuple[np.ndarray, np.ndarray, str]:
        """Condition image and image, both `uint8 [size, size, 3]`, and the prompt, of line `index`.

        Both get the same square crop along the long side, at a random place with `rng`, else at the centre; their
        resolutions may differ.

        Raises:
            UserError: a file is missing or damaged.
        """
        condition_path, image_path, prompt = self.entry(index)
        condition = np.asarray(read_image(condition_path, background_of(self.task)))
        image = np.asarray(read_image(image_path))
        view = CENTRE if rng is None else View(place=float(rng.random()))
        return apply_view(condition, view, size), apply_view(image, view, size), prompt


def _text(prompt: object) -> str:
    if prompt is not None and not isinstance(prompt, str):
        raise TypeError(f"its prompt is {prompt!r}; expected text")
    return prompt or ""


def _line_starts(path: Path) -> np.ndarray:
    """Byte offsets of the non-empty lines of a file."""
    ends = [np.zeros(1, np.int64)]
    length = 0
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            found = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n"))
            ends.append(found + length + 1)
            length += len(block)
    starts = np.concatenate(ends)
    stops = np.append(starts[1:], length)
    return starts[stops - starts > 1]
