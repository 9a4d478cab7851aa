"""Train a recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from pkgutil import resolve_name

from controlkit.bases.devices import choose_device
from controlkit.errors import UserError
from controlkit.formats.card import write_card
from controlkit.formats.metadata import provenance_of, read_metadata
from controlkit.sampling.settings import in_words
from controlkit.training.objective import Objective
from controlkit.training.recipe import Recipe
from controlkit.training.results import Trained, TrainStep
from controlkit.training.trainer import train


def run(recipe: Recipe, on_step: Callable[[TrainStep], object] | None = None) -> dict[str, float]:
    """Train `recipe` and write the results into its folder, with a card beside every control.

    Cards of a run that had finished before are kept, as they may have been edited, unless the weights are of another
    step now, which `patience` selects.

    Args:
        on_step: called after every step. If it raises an exception, the state is saved, and the run ends with that
            exception; the same call resumes.

    Returns:
        The scores of the last preview, or with `patience` of the best.
    """
    return run_recipe(recipe, on_step).scores


def run_recipe(recipe: Recipe, on_step: Callable[[TrainStep], object] | None = None) -> Trained:
    """`run`, returning files, preview and time, too."""
    before = {name: _step_of(Path(recipe.out) / name) for name in recipe.results}
    trained = train(lambda: objective_of(recipe), recipe, on_step)
    another_step = any(before.get(path.name) not in (None, trained.step) for path in trained.files)
    trained = dataclasses.replace(trained, same_files=trained.finished_before and not another_step)
    for path in trained.files:
        kept = trained.same_files and path.with_suffix(".md").exists()
        if path.suffix == ".safetensors" and not kept:
            rows = [f"| {name} | {value:.4g} |" for name, value in trained.scores.items()]
            sampling = f" ({in_words(trained.scored)})" if trained.scored else ""
            table = ["| | |", "|---|---|", *rows]
            scores = "\n".join([f"On a few held-out images, after {trained.step:,} steps{sampling}:", "", *table])
            image = None if trained.preview is None else trained.preview.relative_to(path.parent)
            write_card(path, scores=scores if rows else "", image=image, seconds=trained.seconds)
    return trained


def _step_of(path: Path) -> int | None:
    """The step recorded in the file of a control; None if there is none."""
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    with suppress(UserError):
        return provenance_of(read_metadata(path)).get("steps")
    return None


def objective_of(recipe: Recipe) -> Objective:
    """The objective of `recipe`, on its device."""
    objective: Objective = resolve_name(recipe.objective)(recipe, choose_device(recipe.device))
    return objective
