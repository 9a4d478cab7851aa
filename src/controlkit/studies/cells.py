"""Cells of a study: a control trained by one method on one task, with its score."""

from __future__ import annotations

import dataclasses
import math
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
from controlkit.errors import UserError
from controlkit.evaluation.eval_set import EvalSet
from controlkit.evaluation.report import gap_closed
from controlkit.evaluation.sampling import EvalControl, generate_controlled, generate_uncontrolled, reconstruct
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
    """A new condition: pairs to train on, and images to evaluate on."""

    name: str
    condition: conditions.Condition
    """Scores fidelity."""
    pairs: Path
    held_out: float
    """Fraction of the pairs that is not trained on."""
    eval_set: EvalSet

    def settings(self) -> dict[str, Any]:
        """Settings that scores depend on besides the control, as plain values."""
        return {
            "condition": condition_settings(self.condition),
            "pairs": {"folder": str(self.pairs), "held_out": self.held_out, "content": self.pairs_content[:16]},
            "sets": [
                set_settings(
                    self.eval_set.name,
                    self.eval_set.targets,
                    self.eval_set.prompts,
                    condition_images=self.eval_set.condition_images,
                    references=self.eval_set.references or (),
                    parameters=self.eval_set.parameters,
                )
            ],
            "seeds": seeds_of(len(self.eval_set.targets)),
        }

    @cached_property
    def pairs_content(self) -> str:
        """Hash of the training pairs, as files of the same name may change."""
        pairs = read_pairs(self.pairs, self.condition.name)
        sides = [side.read_bytes() for pair in pairs for side in (pair.source, pair.target)]
        return sha256_of(*sides, *(text for pair in pairs for text in pair.captions))

    @cached_property
    def images_content(self) -> str:
        """Hash of the evaluation images, their prompts and parameters."""
        images = (*self.eval_set.condition_images, *self.eval_set.targets, *(self.eval_set.references or ()))
        pixels = [np.ascontiguousarray(image).tobytes() for image in images]
        parameters = self.eval_set.parameters or ()
        recorded = [repr(list(map(dict, parameters)))] if any(parameters) else []
        return sha256_of(*pixels, *self.eval_set.prompts, *recorded)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """The result of one method on one task after some steps."""

    task: str
    method: str
    rank: int | None
    pairs: int
    steps: int
    rate: float
    score: float
    baseline: float
    ceiling: float
    higher_is_better: bool
    """False if the scores are distances."""
    parameters: int
    """Number of trained parameters."""
    run: str
    """Name of the folder of the training run."""
    seconds: float
    """Time from loading to the last step, on the machine that trained it."""

    @property
    def gap_closed(self) -> float:
        """0 without control, 1 at the target through the autoencoder."""
        return gap_closed(self.baseline, self.score, self.ceiling, higher_is_better=self.higher_is_better)


def _steps_done(folder: Path) -> int:
    """Steps of the run in `folder`; 0 if there is none or its state cannot be read (training reports that)."""
    try:
        return step_of(folder / "state.safetensors")
    except (SafetensorError, KeyError, ValueError, OSError):
        return 0


def _stored_cell(path: Path) -> Cell | None:
    """The cell in a file; None if there is none, or the file is damaged."""
    if not path.exists():
        return None
    try:
        stored = read_json(path)
        if "higher_is_better" not in stored:  # earlier versions wrote it among the settings only
            stored["higher_is_better"] = stored["settings"]["condition"]["higher_is_better"]
        stored |= {name: math.nan for name in ("score", "baseline", "ceiling") if stored[name] is None}
        return Cell(**{field.name: stored[field.name] for field in dataclasses.fields(Cell)})
    except (UserError, KeyError, TypeError):
        print(f"note: {path} is damaged and does not count", file=sys.stderr)
        return None


