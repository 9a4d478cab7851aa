"""Train a control on pairs and evaluate it on the held-out ones."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from controlkit.bases.devices import choose_device
from controlkit.bases.load import load_base
from controlkit.data.pairs import read_pairs, split_pairs
from controlkit.errors import UserError
from controlkit.evaluation.eval_set import pairs_eval_set
from controlkit.evaluation.evaluate_control import evaluate_control
from controlkit.evaluation.report import Report
from controlkit.formats.card import write_card
from controlkit.formats.load import load_control
from controlkit.images import write_png
from controlkit.sampling.graphs import GraphReport, tallied
from controlkit.training.log import total_seconds
from controlkit.training.processes import Processes
from controlkit.training.recipe import Recipe
from controlkit.training.results import TrainStep
from controlkit.training.run import run_recipe
from controlkit.training.sources.pairs import PairSettings

MAX_HELD_OUT = 64
"""Limit of the held-out pairs that are evaluated."""


@dataclass(frozen=True, kw_only=True)
class Adapted:
    """A trained control with its scores."""

    path: Path
    report: Report
    sheet: Path
    seconds: dict[str, float]
    graphs: GraphReport
    """How the networks were called while the held-out pairs were sampled."""


def adapt(recipe: Recipe, on_step: Callable[[TrainStep], object] | None = None) -> Adapted:
    """Train the control of a recipe on pairs and score it on the held-out ones, with baseline and ceiling.

    Args:
        on_step: as of `train`.

    Under `torchrun`, every process evaluates, and the first writes.

    Raises:
        UserError: the recipe does not train a control of one condition on pairs, the sheet of another run would be
            overwritten, or training fails.
    """
    if not isinstance(recipe, PairSettings):
        raise UserError(
            f"adapt trains a control on pairs; a recipe of system {recipe.system} does not: use `controlkit train`",
            "wrong-kind",
        )
    if len(recipe.condition_names) > 1:
        raise UserError(
            f"adapt scores one condition; this recipe trains {', '.join(recipe.condition_names)}: use"
            " `controlkit train` and then `controlkit evaluate`",
            "wrong-kind",
        )
    folder = Path(recipe.out)
    sheet_path = folder / "held-out.png"
    if Processes.is_first() and sheet_path.exists() and not (folder / "state.safetensors").exists():
        raise UserError(
            f"{sheet_path} exists already, but no state of a run to resume; set another out", "would-overwrite"
        )
    started = time.perf_counter()
    result = run_recipe(recipe, on_step)
    trained = time.perf_counter()
    base = load_base(recipe.base, device=choose_device(recipe.device))
    path = folder / f"{recipe.control_name}.safetensors"
    shared = {}
    if recipe.control_class.companion is not None and recipe.started_from is not None:
        companion = load_control(recipe.started_from, base)
        shared[companion.fingerprint()] = companion
    control = load_control(path, base, shared=shared)
    _, held_out = split_pairs(read_pairs(recipe.pairs, recipe.condition_names[0], recipe.columns), recipe.held_out)
    with tallied() as calls:
        report, sheet = evaluate_control(base, control, [pairs_eval_set(held_out[:MAX_HELD_OUT], base.size)])
    seconds = {"train": trained - started, "judge": time.perf_counter() - trained}
    adapted = Adapted(path=path, report=report, sheet=sheet_path, seconds=seconds, graphs=calls())
    if not Processes.is_first():
        return adapted
    # The card of a run that had finished may have been edited; without the sheet, it is only that of training.
    if not (result.same_files and sheet_path.exists() and path.with_suffix(".md").exists()):
        write_card(path, scores=report.to_markdown(), image=sheet_path.name, seconds=total_seconds(folder))
    write_png(sheet_path, sheet)
    return adapted
