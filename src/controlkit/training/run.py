"""Train a recipe."""

from __future__ import annotations

from pkgutil import resolve_name

from controlkit.bases.load import choose_device
from controlkit.formats.card import write_card
from controlkit.sampling.settings import in_words
from controlkit.training.objective import Objective
from controlkit.training.recipe import Recipe
from controlkit.training.trainer import Trained, train


def run(recipe: Recipe) -> dict[str, float]:
    """Train `recipe` and write the results into its folder, with a card beside every control.

    Cards of a run that had finished before are kept, as they may have been edited.

    Returns:
        The scores of the last preview, or with `patience` of the best.
    """
    return run_recipe(recipe).scores


def run_recipe(recipe: Recipe) -> Trained:
    """`run`, returning files, preview and time, too."""
    trained = train(lambda: objective_of(recipe), recipe)
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
