"""One measured number of a study: a control trained in one way on one task, and judged."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors import SafetensorError

from controlkit import conditions
from controlkit.bases.base import Base
from controlkit.data.pairs import read_pairs
from controlkit.evaluation.evaluate_control import EvalSet, Steer, draw_controlled
from controlkit.evaluation.report import gap_closed
from controlkit.evaluation.sampling import draw_prompts, reconstruct
from controlkit.evaluation.settings import condition_settings, content_of, seeds_of, set_settings
from controlkit.files import read_json, sha256_of, write_json
from controlkit.images import contact_sheet, write_png
from controlkit.sampling.settings import base_settings, sampling_settings
from controlkit.training.control_objective import ControlObjective
from controlkit.training.recipe import ControlRecipe, identifying
from controlkit.training.run import objective_of
from controlkit.training.state import step_of
from controlkit.training.trainer import train

_SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class Task:
    """A novel condition: pairs to learn it from, and images to be judged by."""

    name: str
    condition: conditions.Condition
    """By which fidelity is scored."""
    pairs: Path
    held_out: float
    """Share of the pairs that is not trained on."""
    judged: EvalSet

    def settings(self) -> dict[str, Any]:
        """What its numbers depend on besides the control, as plain values."""
        judged = self.judged
        return {
            "condition": condition_settings(self.condition),
            "pairs": {"folder": str(self.pairs), "held_out": self.held_out, "content": self.content[:16]},
            "sets": [
                set_settings(
                    judged.name, judged.truths, judged.prompts, given=judged.given, parameters=judged.parameters
                )
            ],
            "seeds": seeds_of(len(judged.truths)),
        }

    @cached_property
    def content(self) -> str:
        """Hash of what is learned from and judged by: files of the same name may have changed."""
        shown = [np.ascontiguousarray(image).tobytes() for image in (*self.judged.given, *self.judged.truths)]
        listed = read_pairs(self.pairs, self.condition.name)
        sides = [side.read_bytes() for pair in listed for side in (pair.source, pair.target)]
        return sha256_of(*shown, *self.judged.prompts, *sides, *(text for pair in listed for text in pair.captions))


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What was measured, and the result."""

    task: str
    method: str
    rank: int | None
    pairs: int
    steps: int
    rate: float
    score: float
    baseline: float
    ceiling: float
    parameters: int
    """That were trained."""
    run: str
    """Name of the training run's folder."""
    seconds: float
    """From loading to the last step, on the machine that ran it."""

    @property
    def gap_closed(self) -> float:
        """0 as good as no control, 1 as good as the true image through the autoencoder."""
        return gap_closed(self.baseline, self.score, self.ceiling)


def _steps_done(folder: Path) -> int:
    """Steps of the run in `folder`; 0 where none is, or its state cannot be read (training says so)."""
    try:
        return step_of(folder / "state.safetensors")
    except (SafetensorError, KeyError, ValueError, OSError):
        return 0


