"""Training a control on images whose condition images are made, or listed beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from controlkit import conditions
from controlkit.bases.base import Base
from controlkit.controls.control import encode_images
from controlkit.errors import UserError
from controlkit.images import to_tensor
from controlkit.training.control_objective import ControlObjective
from controlkit.training.objective import numpy_generator
from controlkit.training.previews import preview_images, preview_settings, write_preview
from controlkit.training.processes import tell
from controlkit.training.recipes import SteeringRecipe
from controlkit.training.sources import Held, IconSource, MultiGenSource, Source

_STRIP = 8


class ConditionsObjective(ControlObjective):
    """One condition a step, of one or several."""

    recipe: SteeringRecipe

    def __init__(self, recipe: SteeringRecipe, device: torch.device) -> None:
        self.names = recipe.condition_names
        if recipe.icons is not None:
            for name in self.names:
                conditions.find(name)
        super().__init__(recipe, device)
        self.source = _source(recipe, self.base)
        tell(self.source.notes())
        self.checkpoint()

    def condition_at(self, step: int) -> str:
        """The condition of a step: rounds of all of them, each round in random order, so each is as frequent.

        It is the same in every process, which keeps the number of optimiser steps of each the same.
        """
        count = len(self.names)
        order = numpy_generator(self.recipe.seed, step // count, 1).permutation(count)
        return self.names[order[step % count]]

    def loss(self, step: int) -> Tensor:
        condition = self.condition_at(step)
        rng = self.numpy_generator(step)
        batch = self.source.batch(condition, rng, self.whole, self.recipe.prompt_drop, self.share)
        control = self.control.for_condition(condition)
        text = self.base.encode_text(batch.prompts)
        hint = encode_images(control, batch.images, self.base)
        return self.control_loss(control, batch.latents, text, hint, self.torch_generator(step))

    def seen(self, step: int) -> list[str]:
        condition = self.condition_at(step)
        names = self.source.names(condition, self.numpy_generator(step), self.whole)
        return [f"{condition}: {name}" for name in names]

    @torch.no_grad()
    def preview(self, step: int, folder: Path) -> dict[str, float]:
        self.trained.eval()
        scores: dict[str, float] = {}
        rows, titles = [], []
        for name in self.names:
            held = self.source.held_out(name)
            results = self._follow(name, held)
            score = _score(name, held, results)
            if score is not None:
                scores[f"{name}: {conditions.find(name).fidelity.name}"] = score
            rows += [[Image.fromarray(image) for image in held.given[:_STRIP]], results[:_STRIP]]
            titles += [name, f"result, {self.preview_settings['mode']}"]
        if isinstance(self.source, IconSource):
            rows.append([Image.fromarray(image) for image in held.truths[:_STRIP]])
            titles.append("truth")
        write_preview(folder, step, rows, titles, scores, self.preview_settings)
        self.trained.train()
        return scores

    def _follow(self, name: str, held: Held) -> list[Image.Image]:
        """Pictures under control of held-out condition images, from fixed seeds."""
        control = self.control.for_condition(name)
        hint = encode_images(control, to_tensor(held.given).to(self.device), self.base)
        return preview_images(self.base, control, hint, held.prompts)

    @property
    def preview_settings(self) -> dict[str, Any]:
        return preview_settings(self.base, self.control.for_condition(self.names[0]))


def _source(recipe: SteeringRecipe, base: Base) -> Source:
    if recipe.icons is not None:
        return IconSource(
            recipe.icons,
            base,
            variants=recipe.variants,
            seed=recipe.seed,
            folder=Path(recipe.out),
            held_out=recipe.score_pictures,
        )
    assert recipe.multigen is not None  # the recipe refuses neither and both
    return MultiGenSource(recipe.multigen, recipe.condition_names, base, held_out=recipe.score_pictures)


def _score(name: str, held: Held, results: list[Image.Image]) -> float | None:
    """Mean fidelity, or None for a condition that cannot be drawn here (it needs weights, or is not known)."""
    try:
        kind = conditions.find(name)
    except UserError:
        return None
    if kind.requires is not None:
        return None
    return kind.mean_score(held.given, [np.asarray(result) for result in results], held.truths)
