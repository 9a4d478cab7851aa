"""A recipe -> its objective, trained."""

from __future__ import annotations

from importlib import import_module

from controlkit.bases.load import choose_device
from controlkit.errors import UserError
from controlkit.formats.card import write_card
from controlkit.sampling.settings import in_words
from controlkit.training.objective import Objective
from controlkit.training.recipe import Recipe
from controlkit.training.recipes import AutoencoderRecipe, BaseRecipe, PairsRecipe, SteeringRecipe
from controlkit.training.trainer import Trained, train

OBJECTIVES: dict[type[Recipe], str] = {
    AutoencoderRecipe: "controlkit.nano.autoencoder_objective:AutoencoderObjective",
    BaseRecipe: "controlkit.nano.base_objective:BaseObjective",
    SteeringRecipe: "controlkit.training.conditions_objective:ConditionsObjective",
    PairsRecipe: "controlkit.training.pairs_objective:PairsObjective",
}
"""Recipe, or what it inherits from -> module and class of what it trains, imported when it is needed."""


def run(recipe: Recipe) -> dict[str, float]:
    """Train what `recipe` describes and write it into its folder, with a card beside every control.

    Returns:
        The last preview's scores.
    """
    return run_whole(recipe).scores


def run_whole(recipe: Recipe) -> Trained:
    """`run`, with all that is known of the finished run."""
    trained = train(lambda: objective_of(recipe), recipe)
    for path in trained.files:
        if path.suffix == ".safetensors":
            rows = [f"| {name} | {value:.4g} |" for name, value in trained.scores.items()]
            how = f" ({in_words(trained.scored)})" if trained.scored else ""
            told = "\n".join(
                [f"On a few held-out pictures, after the last step{how}:", "", "| | |", "|---|---|", *rows]
            )
            picture = None if trained.preview is None else trained.preview.relative_to(path.parent)
            write_card(path, scores=told if rows else "", picture=picture, seconds=trained.seconds)
    return trained


def objective_of(recipe: Recipe) -> Objective:
    """The objective that `recipe` describes, on its device."""
    place = next((place for kind, place in OBJECTIVES.items() if isinstance(recipe, kind)), None)
    if place is None:
        raise UserError(f"no objective for system {recipe.system}")
    module, _, name = place.partition(":")
    objective: Objective = getattr(import_module(module), name)(recipe, choose_device(recipe.device))
    return objective
