"""Training a control on a folder of pairs: what does not change is computed once."""

from __future__ import annotations

import sys
from abc import abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from controlkit import conditions
from controlkit.bases.load import load_base
from controlkit.conditions.fidelity import by_the_picture
from controlkit.controls.control import Control
from controlkit.data.pairs import read_pairs, split_pairs
from controlkit.data.sources import read_picture
from controlkit.images import to_tensor
from controlkit.training.diffusion import noised
from controlkit.training.objective import Objective, numpy_generator
from controlkit.training.pair_cache import PairCache
from controlkit.training.previews import preview_images, preview_settings, write_preview
from controlkit.training.processes import Processes
from controlkit.training.recipes import PairsRecipe
from controlkit.training.savings import uses_bf16

_STRIP = 8
_FLIPS = 11
"""Flips are drawn from numbers of their own, so that a run without them draws what it would without this setting."""


class PairsObjective(Objective):
    """The base's own loss with a control's residuals, on pairs; the base is frozen.

    Latents of pictures, embeddings of prompts and of the empty prompt, and hints that no trained weight makes come
    from the cache (`data/cache.py`), keyed by their content; neither autoencoder nor text encoder runs in a step.
    """

    control: Control
    """What is trained, or holds what is."""
    recipe: PairsRecipe

    def __init__(self, recipe: PairsRecipe, device: torch.device) -> None:
        self.recipe = recipe
        self.device = device
        self.condition = conditions.find(recipe.condition)
        if self.condition.requires is not None:
            # Its model would have to be loaded beside what trains, if it is to be had at all.
            self.condition = by_the_picture(self.condition)
        self.pairs, self.held_out = split_pairs(read_pairs(recipe.pairs, recipe.condition), recipe.held_out)
        self.base = load_base(recipe.base, device=device)
        self.frozen = self.base.content
        self.scheduler = self.base.schedule()
        self.control = self.build_control()
        self._tell_of_scaling()
        self.cache = PairCache(self.base, self.pairs, flip=recipe.flip, check=uses_bf16(recipe, device))
        self.latents = self.cache.latents()
        self.texts, self.prompt_of, self.empty = self.cache.texts()
        self.data = self.cache.content()

    def _tell_of_scaling(self) -> None:
        """Say where condition images were made at another size than they will be made at for drawing."""
        side, size = min(read_picture(self.pairs[0].source).size), self.base.size
        if side != size and not self.condition.given and Processes.is_first():
            print(
                f"note: condition images of these pairs are scaled from {side} pixels to {size}; to draw, they are made"
                f" at {size}, where {self.condition.name} may look different; make the pairs with --size {size}",
                file=sys.stderr,
            )

    @abstractmethod
    def build_control(self) -> Control:
        """What `control` is, made before anything is encoded, so that a file that does not do is told of at once."""

    @abstractmethod
    def hints(self, chosen: Tensor, flipped: Tensor) -> Tensor:
        """Hints of the pairs whose indices are `chosen` `[B]`, mirrored where `flipped` `[B]`, on the device."""

    def loss(self, step: int) -> Tensor:
        generator = self.torch_generator(step)
        chosen = torch.from_numpy(self._chosen(step))[self.share]
        flipped = self.flips(step)[self.share]
        z = self.latents.gather(chosen, flipped).float().to(self.device)
        dropped = torch.rand(self.whole, generator=generator)[self.share] < self.recipe.prompt_drop
        prompts = torch.where(dropped, self.empty, self.prompt_of[chosen])
        text = self.texts.gather(prompts).map(lambda part: part.to(self.device))
        drawn = noised(self.scheduler, z, generator, self.whole, self.share)
        residuals = self.control(drawn.x_t, drawn.t, text, self.hints(chosen, flipped))
        return drawn.loss(self.base.predict(drawn.x_t, drawn.t, text, residuals))

    def seen(self, step: int) -> list[str]:
        pairs = [self.pairs[index] for index in self._chosen(step)]
        return [f"{pair.source} -> {pair.target}: {pair.prompt!r}" for pair in pairs]

    def _chosen(self, step: int) -> np.ndarray:
        """Indices of the whole batch's pairs."""
        return self.numpy_generator(step).integers(len(self.pairs), size=self.whole)

    def flips(self, step: int) -> Tensor:
        """Which of the whole batch of step `step` are mirrored, `bool [whole]`."""
        if not self.recipe.flip:
            return torch.zeros(self.whole, dtype=torch.bool)
        return torch.from_numpy(numpy_generator(self.recipe.seed, step, _FLIPS).random(self.whole) < 0.5)

    @torch.no_grad()
    def preview(self, step: int, folder: Path) -> dict[str, float]:
        pairs = self.held_out[: self.recipe.score_pictures]
        images = [pair.images(self.base.size) for pair in pairs]
        given, truths = [source for source, _ in images], [target for _, target in images]
        hint = self.control.encode(to_tensor(given).to(self.device), self.base)
        results = preview_images(self.base, self.control, hint, [pair.prompt for pair in pairs])
        score = self.condition.mean_score(
            given, [np.asarray(result) for result in results], truths, [pair.parameters for pair in pairs]
        )
        rows = [
            [Image.fromarray(image) for image in given[:_STRIP]],
            results[:_STRIP],
            [Image.fromarray(image) for image in truths[:_STRIP]],
        ]
        scores = {self.condition.fidelity.name: score}
        result = f"result, {self.preview_settings['mode']}"
        write_preview(folder, step, rows, ("given", result, "truth"), scores, self.preview_settings)
        return scores

    @property
    def preview_settings(self) -> dict[str, Any]:
        return preview_settings(self.base, self.control)
