"""`controlkit study new-condition`: does an adapter learn a new condition faster than a ControlNet?

The experiments of Xu et al. 2025 (arXiv 2410.09400: figure 6 and table 3, table 4, figures 8 and 9) on a small base.
Every method trains on the same pairs, in the same order, for the same steps, and generates the same images from the
same noise. The learning rate is constant, so that one run gives all its budgets.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from controlkit import conditions
from controlkit.bases.base import Base
from controlkit.bases.load import load_base
from controlkit.controls.ctrlora import BaseControlNet
from controlkit.data.pairs import MANIFEST, read_pairs, split_pairs, write_pairs
from controlkit.errors import UserError, nearest
from controlkit.evaluation.eval_set import examples_eval_set, pairs_eval_set
from controlkit.evaluation.report import Report
from controlkit.evaluation.sets import EvaluationSet, evaluation_set
from controlkit.files import one_spelling, read_json, sha256_of, spelled, write_atomically, write_json
from controlkit.formats.companions import fingerprint_in
from controlkit.formats.detect import detect
from controlkit.formats.load import find_control
from controlkit.nano.icons import TRAINED_STYLES, IconSets, draw
from controlkit.progress import Progress
from controlkit.sampling.uses import mode_name
from controlkit.studies.cells import Bench, Cell, Task
from controlkit.studies.figure import plot, require_matplotlib, sheet_of
from controlkit.studies.new_condition_tables import ADAPTER, CONTROLNET, REPORTS
from controlkit.studies.stored_results import (
    StudyResult,
    check_sampling_steps,
    settings_key,
    study_settings,
    tables_text,
    with_settings,
)
from controlkit.training.recipe import ControlRecipe
from controlkit.training.recipes import build_recipe

LATENT_INPUT, FULL_TUNING = "+ VAE embedding", "+ base initialisation"

METHODS: dict[str, dict[str, Any]] = {
    CONTROLNET: {"system": "controlnet-pairs", "prompt_drop": 0.3},
    LATENT_INPUT: {"system": "ctrlora-full", "control": None},
    FULL_TUNING: {"system": "ctrlora-full"},
    ADAPTER: {"system": "ctrlora-adapter"},
}
"""The rows of the ablation (Xu et al. 2025, table 4), each adding one change to the row above: the ControlNet; the
autoencoder in place of its hint network, without x_t; initialisation from the base control; LoRA in place of full
tuning. The rate of dropped prompts is the same for all."""

PARTS = {
    "rates": "learning rates of each method, on a condition that no other part uses",
    "budgets": "adapter against ControlNet after growing numbers of steps, on every condition",
    "ablation": "from the ControlNet to the adapter, one change at a time",
    "ranks": "the adapter at growing ranks",
    "pairs": "the adapter on growing numbers of pairs",
}

_ORIGIN = "drawn-from.json"
_HELD_OUT = 0.1
"""Fraction of given pairs that is evaluated on."""

RATES = dict.fromkeys(METHODS, 1e-3)
"""The learning rate of each method: the same for all, as in the paper; the part `rates` compares others."""


@dataclass(frozen=True, kw_only=True)
class NewCondition:
    """Settings of the study. The tables in docs/ctrlora.md have the defaults."""

    out: str = "runs/study/new-condition"
    """Folder for pairs, runs, results, tables and the figure."""
    base: str = "nano"
    """The base."""
    device: str = "auto"
    """`cpu`, `cuda`, `mps`, or `auto` for the best available."""
    control: str = "nano/base"
    """The base control of the adapters."""
    icons: str = "data/nano/icons.npz"
    """Rendered icons (`recipes/nano/build_pictures.py`), the source of the pairs."""
    conditions: tuple[str, ...] = ("palette", "pixel", "lineart_color_hints", "haze")
    """New conditions, computed from images of icons."""
    given: tuple[str, ...] = ()
    """More conditions from folders of pairs, as NAME=FOLDER or NAME=FOLDER@CONDITION, scored by CONDITION."""
    parts: tuple[str, ...] = ("budgets", "ablation", "ranks", "pairs")
    """Parts to run: rates, budgets, ablation, ranks, pairs."""
    budgets: tuple[int, ...] = (25, 50, 100, 250, 500, 1000)
    """Optimiser steps."""
    pairs: int = 1000
    """Training pairs; given folders are trained on whole, except for the tenth that is evaluated on."""
    batch_size: int = 16
    """Pairs per step."""
    rank: int = 4
    """Rank of the adapters, except in the part `ranks`."""
    detail: str = "lineart_color_hints"
    """The condition of the ablation, ranks and pairs."""
    ranks: tuple[int, ...] = (2, 4, 8, 16, 32, 64)
    """Ranks to compare."""
    pair_counts: tuple[int, ...] = (100, 300, 1000, 3000, 5000)
    """Numbers of pairs to compare; of a given condition, up to those in its folder."""
    detail_steps: int = 500
    """Optimiser steps for ranks and pairs."""
    rate_condition: str = "lineart_xdog"
    """The condition of the learning rates."""
    rates: tuple[float, ...] = (3e-4, 5e-4, 1e-3, 2e-3)
    """Learning rates to compare."""
    rate_steps: int = 250
    """Optimiser steps for learning rates."""
    images: int = 64
    """Held-out images per control; of a given condition, up to its held-out tenth."""
    sampling_steps: int = 10
    """DDIM steps of these images."""
    mode: str = "balanced"
    """Mode of the controls (`ControlUse.mode`); the tables and the paper have `balanced`."""

    def __post_init__(self) -> None:
        check_sampling_steps(self.sampling_steps)
        if not self.parts:
            raise UserError(f"parts is empty; give at least one of {', '.join(PARTS)}", "missing-setting")
        for part in self.parts:
            if part not in PARTS:
                raise UserError(f"there is no part {part!r}{nearest(part, list(PARTS))}", "unknown-name")
        for name in (*self.conditions, self.rate_condition):
            conditions.find(name)
        for name in self.given:
            _parse_given(name)
        object.__setattr__(self, "mode", mode_name(self.mode))
        counts = (*self.budgets, *self.ranks, *self.pair_counts, self.pairs, self.images)
        if min(counts) < 1 or not self.budgets:
            raise UserError("budgets, ranks, pair_counts, pairs and images must be at least 1", "out-of-range")
        if min((self.pairs, *self.pair_counts)) < 2:
            raise UserError(
                "pairs and pair_counts must be at least 2, as one pair is held out for previews", "out-of-range"
            )
        for part, name in (("ranks", "ranks"), ("pairs", "pair_counts"), ("rates", "rates")):
            if part in self.parts and not getattr(self, name):
                raise UserError(f"{name} is empty; give at least one, or leave out the part {part}", "missing-setting")
        known = [*self.conditions, *(_parse_given(name)[0] for name in self.given)]
        if repeated := sorted({name for name in known if known.count(name) > 1}):
            raise UserError(f"conditions {', '.join(repeated)} repeat; name each once", "contradiction")
        if self.detail not in known:
            raise UserError(
                f"detail is {self.detail!r}; expected one of the conditions of the study: {', '.join(known)}",
                "unknown-name",
            )


@dataclass(frozen=True, kw_only=True)
class NewConditionResult(StudyResult):
    """Tables, files and cells of the study."""

    cells: tuple[Cell, ...]

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "cells": [{**vars(cell), "gap_closed": cell.gap_closed} for cell in self.cells]}


def run_new_condition(settings: NewCondition) -> NewConditionResult:
    """Compute the missing cells, and report all.

    Raises:
        UserError: icons, pairs, the base control or matplotlib are missing.
    """
    require_matplotlib()  # the figure comes last, after hours
    return Trainings(settings).study()


_Job = Callable[[], Cell]


class Trainings:
    """The trainings of the study, each computed once (`cell`), what each starts from (`untrained`), and its reports."""

    def __init__(self, settings: NewCondition) -> None:
        self.settings = settings
        # Runs and cells are found again by their recipes, however the paths in those are spelled.
        self.out = one_spelling(settings.out)
        self.base: Base = load_base(settings.base, device=settings.device)
        self.fingerprint = _base_control_fingerprint(settings.control)
        self.bench = Bench(
            self.out, self.base, [self.fingerprint], sampling_steps=settings.sampling_steps, mode=settings.mode
        )
        self.given = {name: _Given(one_spelling(folder), by) for name, folder, by in map(_parse_given, settings.given)}
        self.tasks: dict[tuple[str, int], Task] = {}
        self.jobs: dict[str, Callable[[], Iterator[_Job]]] = {
            "rates": self.rates,
            "budgets": self.budgets,
            "ablation": self.ablation,
            "ranks": self.ranks,
            "pairs": self.pairs,
        }

    @cached_property
    def held_out(self) -> EvaluationSet[Any]:
        """The held-out images, of which each control gets the first.

        Raises:
            UserError: there are fewer than the settings ask for.
        """
        return evaluation_set("held-out").take(self.settings.images)

    @cached_property
    def sets(self) -> IconSets:
        """The icons."""
        return IconSets(self.settings.icons)

    def study(self) -> NewConditionResult:
        jobs = {part: list(self.jobs[part]()) for part in PARTS if part in self.settings.parts}
        progress = Progress("cells of the study", sum(map(len, jobs.values())))
        computed: dict[str, list[Cell]] = {}
        for part, group in jobs.items():
            for job in group:
                computed.setdefault(part, []).append(job())
                progress.advance()
        reports = self.with_settings([report for part, cells in computed.items() for report in REPORTS[part](cells)])
        cells = tuple(cell for group in computed.values() for cell in group)
        return NewConditionResult(reports=reports, cells=cells, files=self._write(computed, reports))

    def with_settings(self, reports: Sequence[Report], study: Any = None) -> tuple[Report, ...]:
        """Add settings to `reports`.

        Args:
            study: settings of the study; None is `NewCondition`'s.
        """
        shared = study_settings(study or self.settings, self.base, mode=self.settings.mode)
        tasks = {f"{name}, {count} pairs": task.settings() for (name, count), task in self.tasks.items()}
        control = {"name": self.settings.control, "fingerprint": self.fingerprint}
        return with_settings(reports, {**shared, "base_control": control, "tasks": tasks})

    def rates(self) -> Iterator[_Job]:
        settings = self.settings
        for method in (CONTROLNET, ADAPTER):
            for rate in settings.rates:
                yield partial(
                    self.cell, settings.rate_condition, settings.pairs, method, settings.rate_steps, rate=rate
                )

    def budgets(self) -> Iterator[_Job]:
        for name in self.names():
            yield partial(self.untrained, name, self.count(name))
            for method in (ADAPTER, CONTROLNET):
                for steps in sorted(self.settings.budgets):
                    yield partial(self.cell, name, self.count(name), method, steps)

    def ablation(self) -> Iterator[_Job]:
        for method in METHODS:
            for steps in sorted(self.settings.budgets):
                yield partial(self.cell, self.settings.detail, self.count(self.settings.detail), method, steps)

    def ranks(self) -> Iterator[_Job]:
        settings = self.settings
        for rank in settings.ranks:
            count = self.count(settings.detail)
            yield partial(self.cell, settings.detail, count, ADAPTER, settings.detail_steps, rank=rank)

    def pairs(self) -> Iterator[_Job]:
        if self.settings.detail in self.given:
            most = self.count(self.settings.detail)
            if above := [count for count in self.settings.pair_counts if count > most]:
                raise UserError(
                    f"pair_counts has {', '.join(map(str, above))}, but {self.given[self.settings.detail].folder} has"
                    f" {most} pairs to train on; give numbers up to that",
                    "out-of-range",
                )
        for count in self.settings.pair_counts:
            yield partial(self.cell, self.settings.detail, count, ADAPTER, self.settings.detail_steps)

    def names(self) -> list[str]:
        return [*self.settings.conditions, *self.given]

    def count(self, name: str) -> int:
        """Number of training pairs of the condition `name`; of a given one, all of its folder."""
        return len(self.given[name].training) if name in self.given else self.settings.pairs

    def untrained(self, name: str, pairs: int) -> Cell:
        """Evaluate the adapter at step 0: the base control alone."""
        # Step 1 stands for any: nothing is trained, and the cell does not depend on the budgets.
        return self.bench.cell(self.task(name, pairs), ADAPTER, self._recipe(name, pairs, ADAPTER, 1), trained=False)

    def cell(
        self, name: str, pairs: int, method: str, steps: int, *, rank: int | None = None, rate: float | None = None
    ) -> Cell:
        """Train `method` on `pairs` pairs of the condition `name`, and evaluate it."""
        recipe = self._recipe(name, pairs, method, steps, rank=rank, rate=rate)
        return self.bench.cell(self.task(name, pairs), method, recipe)

    def _recipe(
        self, name: str, pairs: int, method: str, steps: int, *, rank: int | None = None, rate: float | None = None
    ) -> ControlRecipe:
        task = self.task(name, pairs)
        rate = RATES[method] if rate is None else rate
        system: dict[str, Any] = dict(METHODS[method])
        if method in (ADAPTER, FULL_TUNING):
            system["control"] = spelled(self.settings.control)
        if method == ADAPTER:
            system["rank"] = rank or self.settings.rank
        batch_size = self.settings.batch_size
        label = "-".join(
            [
                *([] if task.pairs.name.startswith(task.name) else [task.name]),
                task.pairs.name,
                method.replace("+ ", "").replace(" ", "-"),
                *([f"r{system['rank']}"] if "rank" in system else []),
                *([f"{pairs}-pairs"] if name in self.given and pairs < self.count(name) else []),
                *([] if steps in self.settings.budgets else [f"{steps}-steps"]),
                # Names of runs at the default are as before, so that they resume.
                *([] if batch_size == NewCondition.batch_size else [f"batch-{batch_size}"]),
            ]
        )
        recipe = build_recipe(
            {
                **system,
                "name": task.name,
                "pairs": str(task.pairs),
                "base": spelled(self.settings.base),
                "device": self.settings.device,
                "condition": task.condition.name,
                "held_out": task.held_out,
                "out": str(self.out / "runs" / self.bench.key / f"{label}-{rate:g}"),
                "steps": steps,
                "batch_size": batch_size,
                "learning_rate": rate,
                "min_lr_rate": 1.0,
                "warmup_steps": 10,
                "save_every": 100,
                "preview_every": 1_000_000,
                "log_every": 50,
                "score_pictures": 1,
            },
            origin="controlkit study",
        )
        assert isinstance(recipe, ControlRecipe)
        return recipe

    def task(self, name: str, count: int) -> Task:
        """The condition `name` with `count` pairs, computed once."""
        if (name, count) not in self.tasks:
            self.tasks[name, count] = self._task(name, count)
        return self.tasks[name, count]

    def _task(self, name: str, count: int) -> Task:
        if name in self.given:
            given = self.given[name]
            return Task(
                name=name,
                condition=conditions.find(given.scored_by),
                pairs=given.folder,
                held_out=given.share_without(count),
                eval_set=pairs_eval_set(given.held_out[: self.settings.images], self.base.size),
            )
        condition = conditions.find(name)
        images = self.held_out.first(self.settings.images)
        return Task(
            name=name,
            condition=condition,
            pairs=self._first_pairs(condition, count),
            held_out=0.0,
            eval_set=examples_eval_set(condition, images, self.base.size),
        )

    def _first_pairs(self, condition: conditions.Condition, count: int) -> Path:
        """A folder whose manifest lists the first `count` pairs of the condition."""
        most = (
            max(self.settings.pairs, *self.settings.pair_counts) if self._detailed(condition) else self.settings.pairs
        )
        all_pairs = self.out / "pairs" / f"{condition.name}-{most}"
        folder = all_pairs.with_name(f"{condition.name}-{count}")
        icons = Path(self.settings.icons)
        origin = {"icons": sha256_of(icons.read_bytes())} if icons.is_file() else {}
        for made in (all_pairs, folder):
            self._check_origin(made, origin)
        if not (all_pairs / MANIFEST).is_file():
            write_pairs(all_pairs, icon_pairs(self.sets, condition, most))
            write_json(all_pairs / _ORIGIN, origin)
        if folder != all_pairs and not (folder / MANIFEST).is_file():
            if (all_pairs / _ORIGIN).is_file():
                write_json(folder / _ORIGIN, read_json(all_pairs / _ORIGIN))
            lines = (all_pairs / MANIFEST).read_text(encoding="utf-8").splitlines()[:count]
            listed = "".join(_moved(line, f"../{all_pairs.name}") + "\n" for line in lines)
            write_atomically(folder / MANIFEST, lambda temporary: temporary.write_text(listed, encoding="utf-8"))
        return folder

    def _check_origin(self, folder: Path, origin: dict[str, str]) -> None:
        """Check that pairs which are in `folder` already were computed from these icons.

        Raises:
            UserError: they were computed from others.
        """
        recorded = folder / _ORIGIN
        if origin and (folder / MANIFEST).is_file() and recorded.is_file() and read_json(recorded) != origin:
            raise UserError(
                f"the pairs in {folder} were computed from other icons than {self.settings.icons}; choose another"
                " --out, or delete that folder",
                "resume-mismatch",
            )

    def _detailed(self, condition: conditions.Condition) -> bool:
        return condition.name == self.settings.detail and "pairs" in self.settings.parts

    def _write(self, cells_of: Mapping[str, Sequence[Cell]], reports: Sequence[Report]) -> dict[str, Path]:
        # The tables of some parts do not replace those of all.
        parts = [] if tuple(cells_of) == NewCondition.parts else list(cells_of)
        # So do not those of other settings.
        stem = f"new-condition-{self.bench.key}-{settings_key(self.settings)}"
        name = "-".join([stem, *parts])
        files = {"table": self.out / f"{name}.md"}
        text = tables_text(self.settings, reports)
        write_atomically(files["table"], lambda temporary: temporary.write_text(text, encoding="utf-8"))
        files["figure"] = plot(cells_of, self.out / f"{name}.png")
        if "budgets" in cells_of:
            tasks = {name: self.task(name, self.count(name)) for name in self.names()}
            files["images"] = self.out / f"{stem}-images.png"
            sheet_of(cells_of["budgets"], tasks, self.bench, self.settings.detail_steps, files["images"])
        return files


def icon_pairs(
    sets: IconSets, condition: conditions.Condition, count: int, seed: int = 0
) -> Iterator[tuple[np.ndarray, np.ndarray, str]]:
    """Yield `(condition image, image, caption)` for `count` drawings of concepts that are not held out."""
    icons = sets.select(styles=TRAINED_STYLES, held_out=False, drawable=True)
    for number in range(count):
        rng = np.random.default_rng((seed, number, 13))
        drawing = draw(icons[int(rng.integers(len(icons)))], rng)
        yield condition(drawing.image, **condition.random_parameters(rng)), drawing.image, drawing.caption


class _Given:
    """Pairs of one's own: a tenth is held out and evaluated on.

    Args:
        folder: of the pairs.
        scored_by: name of the condition that scores fidelity.
    """

    def __init__(self, folder: Path, scored_by: str) -> None:
        self.folder = folder
        self.scored_by = scored_by
        self.pairs = read_pairs(folder)
        self.training, self.held_out = split_pairs(self.pairs, _HELD_OUT)

    def share_without(self, count: int) -> float:
        """The fraction of pairs to hold out so that `count` are trained on, and none that is evaluated on.

        Raises:
            UserError: there is none, as tiles of one image are not separated.
        """
        if count == len(self.training):
            return _HELD_OUT
        share = 1 - count / len(self.pairs)
        training = split_pairs(self.pairs, share)[0]
        if len(training) != count or any(pair in self.held_out for pair in training):
            raise UserError(
                f"{self.folder} has tiles of one image, which are not separated, so {count} of its pairs cannot be"
                " chosen; leave out the part pairs",
                "unsupported",
            )
        return share


def _base_control_fingerprint(name: str) -> str:
    """The fingerprint of a base control.

    Raises:
        UserError: it is missing, or another kind of control.
    """
    path = find_control(name)
    detected = detect(path)
    if detected.kind != BaseControlNet.kind:
        raise UserError(
            f"{name} is {detected.description}; this study needs a base control, such as nano/base", "wrong-kind"
        )
    return fingerprint_in(path)


def _moved(line: str, folder: str) -> str:
    entry = json.loads(line)
    for key in ("source", "target"):
        entry[key] = f"{folder}/{entry[key]}"
    return json.dumps(entry, ensure_ascii=False)


def _parse_given(text: str) -> tuple[str, Path, str]:
    """NAME=FOLDER@CONDITION => its parts; `identity` scores where no condition is named."""
    name, equals, rest = text.partition("=")
    folder, _, scored_by = rest.partition("@")
    if not (name and equals and folder):
        raise UserError(f"given {text!r}: expected NAME=FOLDER or NAME=FOLDER@CONDITION", "usage")
    return name, Path(folder), conditions.find(scored_by or "identity").name
