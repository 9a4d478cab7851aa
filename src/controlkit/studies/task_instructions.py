"""`controlkit study task-instructions`: what the instructions of a UniControl's tasks do, and its HyperNet.

Three questions (Qin et al. 2023, arXiv 2305.11147, sections 3.2 and 4.3):

- Is a condition image followed less under the instruction of another task, with the adapter of its own?
- Of two condition images of different targets, which act together, is the one followed whose instruction both get?
- Does a HyperNet that is trained follow conditions better than one that keeps its random weights (`frozen`)? The
  difference of the mean gap closed has a bootstrap interval over images (Efron 1979), paired, since both files
  generate from the same condition images, prompts and seeds.

Images are stored in the folder of the study; running it again resumes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from controlkit import conditions
from controlkit.bases.base import Base
from controlkit.bases.load import load_base
from controlkit.controls.unicontrol import UniControl
from controlkit.errors import UserError
from controlkit.evaluation.report import Report, Row, gap_closed
from controlkit.evaluation.sampling import EvalControl, generate_controlled, generate_uncontrolled, reconstruct
from controlkit.evaluation.sets import evaluation_set
from controlkit.evaluation.settings import content_of, control_settings, examples_settings
from controlkit.formats.load import load_control
from controlkit.images import contact_sheet, write_png
from controlkit.sampling.request import DEFAULT_STEPS
from controlkit.sampling.settings import sampling_settings
from controlkit.sampling.uses import mode_name
from controlkit.studies.stored_results import (
    StoredResults,
    StudyResult,
    check_sampling_steps,
    study_settings,
    with_settings,
)

_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class TaskInstructions:
    """Settings of the study."""

    control: str = "runs/nano/unicontrol/unicontrol.safetensors"
    """A UniControl."""
    frozen: str | None = None
    """Another of the same tasks, trained with `freeze_hypernet: true`; null leaves the comparison out."""
    out: str = "runs/study/task-instructions"
    """Folder for the sheet and stored results (`kept/`; delete it to sample again)."""
    base: str = "nano"
    """The base."""
    device: str = "auto"
    """`cpu`, `cuda`, `mps`, or `auto` for the best available."""
    pairs: tuple[str, ...] = ()
    """Tasks whose condition images act together, joined by `+`; default: each task with the next."""
    mode: str | None = None
    """Mode of the controls (`ControlUse.mode`); null is that of the base."""
    images: int = 96
    """Held-out images."""
    sampling_steps: int = DEFAULT_STEPS
    """DDIM steps."""
    resamples: int = 10_000
    """Bootstrap samples."""

    def __post_init__(self) -> None:
        check_sampling_steps(self.sampling_steps)
        if self.images < 2 or self.sampling_steps < 1 or self.resamples < 1:
            raise UserError(
                f"images {self.images}, sampling_steps {self.sampling_steps}, resamples {self.resamples}: expected at"
                " least 2, 1 and 1",
                "out-of-range",
            )
        object.__setattr__(self, "mode", mode_name(self.mode))


def run_task_instructions(settings: TaskInstructions) -> StudyResult:
    """Sample and score.

    Raises:
        UserError: a file is missing or no UniControl of several conditions, or the two have different ones.
    """
    base = load_base(settings.base, device=settings.device)
    control = _several(settings.control, base)
    bench = _Bench(settings, base, control.conditions)
    pairs = [_pair(text, bench.tasks) for text in settings.pairs] or list(pairwise(bench.tasks))
    reports = [bench.swapped(control), bench.together(control, pairs)]
    if settings.frozen is not None:
        other = _several(settings.frozen, base)
        if set(other.conditions) != set(control.conditions):
            raise UserError(
                f"{settings.frozen} has the conditions {', '.join(other.conditions)}, and {settings.control}"
                f" {', '.join(control.conditions)}",
                "contradiction",
            )
        reports.append(bench.compared(control, other))
    shared = study_settings(settings, base, mode=settings.mode or base.default_mode)
    path = Path(settings.out) / "task-instructions.png"
    write_png(path, bench.sheet())
    details = {"sets": [examples_settings(bench.examples)]}
    return StudyResult(reports=with_settings(reports, shared | details), files={"images": path})


def _several(path: str, base: Base) -> UniControl:
    control = load_control(path, base)
    if not isinstance(control, UniControl) or len(control.conditions) < 2:
        raise UserError(f"{path} is {control.title}, not a UniControl of several conditions", "wrong-kind")
    return control


def _pair(text: str, tasks: Sequence[str]) -> tuple[str, str]:
    names = text.split("+")
    if len(set(names)) != 2 or not set(names) <= set(tasks):
        raise UserError(f"{text!r} is not a pair; join two of {', '.join(tasks)} with +", "contradiction")
    return names[0], names[1]


class _Bench:
    """Held-out images with a condition image of each task; results are stored."""

    def __init__(self, settings: TaskInstructions, base: Base, tasks: Sequence[str]) -> None:
        self.settings, self.base, self.tasks = settings, base, tasks
        self.examples = evaluation_set("held-out").take(settings.images)
        self.targets, self.prompts = self.examples.images, self.examples.captions
        self.kinds = {task: conditions.find(task) for task in tasks}
        self.given = {task: [kind(target) for target in self.targets] for task, kind in self.kinds.items()}
        self.stored = StoredResults(
            Path(settings.out),
            {
                "base": base.content,
                "set": content_of(self.targets, self.prompts),
                **sampling_settings(base, steps=settings.sampling_steps),
            },
        )
        self.without = {False: self._without(self.prompts), True: self._without([""] * len(self.prompts))}
        """Whether prompts are empty -> images without control."""
        self.ceiling = reconstruct(base, self.targets)
        self.strips: dict[str, Sequence[np.ndarray]] = {}

    def _without(self, prompts: Sequence[str]) -> list[np.ndarray]:
        steps = self.settings.sampling_steps
        return self.stored.images(
            "without control", {"prompts": list(prompts)}, lambda: generate_uncontrolled(self.base, prompts, steps)
        )

    def _generate(
        self,
        control: UniControl,
        given: Mapping[str, Sequence[np.ndarray]],
        instruction: str,
        prompts: Sequence[str],
    ) -> list[np.ndarray]:
        """Images under the condition images of these tasks, all with the instruction of one."""
        uses = [
            EvalControl(
                control=control.for_task(task, control.tasks[instruction]),
                condition_images=images,
                mode=self.settings.mode,
            )
            for task, images in given.items()
        ]
        acting: dict[str, Any] = {
            "controls": [
                {**control_settings(self.base, use.control, weight=1.0, mode=self.settings.mode), "task": task}
                for task, use in zip(given, uses, strict=True)
            ],
            "given": {task: content_of(images, ()) for task, images in given.items()},
            "instruction": instruction,
            "prompts": list(prompts),
        }
        what = f"{' + '.join(given)}, instruction of {instruction}"
        steps = self.settings.sampling_steps
        return self.stored.images(what, acting, lambda: generate_controlled(self.base, uses, prompts, steps=steps))

    def _scores(self, task: str, results: Sequence[np.ndarray], order: Sequence[int] | None = None) -> np.ndarray:
        """The fidelity of each image to the condition image of a task, of the targets in this order."""
        order = range(len(results)) if order is None else order
        kind, given = self.kinds[task], self.given[task]
        return np.array(
            [
                kind.score(given[place], result, self.targets[place])
                for place, result in zip(order, results, strict=True)
            ]
        )

    def _closed(
        self,
        task: str,
        results: Sequence[np.ndarray],
        order: Sequence[int] | None = None,
        *,
        empty_prompts: bool = False,
    ) -> float:
        """The gap closed of a task's condition."""
        order = range(len(results)) if order is None else order
        ceiling = [self.ceiling[place] for place in order]
        means = [
            float(self._scores(task, images, order).mean())
            for images in (self.without[empty_prompts], results, ceiling)
        ]
        return gap_closed(*means, higher_is_better=self.kinds[task].fidelity.higher_is_better)

    def swapped(self, control: UniControl) -> Report:
        """One condition image with the adapter of its task, under the instruction of each task."""
        rows: list[Row] = []
        for task in self.tasks:
            values = []
            for instruction in self.tasks:
                results = self._generate(control, {task: self.given[task]}, instruction, self.prompts)
                values.append(self._closed(task, results))
                self.strips[f"{task}, instruction of {instruction}"] = results
            own = values[self.tasks.index(task)]
            others = [value for instruction, value in zip(self.tasks, values, strict=True) if instruction != task]
            rows.append((task, own, float(np.mean(others)), max(others)))
        return Report(
            title=f"Gap closed under the task's own instruction and under others ({len(self.targets)} images)",
            columns=("condition and adapter", "own instruction", "mean of others", "best of others"),
            rows=tuple(rows),
        )

    def together(self, control: UniControl, pairs: Sequence[tuple[str, str]]) -> Report:
        """Two condition images of different targets, without prompts, both under the instruction of one task."""
        rows: list[Row] = []
        count = len(self.targets)
        shifted = [(place + 1) % count for place in range(count)]
        prompts = [""] * count
        for first, second in pairs:
            given = {first: self.given[first], second: [self.given[second][place] for place in shifted]}
            closed = []
            for instruction in (first, second):
                results = self._generate(control, given, instruction, prompts)
                closed.append(
                    (
                        self._closed(first, results, empty_prompts=True),
                        self._closed(second, results, shifted, empty_prompts=True),
                    )
                )
                self.strips[f"{first} + {second}, instruction of {instruction}"] = results
            (first_by_first, second_by_first), (first_by_second, second_by_second) = closed
            rows.append((first, second, first_by_first, first_by_second))
            rows.append((second, first, second_by_second, second_by_first))
        return Report(
            title=f"Gap closed to one of two condition images of different targets ({count} images, no prompts)",
            columns=("followed", "beside it", "own instruction for both", "the other's for both"),
            rows=tuple(rows),
        )

    def compared(self, control: UniControl, frozen: UniControl) -> Report:
        """Gap closed of both files by condition, and the bootstrap interval of the difference of their means."""
        rng = np.random.default_rng(0)
        count = len(self.targets)
        resampled = rng.integers(count, size=(self.settings.resamples, count))
        rows: list[Row] = []
        differences, gaps = [], []
        for task in self.tasks:
            images = {
                name: self._generate(one, {task: self.given[task]}, task, self.prompts)
                for name, one in (("trained", control), ("frozen", frozen))
            }
            scores = {name: self._scores(task, results) for name, results in images.items()}
            baseline, ceiling = (self._scores(task, results) for results in (self.without[False], self.ceiling))
            trained, still = (
                gap_closed(
                    float(baseline.mean()),
                    float(scores[name].mean()),
                    float(ceiling.mean()),
                    higher_is_better=self.kinds[task].fidelity.higher_is_better,
                )
                for name in ("trained", "frozen")
            )
            gap = (ceiling[resampled].mean(1) - baseline[resampled].mean(1)).astype(float)
            if math.isnan(trained):  # no gap to close, so the difference is of nothing either
                gap[:] = math.nan
            differences.append((scores["trained"] - scores["frozen"])[resampled].mean(1) / gap)
            gaps.append((trained, still))
            low, high = np.quantile(differences[-1], (0.025, 0.975))
            rows.append((task, trained, still, trained - still, float(low), float(high)))
        trained, still = (float(np.mean(values)) for values in zip(*gaps, strict=True))
        low, high = np.quantile(np.mean(differences, 0), (0.025, 0.975))
        rows.append(("mean", trained, still, trained - still, float(low), float(high)))
        return Report(
            title=f"Gap closed with a trained and with a frozen HyperNet ({count} images)",
            columns=("condition", "trained", "frozen", "difference", "2.5 %", "97.5 %"),
            rows=tuple(rows),
            notes=(f"interval: {self.settings.resamples:,} bootstrap samples of the images, paired.",),
            facts={"trained": trained, "frozen": still, "interval": [float(low), float(high)]},
        )

    def sheet(self) -> Image.Image:
        """The first results of every setting, and the targets."""
        strips = {**self.strips, "target": self.targets}
        cells = [[Image.fromarray(image) for image in strip[:_SHOWN]] for strip in strips.values()]
        return contact_sheet(cells, row_titles=list(strips), cell=80)