class Bench:
    """Trains and judges cells once. Each has a file of its own, so that several processes can share the work, each on
    conditions of its own.

    Args:
        setting: whatever else the numbers depend on (base, base control, ...); others get files of their own.
        mode: in which controls act, of `request.MODES`.
    """

    def __init__(
        self, folder: Path, base: Base, setting: Sequence[str], *, sampling_steps: int, mode: str = "balanced"
    ) -> None:
        self.folder = folder
        self.base = base
        # What was measured before there were modes was measured in this one.
        modes = [] if mode == "balanced" else [mode]
        self.key = sha256_of(base.fingerprint, str(sampling_steps), *setting, *modes)[:12]
        self.mode = mode
        self.sampling_steps = sampling_steps
        self.results = folder / f"results-{self.key}"
        self._ends: dict[tuple[str, str], tuple[float, float]] = {}

    def cell(self, task: Task, method: str, recipe: ControlRecipe) -> Cell:
        """Train by `recipe` (going on from fewer steps where that was done) and judge on the task's images."""
        settings = {name: value for name, value in identifying(recipe).items() if name != "out"}
        identity = sha256_of(task.name, method, task.content, repr(sorted(settings.items())))[:24]
        path = self.results / f"{identity}.json"
        if not path.exists():
            # Pairs of the same name may have changed: weights that were trained on others must not be gone on from.
            out = f"{recipe.out}-{task.content[:8]}"
            if _steps_done(Path(out)) > recipe.steps:
                out += f"-{recipe.steps}-steps"
            recipe = dataclasses.replace(recipe, out=out)
            measured = dataclasses.asdict(self._measure(task, method, recipe))
            write_json(path, {**measured, "settings": self._settings(task, recipe)})
        kept = read_json(path)
        return Cell(**{field.name: kept[field.name] for field in dataclasses.fields(Cell)})

    def _settings(self, task: Task, recipe: ControlRecipe) -> dict[str, Any]:
        """What a cell's numbers depend on, as plain values, for whoever reads its file."""
        return {
            **base_settings(self.base),
            **sampling_settings(self.base, steps=self.sampling_steps),
            "mode": self.mode,
            "weight": 1.0,
            **task.settings(),
            "recipe": {"system": recipe.system, **identifying(recipe)},
        }

    def sheet_path(self, run: str, steps: int) -> Path:
        """The first images that a cell drew, in a row."""
        return self.folder / "pictures" / self.key / f"{run}-{steps:05d}.png"

    def _measure(self, task: Task, method: str, recipe: ControlRecipe) -> Cell:
        print(f"{task.name}: {method}, {recipe.steps} steps", file=sys.stderr)
        started = time.perf_counter()
        objective = objective_of(recipe)
        assert isinstance(objective, ControlObjective)
        train(objective, recipe)
        seconds = time.perf_counter() - started
        control = objective.control.eval()
        use = Steer(control=control, given=task.judged.given, mode=self.mode)
        prompts = task.judged.prompts
        results = draw_controlled(self.base, [use], prompts, steps=self.sampling_steps)
        baseline, ceiling = self._ends_of(task)
        score = _score(task, results)
        rows = [[Image.fromarray(image) for image in results[:_SHOWN]]]
        write_png(self.sheet_path(Path(recipe.out).name, recipe.steps), contact_sheet(rows, cell=self.base.size, gap=0))
        closed = gap_closed(baseline, score, ceiling)
        print(f"{task.name}: {method}, {recipe.steps} steps: {score:.3f}, gap closed {closed:.2f}", file=sys.stderr)
        return Cell(
            task=task.name,
            method=method,
            rank=getattr(recipe, "rank", None),
            pairs=objective.source.facts()["pairs"],
            steps=recipe.steps,
            rate=recipe.learning_rate,
            score=score,
            baseline=baseline,
            ceiling=ceiling,
            parameters=sum(parameter.numel() for parameter in objective.parameters()),
            seconds=seconds + self._seconds_before(recipe),
            run=Path(recipe.out).name,
        )

    def _seconds_before(self, recipe: ControlRecipe) -> float:
        """What the same run took with fewer steps."""
        kept = [read_json(path) for path in self.results.glob("*.json")]
        same = [entry for entry in kept if entry["run"] == Path(recipe.out).name]
        return max((entry["seconds"] for entry in same if entry["steps"] < recipe.steps), default=0.0)

    def _ends_of(self, task: Task) -> tuple[float, float]:
        """Baseline (no control, same prompts and seeds) and ceiling (the truth through the autoencoder)."""
        judged = task.judged
        key = (task.condition.name, content_of(judged.truths, judged.prompts, judged.given))
        if key not in self._ends:
            without = draw_prompts(self.base, judged.prompts, self.sampling_steps)
            self._ends[key] = (_score(task, without), _score(task, reconstruct(self.base, judged.truths)))
        return self._ends[key]


def _score(task: Task, results: Sequence[np.ndarray]) -> float:
    return task.condition.mean_score(task.judged.given, results, task.judged.truths)
