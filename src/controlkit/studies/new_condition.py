"""`controlkit study new-condition`: does an adapter learn a new condition faster than a ControlNet?

The experiments of Xu et al. 2025 (arXiv 2410.09400: figure 6 and table 3, table 4, figures 8 and 9) on a small base:
every method sees the same pairs, in the same order, for the same steps, and draws the same images from the same
noise. The learning rate is constant, so that one run gives all its budgets.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from controlkit import conditions
from controlkit.bases.base import Base
from controlkit.bases.load import load_base
from controlkit.data.pairs import MANIFEST, read_pairs, split_pairs, write_pairs
from controlkit.errors import UserError, nearest
from controlkit.evaluation.evaluate_control import examples_eval_set, pairs_eval_set
from controlkit.evaluation.report import Report
from controlkit.evaluation.sets import evaluation_set
from controlkit.files import read_json, sha256_of, write_atomically, write_json
from controlkit.formats.load import find_control
from controlkit.formats.metadata import read_metadata
from controlkit.nano.icons import TRAINED_STYLES, IconSets, draw
from controlkit.sampling.request import check_mode
from controlkit.studies.cells import Bench, Cell, Task
from controlkit.studies.figure import plot, require_matplotlib, sheet_of
from controlkit.studies.kept import study_settings, with_settings
from controlkit.studies.new_condition_tables import ADAPTER, CONTROLNET, REPORTS
from controlkit.training.recipe import ControlRecipe
from controlkit.training.recipes import build_recipe

LATENT_INPUT, FULL_TUNING = "+ VAE embedding", "+ base initialisation"

METHODS: dict[str, dict[str, Any]] = {
    CONTROLNET: {"system": "controlnet-pairs", "prompt_drop": 0.3},
    LATENT_INPUT: {"system": "ctrlora-full", "control": None},
    FULL_TUNING: {"system": "ctrlora-full"},
    ADAPTER: {"system": "ctrlora-adapter"},
}
"""The rows of the ablation (Xu et al. 2025, table 4), each with one thing more than the row above: the ControlNet; the
autoencoder in place of its hint network and no x_t; the base control's weights to start from; LoRA in place of tuning
them all. The share of dropped prompts is the same for all."""

PARTS = {
    "rates": "the learning rate of each method, on a condition that no other part uses",
    "budgets": "adapter against ControlNet at growing numbers of steps, on every condition",
    "ablation": "from the ControlNet to the adapter, one change at a time",
    "ranks": "the adapter at growing ranks",
    "pairs": "the adapter with growing numbers of pairs",
}

_ORIGIN = "drawn-from.json"

RATES = dict.fromkeys(METHODS, 1e-3)
"""The learning rate of each method: one for all, as in the paper; the part `rates` compares others."""


@dataclass(frozen=True, kw_only=True)
class NewCondition:
    """Settings of the study. The defaults are those of the tables in docs/ctrlora.md."""

    out: str = "runs/study/new-condition"
    """Folder for pairs, runs, results, tables and the figure."""
    base: str = "nano"
    """The base."""
    control: str = "nano/base"
    """The base control that adapters are made on."""
    icons: str = "data/nano/icons.npz"
    """Rendered icons (`recipes/nano/build_pictures.py`), from which the pairs are made."""
    conditions: tuple[str, ...] = ("palette", "pixel", "lineart_color_hints", "haze")
    """Novel conditions, computed from images of icons."""
    given: tuple[str, ...] = ()
    """More conditions from folders of pairs, each as NAME=FOLDER or NAME=FOLDER@CONDITION, scored by CONDITION."""
    parts: tuple[str, ...] = ("budgets", "ablation", "ranks", "pairs")
    """What is run, of rates, budgets, ablation, ranks and pairs."""
    budgets: tuple[int, ...] = (25, 50, 100, 250, 500, 1000)
    """Optimiser steps."""
    pairs: int = 1000
    """Pairs to learn from."""
    batch_size: int = 16
    """Pairs a step."""
    rank: int = 4
    """Of the adapters, where ranks are not compared."""
    detail: str = "lineart_color_hints"
    """The condition of the ablation, the ranks and the numbers of pairs."""
    ranks: tuple[int, ...] = (2, 4, 8, 16, 32, 64)
    """Ranks that are compared."""
    pair_counts: tuple[int, ...] = (100, 300, 1000, 3000, 5000)
    """Numbers of pairs that are compared."""
    detail_steps: int = 500
    """Steps at which ranks and numbers of pairs are compared."""
    rate_condition: str = "lineart_xdog"
    """The condition on which learning rates are compared."""
    rates: tuple[float, ...] = (3e-4, 5e-4, 1e-3, 2e-3)
    """Learning rates that are compared."""
    rate_steps: int = 250
    """Steps at which they are."""
    images: int = 64
    """Held-out images that each control draws."""
    sampling_steps: int = 10
    """DDIM steps of these."""
    mode: str = "balanced"
    """In which the controls act (`ControlUse.mode`); `balanced` is that of the tables, and of the paper."""

    def __post_init__(self) -> None:
        if not self.parts:
            raise UserError(f"parts is empty; give one or more of {', '.join(PARTS)}")
        for part in self.parts:
            if part not in PARTS:
                raise UserError(f"there is no part called {part!r}{nearest(part, list(PARTS))}")
        for name in (*self.conditions, self.rate_condition):
            conditions.find(name)
        for name in self.given:
            _parse_given(name)
        check_mode(self.mode)
        counts = (*self.budgets, *self.ranks, *self.pair_counts, self.pairs, self.images, self.sampling_steps)
        if min(counts) < 1 or not self.budgets:
            raise UserError("steps, ranks and numbers of pairs and images must be at least 1")
        known = [*self.conditions, *(_parse_given(name)[0] for name in self.given)]
        if twice := sorted({name for name in known if known.count(name) > 1}):
            raise UserError(f"{', '.join(twice)} is there twice; every condition of the study needs a name of its own")
        if self.detail not in known:
            raise UserError(f"detail is {self.detail!r}; it must be one of the study's conditions: {', '.join(known)}")


@dataclass(frozen=True, kw_only=True)
class Study:
    """What came out."""

    reports: tuple[Report, ...]
    cells: tuple[Cell, ...]
    files: dict[str, Path]


def run_new_condition(settings: NewCondition) -> Study:
    """Run what is missing, and tell everything that was measured.

    Raises:
        UserError: icons, pairs, the base control or matplotlib are missing.
    """
    require_matplotlib()  # the figure comes last, hours after the beginning
    return _Run(settings).study()


class _Run:
    def __init__(self, settings: NewCondition) -> None:
        self.settings = settings
        self.out = Path(settings.out)
        self.base: Base = load_base(settings.base)
        control = find_control(settings.control)
        self.fingerprint = read_metadata(control).get("control.fingerprint", "")
        self.bench = Bench(
            self.out, self.base, [self.fingerprint], sampling_steps=settings.sampling_steps, mode=settings.mode
        )
        self.tasks: dict[tuple[str, int], Task] = {}

    @cached_property
    def sets(self) -> IconSets:
        """The icons."""
        return IconSets(self.settings.icons)

    def study(self) -> Study:
        made = {part: list(getattr(self, part)()) for part in PARTS if part in self.settings.parts}
        reports = self._with_settings([report for part, cells in made.items() for report in REPORTS[part](cells)])
        cells = tuple(cell for group in made.values() for cell in group)
        return Study(reports=reports, cells=cells, files=self._write(made, reports))

    def _with_settings(self, reports: Sequence[Report]) -> tuple[Report, ...]:
        told = study_settings(self.settings, self.base, mode=self.settings.mode)
        tasks = {f"{name}, {count} pairs": task.settings() for (name, count), task in self.tasks.items()}
        control = {"name": self.settings.control, "fingerprint": self.fingerprint}
        return with_settings(reports, {**told, "base_control": control, "tasks": tasks})

    def rates(self) -> Iterator[Cell]:
        task = self.task(self.settings.rate_condition, self.settings.pairs)
        for method in (CONTROLNET, ADAPTER):
            for rate in self.settings.rates:
                yield self.cell(task, method, self.settings.rate_steps, rate=rate)

    def budgets(self) -> Iterator[Cell]:
        for name in self.names():
            task = self.task(name, self.settings.pairs)
            for method in (ADAPTER, CONTROLNET):
                for steps in sorted(self.settings.budgets):
                    yield self.cell(task, method, steps)

    def ablation(self) -> Iterator[Cell]:
        task = self.task(self.settings.detail, self.settings.pairs)
        for method in METHODS:
            for steps in sorted(self.settings.budgets):
                yield self.cell(task, method, steps)

    def ranks(self) -> Iterator[Cell]:
        task = self.task(self.settings.detail, self.settings.pairs)
        for rank in self.settings.ranks:
            yield self.cell(task, ADAPTER, self.settings.detail_steps, rank=rank)

    def pairs(self) -> Iterator[Cell]:
        for count in self.settings.pair_counts:
            yield self.cell(self.task(self.settings.detail, count), ADAPTER, self.settings.detail_steps)

    def names(self) -> list[str]:
        return [*self.settings.conditions, *(_parse_given(text)[0] for text in self.settings.given)]

    def cell(self, task: Task, method: str, steps: int, *, rank: int | None = None, rate: float | None = None) -> Cell:
        rate = RATES[method] if rate is None else rate
        own: dict[str, Any] = dict(METHODS[method])
        if method in (ADAPTER, FULL_TUNING):
            own["control"] = self.settings.control
        if method == ADAPTER:
            own["rank"] = rank or self.settings.rank
        label = "-".join(
            [
                *([] if task.pairs.name.startswith(task.name) else [task.name]),
                task.pairs.name,
                method.replace("+ ", "").replace(" ", "-"),
                *([f"r{own['rank']}"] if "rank" in own else []),
                *([] if steps in self.settings.budgets else [f"{steps}-steps"]),
            ]
        )
        recipe = build_recipe(
            {
                **own,
                "name": task.name,
                "pairs": str(task.pairs),
                "base": self.settings.base,
                "condition": task.condition.name,
                "held_out": task.held_out,
                "out": str(self.out / "runs" / self.bench.key / f"{label}-{rate:g}"),
                "steps": steps,
                "batch_size": self.settings.batch_size,
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
        return self.bench.cell(task, method, recipe)

    def task(self, name: str, count: int) -> Task:
        """The condition `name` with `count` pairs, read and made once."""
        if (name, count) not in self.tasks:
            self.tasks[name, count] = self._task(name, count)
        return self.tasks[name, count]

    def _task(self, name: str, count: int) -> Task:
        for text in self.settings.given:
            called, folder, scored_by = _parse_given(text)
            if called == name:
                held_out = split_pairs(read_pairs(folder))[1]
                return Task(
                    name=name,
                    condition=conditions.find(scored_by),
                    pairs=folder,
                    held_out=0.1,
                    judged=pairs_eval_set(held_out[: self.settings.images], self.base.size),
                )
        condition = conditions.find(name)
        images = evaluation_set("held-out").first(self.settings.images)
        return Task(
            name=name,
            condition=condition,
            pairs=self._first_pairs(condition, count),
            held_out=0.0,
            judged=examples_eval_set(condition, images, self.base.size),
        )

    def _first_pairs(self, condition: conditions.Condition, count: int) -> Path:
        """A folder whose manifest lists the first `count` of the condition's pairs."""
        most = (
            max(self.settings.pairs, *self.settings.pair_counts) if self._detailed(condition) else self.settings.pairs
        )
        whole = self.out / "pairs" / f"{condition.name}-{most}"
        icons = Path(self.settings.icons)
        drawn_from = {"icons": sha256_of(icons.read_bytes())} if icons.is_file() else {}
        if not (whole / MANIFEST).is_file():
            write_pairs(whole, icon_pairs(self.sets, condition, most))
            write_json(whole / _ORIGIN, drawn_from)
        elif drawn_from and (whole / _ORIGIN).is_file() and read_json(whole / _ORIGIN) != drawn_from:
            raise UserError(
                f"the pairs in {whole} were drawn from other icons than {self.settings.icons}; give the study another"
                " out, or remove its folder of pairs"
            )
        folder = whole.with_name(f"{condition.name}-{count}")
        if folder != whole and not (folder / MANIFEST).is_file():
            lines = (whole / MANIFEST).read_text(encoding="utf-8").splitlines()[:count]
            listed = "".join(_moved(line, f"../{whole.name}") + "\n" for line in lines)
            write_atomically(folder / MANIFEST, lambda temporary: temporary.write_text(listed, encoding="utf-8"))
        return folder

    def _detailed(self, condition: conditions.Condition) -> bool:
        return condition.name == self.settings.detail and "pairs" in self.settings.parts

    def _write(self, made: Mapping[str, Sequence[Cell]], reports: Sequence[Report]) -> dict[str, Path]:
        # A part alone does not write over what all of them told.
        name = "-".join(["new-condition", self.bench.key, *([] if tuple(made) == NewCondition.parts else made)])
        files = {"table": self.out / f"{name}.md"}
        text = "\n\n".join(report.to_markdown() for report in reports) + "\n"
        write_atomically(files["table"], lambda temporary: temporary.write_text(text, encoding="utf-8"))
        files["figure"] = plot(made, self.out / f"{name}.png")
        if "budgets" in made:
            tasks = {name: self.task(name, self.settings.pairs) for name in self.names()}
            files["images"] = sheet_of(made["budgets"], tasks, self.bench, self.settings.detail_steps)
        return files


def icon_pairs(
    sets: IconSets, condition: conditions.Condition, count: int, seed: int = 0
) -> Iterator[tuple[np.ndarray, np.ndarray, str]]:
    """`(condition image, image, caption)` of `count` drawings of concepts that are not held out."""
    icons = sets.select(styles=TRAINED_STYLES, held_out=False, drawable=True)
    for number in range(count):
        rng = np.random.default_rng((seed, number, 13))
        drawing = draw(icons[int(rng.integers(len(icons)))], rng)
        yield condition(drawing.image, **condition.random_parameters(rng)), drawing.image, drawing.caption


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
        raise UserError(f"given pairs {text!r}: expected NAME=FOLDER or NAME=FOLDER@CONDITION")
    return name, Path(folder), conditions.find(scored_by or "identity").name
