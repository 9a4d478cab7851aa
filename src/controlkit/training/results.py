"""What a run tells its caller: each step, and how it ended."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class TrainStep:
    """A training step that is done."""

    step: int
    """Its number, from 1."""
    steps: int
    """Steps of the run."""
    loss: float
    """Loss of the last step whose loss was read, which is every `log_every` steps; NaN before."""
    scores: dict[str, float]
    """Scores of the last preview; empty before."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A finished run."""

    step: int
    """Steps after which the files were written: fewer than those of the run if `patience` chose an earlier preview."""
    scores: dict[str, float]
    """Scores of the preview after that step."""
    scored: dict[str, Any]
    """Settings of its samples: `Objective.preview_settings`."""
    files: tuple[Path, ...]
    """Files of the finished networks; empty in all processes but the first."""
    preview: Path | None
    """Image of that preview."""
    seconds: float
    """Duration of the run, over all its parts."""
    finished_before: bool = False
    """Whether the run had finished already, so that nothing was trained."""
    stopped_before: bool = False
    """Whether `patience` had ended the run already, before its last step, so that nothing was trained."""
    same_files: bool = False
    """Whether the run had finished already, with files of the same step."""
    base_runs: str = ""
    """`Objective.base_runs` at the end."""
