"""Early stopping by the held-out score of previews."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from controlkit.errors import UserError
from controlkit.files import read_json, write_json

_RECORD = "best.json"


class Patience:
    """Ends a run after `previews` previews without a better score, and keeps the files of the best one.

    Args:
        folder: where the files of the best preview are kept, with a record for a resumed run.
        first: the step that the run begins or resumes at. What was judged at later steps is dropped.
    """

    def __init__(self, previews: int, folder: Path, first: int) -> None:
        self._previews = previews
        self._folder = folder
        self._best: list[float] | None = None
        self._scale: list[float] = []
        """The largest magnitude of each condition's score so far; their units may differ."""
        self._waited = 0
        self.last_step = 0
        """The step of the last preview that was judged."""
        self.step = 0
        """The step of the best preview."""
        self.scores: dict[str, float] = {}
        """The scores of the best preview."""
        self._files: list[str] | None = None
        """Names of the files of the best preview; None if the record is by an earlier version."""
        self._history: list[dict[str, Any]] = []
        """What was known after each preview, for a run that resumes from an earlier state."""
        record = {}
        with suppress(UserError):
            record = read_json(folder / _RECORD)
        if record:
            self._restore(record if record["judged"] <= first else _cut_back(record, first))

    def _restore(self, record: dict[str, Any]) -> None:
        self._history = record.get("history", [])
        self._scale = record.get("scale", [])
        self._waited, self.last_step = record["waited"], record["judged"]
        if (best := record["best"]) is not None:  # a number, of files by earlier versions
            self._best = [math.nan if v is None else v for v in (best if isinstance(best, list) else [best])]
            self.step, self._files = record["step"], record.get("files")
            self.scores = {name: math.nan if v is None else v for name, v in record.get("scores", {}).items()}

    @property
    def judged(self) -> bool:
        """Whether there is a best preview."""
        return self._best is not None

    @property
    def exhausted(self) -> bool:
        """Whether the run has ended."""
        return self._waited >= self._previews

    def _is_better(self, merits: list[float]) -> bool:
        """Whether a preview is better than the best; extends the scale of each condition."""
        finite = [abs(merit) if math.isfinite(merit) else 0.0 for merit in merits]
        before = self._scale if len(self._scale) == len(merits) else [0.0] * len(merits)
        self._scale = [max(pair) for pair in zip(before, finite, strict=True)]
        if self._best is None:
            return True
        if len(self._best) != len(merits):  # the mean, of a run by an earlier version
            return sum(merits) / len(merits) > sum(self._best) / len(self._best)
        return _total(merits, self._scale) > _total(self._best, self._scale)

    def ends(
        self, step: int, scores: dict[str, float], merits: list[float] | None, save: Callable[[Path, int], list[Path]]
    ) -> bool:
        """Whether the run ends with this preview.

        Args:
            scores: of the preview, by name.
            merits: what of them counts, higher is better; those of several conditions may be in different units.
            save: writes the files of the current weights, of a step, into a folder; returns the files.

        Raises:
            UserError: the preview has no score to compare.
        """
        if merits is None:
            raise UserError(
                "patience needs a held-out score, and the previews of this run have none to compare", "contradiction"
            )
        if self._is_better(merits):
            self._best, self._waited, self.step, self.scores = merits, 0, step, scores
            self._folder.mkdir(parents=True, exist_ok=True)
            self._files = [path.name for path in save(self._folder, step)]
        else:
            self._waited += 1
        known = {"judged": step, "scale": self._scale, "waited": self._waited}
        self._history.append(known)
        best = {"best": self._best, "step": self.step, "scores": self.scores, "files": self._files}
        write_json(self._folder / _RECORD, {**known, **best, "history": self._history})
        self.last_step = step
        return self.exhausted

    def files(self, folder: Path) -> list[Path]:
        """Copy the files of the best preview into `folder`; returns the copies."""
        names = self._files
        if names is None:
            names = sorted(path.name for path in self._folder.iterdir() if path.name != _RECORD and path.is_file())
        return [Path(shutil.copy2(self._folder / name, folder / name)) for name in names]


def _cut_back(record: dict[str, Any], first: int) -> dict[str, Any]:
    """A record as it was at the step `first`, without its best preview if that was later."""
    history = [known for known in record.get("history", []) if known["judged"] <= first]
    # A record by an earlier version has no history, and does not tell how long the run had waited.
    before = history[-1] if history else {"judged": first, "waited": 0}
    cut = {**record, **before, "history": history}
    return cut if record["step"] <= first else {**cut, "best": None}


def _total(merits: list[float], scale: list[float]) -> float:
    """The sum of scores, each in parts of the largest of its condition; NaN counts as the worst."""
    total = sum(merit / (most or 1.0) for merit, most in zip(merits, scale, strict=True))
    return -math.inf if math.isnan(total) else total
