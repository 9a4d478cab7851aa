"""Train a recipe."""

from __future__ import annotations

from collections.abc import Callable
from pkgutil import resolve_name

from controlkit.bases.load import choose_device
from controlkit.formats.card import write_card
from controlkit.sampling.settings import in_words
from controlkit.training.objective import Objective
from controlkit.training.recipe import Recipe
from controlkit.training.results import Trained, TrainStep
from controlkit.training.trainer import train


def run(recipe: Recipe, on_step: Callable[[TrainStep], object] | None = None) -> dict[str, float]:
    """Train `recipe` and write the results into its folder, with a card beside every control.

    Cards of a run that had finished before are kept, as they may have been edited.

    Args:
        on_step: called after every step. If it raises an exception, the state is saved, and the run ends with that
            exception; the same call resumes.

    Returns:
        The scores of the last preview, or with `patience` of the best.
    """
    return run_recipe(recipe, on_step).scores


def run_recipe(recipe: Recipe, on_step: Callable[[TrainStep], object] | None = None) -> Trained:
    """`run`, returning files, preview and time, too."""
    trained = train(lambda: objective_of(recipe), recipe, on_step)
    for path in trained.files:
        kept = trained.finished_before and path.with_suffix(".md").exists()
        if path.suffix == ".safetensors" and not kept:
            rows = [f"| {name} | {value:.4g} |" for name, value in trained.scores.items()]
            sampling = f" ({in_words(trained.scored)})" if trained.scored else ""
            table = ["| | |", "|---|---|", *rows]
            scores = "\n".join([f"On a few held-out images, after {trained.step:,} steps{sampling}:", "", *table])
            image = None if trained.preview is None else trained.preview.relative_to(path.parent)
            write_card(path, scores=scores if rows else "", image=image, seconds=trained.seconds)
    return trained


def objective_of(recipe: Recipe) -> Objective:
    """The objective of `recipe`, on its device."""
    objective: Objective = resolve_name(recipe.objective)(recipe, choose_device(recipe.device))
    return objective
