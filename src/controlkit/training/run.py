"""A recipe -> its objective, trained."""

from __future__ import annotations

import os

import torch

from controlkit.checkpoints.card import write_card
from controlkit.errors import UserError
from controlkit.training.objective import Objective
from controlkit.training.recipe import (
    AdaptRecipe,
    AutoencoderRecipe,
    BaseRecipe,
    ControlNetPairsRecipe,
    ControlNetRecipe,
    CtrLoRABaseRecipe,
    CtrLoRAFullRecipe,
    Recipe,
)
from controlkit.training.trainer import train


def run(recipe: Recipe) -> dict[str, float]:
    """Train what `recipe` describes and write it into its folder, with a card beside every control.

    Returns:
        The last preview's scores.
    """
    trained = train(lambda: objective_of(recipe), recipe)
    for path in trained.files:
        if path.suffix == ".safetensors":
            rows = [f"| {name} | {value:.4g} |" for name, value in trained.scores.items()]
            told = "\n".join(["On a few held-out pictures, after the last step:", "", "| | |", "|---|---|", *rows])
            picture = None if trained.preview is None else trained.preview.relative_to(path.parent)
            write_card(path, scores=told if rows else "", picture=picture, seconds=trained.seconds)
    return trained.scores


def objective_of(recipe: Recipe) -> Objective:
    """The objective that `recipe` describes, on its device."""
    device = choose_device(recipe.device)
    if isinstance(recipe, AutoencoderRecipe):
        from controlkit.training.autoencoder import AutoencoderObjective

        return AutoencoderObjective(recipe, device)
    if isinstance(recipe, BaseRecipe):
        from controlkit.training.base import BaseObjective

        return BaseObjective(recipe, device)
    if isinstance(recipe, ControlNetRecipe):
        from controlkit.training.control import ControlNetObjective

        return ControlNetObjective(recipe, device)
    if isinstance(recipe, CtrLoRABaseRecipe):
        from controlkit.training.control import CtrLoRABaseObjective

        return CtrLoRABaseObjective(recipe, device)
    if isinstance(recipe, AdaptRecipe):
        from controlkit.training.adapt import AdaptObjective

        return AdaptObjective(recipe, device)
    if isinstance(recipe, CtrLoRAFullRecipe):
        from controlkit.training.adapt import CtrLoRAFullObjective

        return CtrLoRAFullObjective(recipe, device)
    if isinstance(recipe, ControlNetPairsRecipe):
        from controlkit.training.adapt import ControlNetPairsObjective

        return ControlNetPairsObjective(recipe, device)
    raise UserError(f"no objective for system {recipe.system}")


def choose_device(name: str) -> torch.device:
    """`auto` => CUDA, then MPS, then the CPU; else the torch device of that name.

    Of several processes on a machine each has a GPU of its own, before anything is loaded onto one.
    """
    if name in ("auto", "cuda") and torch.cuda.is_available():
        return _own_gpu()
    if name == "auto":
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device {name!r} is not one that torch knows (cpu, cuda, cuda:1, mps, auto)") from error


def _own_gpu() -> torch.device:
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return torch.device("cuda")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device
