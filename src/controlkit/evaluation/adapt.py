"""Train an adapter and judge it on the pairs it has not seen."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from controlkit.bases.load import choose_device, load_base
from controlkit.checkpoints.card import write_card
from controlkit.checkpoints.controls import load_control
from controlkit.controls.base_control import BaseControl
from controlkit.data.pairs import read_pairs, split_pairs
from controlkit.errors import UserError
from controlkit.evaluation.control import evaluate_control, judged_pairs
from controlkit.evaluation.report import Report
from controlkit.images import write_png
from controlkit.training.log import spent
from controlkit.training.recipe import Recipe
from controlkit.training.recipes import AdaptRecipe
from controlkit.training.run import run

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
    """Train the adapter of an `AdaptRecipe` and score it on its held-out pairs, with baseline and ceiling."""
    if not isinstance(recipe, AdaptRecipe):
        raise UserError(f"adapt needs a recipe of system {AdaptRecipe.system}, not {recipe.system}")
    started = time.perf_counter()
    run(recipe)
    trained = time.perf_counter()
    folder = Path(recipe.out)
    base = load_base(recipe.base, device=choose_device(recipe.device))
    path = folder / f"{recipe.name}.safetensors"
    base_control = load_control(recipe.control, base)
    assert isinstance(base_control, BaseControl)  # the run above would have refused another
    control = load_control(path, base, shared={base_control.fingerprint(): base_control})
    _, held_out = split_pairs(read_pairs(recipe.pairs, recipe.condition, recipe.columns), recipe.held_out)
    report, sheet = evaluate_control(base, control, [judged_pairs(held_out[:MOST_JUDGED], base.size)])
    write_png(folder / "held-out.png", sheet)
    write_card(path, scores=report.to_markdown(), picture="held-out.png", seconds=spent(folder))
    seconds = {"train": trained - started, "judge": time.perf_counter() - trained}
    return Adapted(path=path, report=report, sheet=folder / "held-out.png", seconds=seconds)
