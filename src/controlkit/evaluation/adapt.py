"""Train an adapter and judge it on the pairs it has not seen."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from controlkit.bases.load import choose_device, load_base
from controlkit.data.pairs import read_pairs, split_pairs
from controlkit.errors import UserError
from controlkit.evaluation.evaluate_control import evaluate_control, pairs_eval_set
from controlkit.evaluation.report import Report
from controlkit.formats.card import write_card
from controlkit.formats.load import load_control
from controlkit.images import write_png
from controlkit.training.log import total_seconds
from controlkit.training.recipe import Recipe
from controlkit.training.run import run
from controlkit.training.sources.pairs import PairSettings

MOST_JUDGED = 64
"""At most so many held-out pairs are drawn."""


@dataclass(frozen=True, kw_only=True)
class Adapted:
    """A finished adapter."""

    path: Path
    report: Report
    sheet: Path
    seconds: dict[str, float]


def adapt(recipe: Recipe) -> Adapted:
    """Train the control of a recipe from pairs and score it on its held-out pairs, with baseline and ceiling."""
    if not isinstance(recipe, PairSettings):
        raise UserError(
            f"adapt needs a recipe that trains a control from pairs, and this one of system {recipe.system} does not"
        )
    started = time.perf_counter()
    run(recipe)
    trained = time.perf_counter()
    folder = Path(recipe.out)
    base = load_base(recipe.base, device=choose_device(recipe.device))
    path = folder / f"{recipe.control_name}.safetensors"
    shared = {}
    if recipe.control_class.companion is not None and recipe.started_from is not None:
        companion = load_control(recipe.started_from, base)
        shared[companion.fingerprint()] = companion
    control = load_control(path, base, shared=shared)
    _, held_out = split_pairs(read_pairs(recipe.pairs, recipe.condition_names[0], recipe.columns), recipe.held_out)
    report, sheet = evaluate_control(base, control, [pairs_eval_set(held_out[:MOST_JUDGED], base.size)])
    write_png(folder / "held-out.png", sheet)
    write_card(path, scores=report.to_markdown(), image="held-out.png", seconds=total_seconds(folder))
    seconds = {"train": trained - started, "judge": time.perf_counter() - trained}
    return Adapted(path=path, report=report, sheet=folder / "held-out.png", seconds=seconds)
