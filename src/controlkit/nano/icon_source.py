"""Drawings of icons with condition images computed on the fly, the training data of nano's controls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from controlkit.bases.base import Base
from controlkit.bases.identity import network_key
from controlkit.conditions import find
from controlkit.controls.control import Control
from controlkit.images import stacked
from controlkit.nano.drawings import Drawings, check_drawn_size
from controlkit.nano.icons import TRAINED_STYLES, IconSets, draw
from controlkit.training.recipe import ControlRecipe
from controlkit.training.sources.registry import source
from controlkit.training.sources.source import Batch, HeldOut, Source, Step


@dataclass(frozen=True, kw_only=True)
class IconSettings(ControlRecipe):
    """Settings of training on icons."""

    icons: str
    """File of rendered icons (`recipes/nano/build_pictures.py`)."""
    variants: int = 4
    """Drawings of each icon, whose latents are cached."""


@source
class IconSource(Source):
    """Drawings of icons; condition images are computed on the fly with random parameters."""

    name = "icons"
    Settings = IconSettings

    def __init__(self, recipe: IconSettings) -> None:
        # Conditions that networks compute are computed in the step.
        self.prepares_ahead = all(find(name).requires is None for name in recipe.condition_names)
        self.recipe = recipe
        self.sets = IconSets(recipe.icons)
        rng = np.random.default_rng(0)
        icons = self.sets.select(styles=TRAINED_STYLES, held_out=True, drawable=True)
        self.held_out_drawings = [
            draw(icons[index], rng) for index in rng.permutation(len(icons))[: recipe.score_pictures]
        ]
        self.targets = [drawing.image for drawing in self.held_out_drawings]

    def prepare(self, base: Base, control: Control) -> None:
        check_drawn_size(base)
        self.drawings = Drawings(
            self.sets.select(styles=TRAINED_STYLES, held_out=False),
            self.recipe.variants,
            self.recipe.seed,
            encode=lambda x: base.encode_image(x.to(base.device)),
            key=network_key(base.vae),
        )

    def batch(self, condition: str, step: Step) -> Batch:
        batch = self.batch_together((condition,), step)
        assert isinstance(batch.condition_images, dict)
        return replace(batch, condition_images=batch.condition_images[condition])

    def batch_together(self, conditions: Sequence[str], step: Step) -> Batch:
        rng, local = step.rng(), step.local_slice
        chosen = [int(index) for index in rng.integers(len(self.drawings), size=step.global_batch)]
        prompts = [self.drawings.prompt(index, rng, self.recipe.prompt_drop) for index in chosen]
        drawn = [self.drawings.draw(index).image for index in chosen[local]]
        images: dict[str, Tensor] = {}
        for condition in conditions:
            kind = find(condition)
            parameters = [kind.random_parameters(rng) for _ in chosen][local]
            made = [kind(image, **values) for image, values in zip(drawn, parameters, strict=True)]
            images[condition] = stacked(made)
        return Batch(
            latents=self.drawings.latents[torch.tensor(chosen[local])],
            text=prompts[local],
            condition_images=images,
        )

    def samples(self, condition: str, step: Step) -> list[str]:
        chosen = step.rng().integers(len(self.drawings), size=step.global_batch)
        return [f"drawing {index}: {self.drawings.draw(int(index)).caption}" for index in chosen]

    def held_out(self, condition: str) -> HeldOut:
        kind = find(condition)
        return HeldOut(
            condition_images=[kind(target) for target in self.targets],
            targets=self.targets,
            prompts=[drawing.caption for drawing in self.held_out_drawings],
        )