class Bench:
    """Trains and evaluates each cell once and stores it in its own file.

    Several processes can share the work, on different conditions.

    Args:
        folder: of the study.
        base: the base of all controls.
        setting: what else the numbers depend on (such as the base control); other settings get other files.
        sampling_steps: denoising steps of the evaluation.
        mode: mode of the controls, one of `uses.MODES`.
    """

    def __init__(
        self, folder: Path, base: Base, setting: Sequence[str], *, sampling_steps: int, mode: str = "balanced"
    ) -> None:
        self.folder = folder
        self.base = base
        self.key = sha256_of(base.content, str(sampling_steps), *setting, mode)[:12]
        self.mode = mode
        self.sampling_steps = sampling_steps
        self.results = folder / f"results-{self.key}"
        self._baselines: dict[tuple[str, str], tuple[float, float]] = {}

    def cell(self, task: Task, method: str, recipe: ControlRecipe, *, trained: bool = True) -> Cell:
        """Train by `recipe`, resuming from fewer steps, and evaluate on the images of the task.

        Other images are evaluated on the same training.

        Args:
            trained: False evaluates the control as training starts from it, as the cell of 0 steps.
        """
        settings = {name: value for name, value in identifying(recipe).items() if name != "out"}
        if not trained:
            settings["steps"] = 0
        content = (task.pairs_content, task.images_content)
        identity = sha256_of(task.name, method, *content, repr(sorted(settings.items())))[:24]
        path = self.results / f"{identity}.json"
        if _stored_cell(path) is None:
            # Pairs of the same name may have changed; training must not resume from weights of other pairs.
            out = f"{recipe.out}-{task.pairs_content[:8]}"
            if trained and _steps_done(Path(out)) > recipe.steps:
                out += f"-{recipe.steps}-steps"
            recipe = dataclasses.replace(recipe, out=out)
            measured = dataclasses.asdict(self._measure(task, method, recipe, trained=trained))
            write_json(path, {**measured, "settings": self._settings(task, recipe)})
        cell = _stored_cell(path)
        assert cell is not None
        return cell

    def _settings(self, task: Task, recipe: ControlRecipe) -> dict[str, Any]:
        """Settings that a cell depends on, as plain values, for readers of its file."""
        return {
            **base_settings(self.base),
            **sampling_settings(self.base, steps=self.sampling_steps),
            "mode": self.mode,
            "weight": 1.0,
            **task.settings(),
            "recipe": {"system": recipe.system, **identifying(recipe)},
        }

    def sheet_path(self, task: Task, run: str, steps: int) -> Path:
        """Path of a strip of the first images of a cell."""
        return self.folder / "pictures" / self.key / f"{run}-{task.images_content[:8]}-{steps:05d}.png"

    def _measure(self, task: Task, method: str, recipe: ControlRecipe, *, trained: bool) -> Cell:
        steps = recipe.steps if trained else 0
        print(f"{task.name}: {method}, {steps} steps", file=sys.stderr)
        started = time.perf_counter()
        objective = objective_of(recipe)
        assert isinstance(objective, ControlObjective)
        if trained:
            train(objective, recipe)
        seconds = time.perf_counter() - started + self._seconds_before(recipe) if trained else 0.0
        control = objective.control.eval()
        use = EvalControl(control=control, condition_images=task.eval_set.condition_images, mode=self.mode)
        prompts = task.eval_set.prompts
        results = generate_controlled(self.base, [use], prompts, steps=self.sampling_steps)
        baseline, ceiling = self._baselines_of(task)
        score = _score(task, results)
        rows = [[Image.fromarray(image) for image in results[:_SHOWN]]]
        sheet = self.sheet_path(task, Path(recipe.out).name, steps)
        write_png(sheet, contact_sheet(rows, cell=self.base.size, gap=0))
        cell = Cell(
            task=task.name,
            method=method,
            rank=getattr(recipe, "rank", None),
            pairs=int(objective.source.facts()["pairs"]),
            steps=steps,
            rate=recipe.learning_rate,
            score=score,
            baseline=baseline,
            ceiling=ceiling,
            higher_is_better=task.condition.fidelity.higher_is_better,
            parameters=sum(parameter.numel() for parameter in objective.parameters()),
            seconds=seconds,
            run=Path(recipe.out).name,
        )
        print(f"{task.name}: {method}, {steps} steps: {score:.3f}, gap closed {cell.gap_closed:.2f}", file=sys.stderr)
        return cell

    def _seconds_before(self, recipe: ControlRecipe) -> float:
        """Time that the same run took for its steps so far, which it does not take again."""
        stored = [_stored_cell(path) for path in self.results.glob("*.json")]
        same = [cell for cell in stored if cell is not None and cell.run == Path(recipe.out).name]
        return max((cell.seconds for cell in same if cell.steps <= recipe.steps), default=0.0)

    def _baselines_of(self, task: Task) -> tuple[float, float]:
        """Scores of the baseline (no control, same prompts and seeds) and the ceiling (targets through the
        autoencoder)."""
        eval_set = task.eval_set
        key = (task.condition.name, content_of(eval_set.targets, eval_set.prompts, eval_set.condition_images))
        if key not in self._baselines:
            no_control = generate_uncontrolled(self.base, eval_set.prompts, self.sampling_steps)
            self._baselines[key] = (_score(task, no_control), _score(task, reconstruct(self.base, eval_set.targets)))
        return self._baselines[key]


def _score(task: Task, results: Sequence[np.ndarray]) -> float:
    examples = task.eval_set
    return float(np.mean(examples.scores(task.condition, results)))
