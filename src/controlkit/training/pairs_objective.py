"""Training a control on a folder of pairs: what does not change is computed once."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from controlkit import conditions
from controlkit.conditions.fidelity import by_the_picture
from controlkit.controls.control import encode_images
from controlkit.controls.hints import Hint, map_hint
from controlkit.data.pair import SOURCE
from controlkit.data.pairs import load_pairs, split_pairs
from controlkit.data.prompts import PromptLimit
from controlkit.data.sources import read_picture
from controlkit.images import to_tensor
from controlkit.training.control_objective import ControlObjective
from controlkit.training.memory import CPUOffload, store_frozen, uses_bf16
from controlkit.training.objective import numpy_generator
from controlkit.training.pair_cache import PairCache
from controlkit.training.previews import preview_images, preview_settings, write_preview
from controlkit.training.processes import tell
from controlkit.training.recipes import PairsRecipe

_STRIP = 8
_FLIPS, _CAPTIONS = 11, 12
"""Flips, and which of several captions is taken, are drawn from numbers of their own, so that other runs draw what they
would without them."""


class PairsObjective(ControlObjective):
    """The base's own loss under a control, on pairs; the base is frozen.

    Latents of pictures, embeddings of prompts and of the empty prompt, and hints that no trained weight makes come
    from the cache (`data/cache.py`), keyed by their content; neither autoencoder nor text encoder runs in a step, so
    they wait on the CPU.
    """

    recipe: PairsRecipe

    def __init__(self, recipe: PairsRecipe, device: torch.device) -> None:
        self.condition = conditions.find(recipe.condition)
        if self.condition.requires is not None:
            # Its model would have to be loaded beside what trains, if it is to be had at all.
            self.condition = by_the_picture(self.condition)
        found = load_pairs(recipe.pairs, recipe.condition, recipe.columns)
        self.pairs, self.held_out = split_pairs(found.pairs, recipe.held_out)
        super().__init__(recipe, device)
        limit = PromptLimit(reader="this base", tokens=self.base.prompt_tokens, cut_from=self.base.cut_from)
        tell([*found.notes, *found.prompt_notes(limit)])
        self._tell_of_scaling()
        self.cache = PairCache(self.base, self.pairs, flip=recipe.flip, check=uses_bf16(recipe, device))
        self.latents = self.cache.latents()
        self.texts, _, self.empty = self.cache.texts()
        self.data = self.cache.content()
        self.encoded = self.cache.hints(self.control) if self.control.hint_is_frozen else None
        self.checkpoint()
        if uses_bf16(recipe, device):
            store_frozen(self.base, self.control)
        self.offload = CPUOffload(self.base)

    def _tell_of_scaling(self) -> None:
        """Say where condition images were made at another size than they will be made at for drawing."""
        side, size = min(read_picture(self.pairs[0].source).size), self.base.size
        if side != size and not self.condition.given:
            tell(
                [
                    f"condition images of these pairs are scaled from {side} pixels to {size}; to draw, they are made"
                    f" at {size}, where {self.condition.name} may look different; make the pairs with --size {size}"
                ]
            )

    def hints(self, chosen: Tensor, flipped: Tensor) -> Hint:
        """Hints of the pairs whose indices are `chosen` `[B]`, mirrored where `flipped` `[B]`, on the device."""
        if self.encoded is not None:
            return map_hint(self.encoded.gather(chosen, flipped), self._on_device)
        sources = [
            self.pairs[index].side(SOURCE, self.base.size, mirrored)
            for index, mirrored in zip(chosen.tolist(), flipped.tolist(), strict=True)
        ]
        return encode_images(self.control, to_tensor(sources).to(self.device), self.base)

    def _on_device(self, rows: Tensor) -> Tensor:
        return (rows.float() if rows.is_floating_point() else rows).to(self.device)

    def loss(self, step: int) -> Tensor:
        generator = self.torch_generator(step)
        chosen = torch.from_numpy(self._chosen(step))[self.share]
        flipped = self.flips(step)[self.share]
        z = cast(Tensor, self.latents.gather(chosen, flipped)).float().to(self.device)
        dropped = torch.rand(self.whole, generator=generator)[self.share] < self.recipe.prompt_drop
        rows = [self.cache.positions[caption] for caption in self._captions(step)[self.share]]
        prompts = torch.where(dropped, self.empty, torch.tensor(rows))
        text = self.texts.gather(prompts).map(lambda part: part.to(self.device))
        return self.control_loss(self.control, z, text, self.hints(chosen, flipped), generator)

    def seen(self, step: int) -> list[str]:
        pairs = [self.pairs[index] for index in self._chosen(step)]
        told = zip(pairs, self._captions(step), strict=True)
        return [f"{pair.source} -> {pair.target}: {caption!r}" for pair, caption in told]

    def _chosen(self, step: int) -> np.ndarray:
        """Indices of the whole batch's pairs."""
        return self.numpy_generator(step).integers(len(self.pairs), size=self.whole)

    def _captions(self, step: int) -> list[str]:
        """A caption of each of the whole batch's pairs, at random where there are several."""
        numbers = numpy_generator(self.recipe.seed, step, _CAPTIONS).random(self.whole)
        drawn = zip(self._chosen(step), numbers, strict=True)
        several = ((self.pairs[index].captions, number) for index, number in drawn)
        return [captions[int(number * len(captions))] for captions, number in several]

    def flips(self, step: int) -> Tensor:
        """Which of the whole batch of step `step` are mirrored, `bool [whole]`."""
        if not self.recipe.flip:
            return torch.zeros(self.whole, dtype=torch.bool)
        return torch.from_numpy(numpy_generator(self.recipe.seed, step, _FLIPS).random(self.whole) < 0.5)

    def facts(self) -> dict[str, int]:
        return {"pairs": len(self.pairs)}

    def preview(self, step: int, folder: Path) -> dict[str, float]:
        bf16 = uses_bf16(self.recipe, self.device)
        with self.offload.suspended(), torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            return self._preview(step, folder)

    @torch.no_grad()
    def _preview(self, step: int, folder: Path) -> dict[str, float]:
        pairs = self.held_out[: self.recipe.score_pictures]
        images = [pair.images(self.base.size) for pair in pairs]
        given, truths = [source for source, _ in images], [target for _, target in images]
        hint = encode_images(self.control, to_tensor(given).to(self.device), self.base)
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
