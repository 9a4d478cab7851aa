"""`controlkit study convergence`: how many steps colour and spatial conditions take to half of the gap.

Xu et al. 2025 (arXiv 2410.09400) report that conditions of colour converge more slowly than spatial ones. An adapter on
the base control and a ControlNet from scratch train on conditions of both kinds that are new to the base control, as in
the study new-condition, and are evaluated after growing numbers of steps until they pass the wanted share of the gap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

from controlkit import conditions
from controlkit.errors import UserError
from controlkit.evaluation.report import Report, Row
from controlkit.files import write_atomically
from controlkit.progress import Progress
from controlkit.sampling.uses import mode_name
from controlkit.studies.cells import Cell
from controlkit.studies.figure import plot, require_matplotlib, sheet_of
from controlkit.studies.new_condition import NewCondition, NewConditionResult, Trainings
from controlkit.studies.new_condition_tables import ADAPTER, CONTROLNET
from controlkit.studies.stored_results import check_sampling_steps, settings_key, tables_text

METHODS = (ADAPTER, CONTROLNET)


@dataclass(frozen=True, kw_only=True)
class Convergence:
    """Settings of the study."""

    out: str = "runs/study/convergence"
    """Folder for pairs, runs, results, table and figure."""
    base: str = "nano"
    """The base."""
    device: str = "auto"
    """`cpu`, `cuda`, `mps`, or `auto` for the best available."""
    control: str = "nano/base"
    """The base control of the adapters."""
    icons: str = "data/nano/icons.npz"
    """Rendered icons (`recipes/nano/build_pictures.py`), the source of the pairs."""
    colour: tuple[str, ...] = ("palette", "pixel", "lineart_color_hints")
    """Conditions that are scored by colour."""
    spatial: tuple[str, ...] = ("lineart_xdog", "sketch", "illusion")
    """Conditions that are scored by lines or shapes."""
    share: float = 0.5
    """Share of the gap to reach, in (0, 1)."""
    budgets: tuple[int, ...] = (5, 10, 25, 50, 100, 200, 400, 800)
    """Optimiser steps after which controls are evaluated, until they reach the share."""
    pairs: int = 1000
    """Training pairs."""
    batch_size: int = 16
    """Pairs per step."""
    rank: int = 4
    """Rank of the adapters."""
    images: int = 32
    """Held-out images per control."""
    sampling_steps: int = 10
    """DDIM steps of these images."""
    mode: str = "control"
    """Mode of the controls (`ControlUse.mode`). nano's own by default: in `balanced`, some conditions stay below half
    of the gap at any number of steps (docs/ctrlora.md)."""

    def __post_init__(self) -> None:
        check_sampling_steps(self.sampling_steps)
        for name in (*self.colour, *self.spatial):
            conditions.find(name)
        if not self.colour or not self.spatial:
            raise UserError("give at least one condition in each of colour and spatial", "missing-setting")
        if not self.budgets or min(self.budgets) < 1 or min(self.images, self.sampling_steps) < 1:
            raise UserError("budgets, images and sampling_steps must be at least 1", "out-of-range")
        if self.pairs < 2:
            raise UserError(
                f"pairs is {self.pairs}; expected at least 2, as one is held out for previews", "out-of-range"
            )
        if not 0 < self.share < 1:
            raise UserError(f"share is {self.share}; expected a fraction above 0 and below 1", "out-of-range")
        object.__setattr__(self, "mode", mode_name(self.mode))


def run_convergence(settings: Convergence) -> NewConditionResult:
    """Train and evaluate what is missing, and report.

    Raises:
        UserError: icons, the base control or matplotlib are missing, or a condition has no gap to close.
    """
    require_matplotlib()  # the figure comes last, after an hour
    names = (*settings.colour, *settings.spatial)
    trainings = Trainings(
        NewCondition(
            out=settings.out,
            base=settings.base,
            device=settings.device,
            control=settings.control,
            icons=settings.icons,
            conditions=names,
            parts=("budgets",),
            budgets=settings.budgets,
            pairs=settings.pairs,
            batch_size=settings.batch_size,
            rank=settings.rank,
            detail=names[0],
            images=settings.images,
            sampling_steps=settings.sampling_steps,
            mode=settings.mode,
        )
    )
    progress = Progress("controls of the study", len(names) * len(METHODS))
    cells: list[Cell] = []
    untrained: dict[str, Cell] = {}
    for name in names:  # before hours of training
        first = untrained[name] = trainings.untrained(name, settings.pairs)
        if math.isnan(first.gap_closed):
            raise UserError(
                f"{name} has no gap to close: images without control score {first.baseline:.3g}, targets through the"
                f" autoencoder only {first.ceiling:.3g}; choose another condition in colour or spatial",
                "unsupported",
            )
    for name in names:
        cells.append(untrained[name])
        for method in METHODS:
            past = method == ADAPTER and untrained[name].gap_closed >= settings.share
            for steps in () if past else sorted(settings.budgets):
                cells.append(trainings.cell(name, settings.pairs, method, steps))
                if cells[-1].gap_closed >= settings.share:
                    break
            progress.advance()
    reports = trainings.with_settings(tables(cells, settings), settings)
    stem = f"convergence-{trainings.bench.key}-{settings_key(settings)}"
    files: dict[str, Path] = {name: trainings.out / f"{stem}{end}" for name, end in _FILES.items()}
    text = tables_text(settings, reports)
    write_atomically(files["table"], lambda temporary: temporary.write_text(text, encoding="utf-8"))
    plot({"budgets": cells}, files["figure"])
    tasks = {name: trainings.task(name, settings.pairs) for name in names}
    sheet_of(cells, tasks, trainings.bench, max(settings.budgets), files["images"])
    return NewConditionResult(reports=reports, cells=tuple(cells), files=files)


_FILES = {"table": ".md", "figure": ".png", "images": "-images.png"}
"""File of the study -> end of its name."""


def steps_to(cells: Sequence[Cell], share: float) -> float:
    """Steps at which the cells of one run reach `share` of the gap: between two budgets, on a logarithmic scale.

    0 if the base control alone is past the share; the first budget, if past it, is an upper bound; infinite if none is.
    """
    ordered = sorted(cells, key=lambda cell: cell.steps)
    if ordered[0].gap_closed >= share:
        return float(ordered[0].steps)
    for before, after in pairwise(ordered):
        if after.gap_closed >= share and not before.steps:
            return float(after.steps)
        if after.gap_closed >= share:
            way = (share - before.gap_closed) / (after.gap_closed - before.gap_closed)
            return float(before.steps * (after.steps / before.steps) ** way)
    return math.inf


_ANSWERS = {True: "yes", False: "NO", None: "undecided"}


def _is_slower(steps: float, others: float) -> bool | None:
    """Whether `steps` are more than `others`; None if the budgets cannot tell, since neither or both reached it at the
    same."""
    return None if steps == others else steps > others


def tables(cells: Sequence[Cell], settings: Convergence) -> list[Report]:
    """Steps to the share by condition, whether colour is slower, and the gap closed at each budget."""
    kinds = dict.fromkeys(settings.colour, "colour") | dict.fromkeys(settings.spatial, "spatial")
    runs = {
        (task, method): [cell for cell in cells if (cell.task, cell.method) == (task, method)]
        for task in kinds
        for method in METHODS
    }
    steps = {key: steps_to(run, settings.share) for key, run in runs.items()}
    least, most = min(settings.budgets), max(settings.budgets)

    def shown(value: float) -> str | int:
        if 0 < value <= least:
            return f"at most {least}"
        return f"over {most}" if math.isinf(value) else round(value)

    rows: list[Row] = [
        (task, kind, *(shown(steps[task, method]) for method in METHODS)) for task, kind in kinds.items()
    ]
    middle = {
        (kind, method): median(steps[task, method] for task in kinds if kinds[task] == kind)
        for kind in ("colour", "spatial")
        for method in METHODS
    }
    rows += [(f"median, {kind}", kind, *(shown(middle[kind, m]) for m in METHODS)) for kind in ("colour", "spatial")]
    slower = {method: _is_slower(middle["colour", method], middle["spatial", method]) for method in METHODS}
    budgets = sorted({0, *settings.budgets})
    curves: list[Row] = []
    for (task, method), run in runs.items():
        closed = {cell.steps: cell.gap_closed for cell in run}
        curves.append((f"{task}: {method}", *(closed.get(budget) for budget in budgets)))
    plain = {f"{task}: {method}": None if math.isinf(value) else value for (task, method), value in steps.items()}
    return [
        Report(
            title=f"Optimiser steps to {settings.share:.0%} of the gap",
            columns=("condition", "kind", *METHODS),
            rows=tuple(rows),
            notes=(
                "between two budgets, steps are interpolated on a logarithmic scale; 0: the base control alone is past"
                " the share. One seed.",
            ),
            facts={"steps": plain, "colour_is_slower": slower},
        ),
        Report(
            title="Does it reproduce?",
            columns=("claim", *METHODS),
            rows=(("colour takes more steps (medians)", *(_ANSWERS[slower[m]] for m in METHODS)),),
        ),
        Report(
            title="Gap closed by number of steps",
            columns=("condition: method", *map(str, budgets)),
            rows=tuple(curves),
            notes=("0: the base control alone. A control is trained no further once it is past the share.",),
        ),
    ]
