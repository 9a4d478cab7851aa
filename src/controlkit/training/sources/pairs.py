"""Pairs of a condition image and an image; outputs of frozen networks are cached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from torch import Tensor

from controlkit import conditions
from controlkit.bases.base import Base
from controlkit.bases.text import Text
from controlkit.conditions.condition import Condition
from controlkit.conditions.fidelity import scored_by_target
from controlkit.controls.control import Control
from controlkit.controls.hints import Hint, float_hint
from controlkit.data.pair import SOURCE, Pair, references_of
from controlkit.data.pairs import load_pairs, split_pairs
from controlkit.data.prompts import PromptLimit
from controlkit.data.readers.columns import Columns
from controlkit.data.sources import open_image
from controlkit.errors import UserError
from controlkit.files import sha256_of
from controlkit.images import stacked
from controlkit.training.pair_cache import ImageRows, PairCache, content_of
from controlkit.training.precision import uses_bf16
from controlkit.training.recipe import ControlRecipe, OneCondition
from controlkit.training.sources.registry import source
from controlkit.training.sources.source import Batch, HeldOut, Source, Step

_UNNAMED = "identity"
"""The condition of pairs whose recipe names none."""
_FLIPS, _CAPTIONS = 11, 12
"""Purposes of random numbers: flips and choices of captions have their own, so that they do not change the others."""


@dataclass(frozen=True, kw_only=True)
class PairSettings(ControlRecipe):
    """Settings of training on pairs."""

    pairs: str
    """Pairs in any layout of docs/pairs.md."""
    image_column: str | None = None
    """Image column if `pairs` is a table (JSON lines, CSV, Parquet); null finds it by name."""
    conditioning_image_column: str | None = None
    """The same for condition images."""
    caption_column: str | None = None
    """The same for captions."""
    steps: int = 500
    """Total optimiser steps."""
    batch_size: int = 16
    """Pairs per step."""
    save_every: int = 100
    """Steps between checkpoints of the training state."""
    preview_every: int = 100
    """Steps between previews, which are scored."""
    held_out: float = 0.1
    """Fraction of the pairs held out of training and used for evaluation; at least one pair is."""
    prompt_drop: float = 0.3
    """Fraction of prompts replaced by the empty prompt (0.3 in CtrLoRA's reference)."""
    flip: bool = False
    """Flip half of the pairs at random, condition image and image together. Not for images with text, or prompts with
    left and right."""
    crops: int = 1
    """Square crops of each pair, evenly spaced along the long side of its image, each encoded once and cached; 1 is the
    centre crop. The only crop of square images and of held-out pairs."""
    score_pictures: int = 16
    """Held-out pairs on which each preview scores fidelity to the condition."""

    @property
    def columns(self) -> Columns:
        """The table columns set above."""
        return Columns(
            image=self.image_column, conditioning_image=self.conditioning_image_column, caption=self.caption_column
        )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.held_out < 1:
            raise UserError(f"held_out is {self.held_out}; it must be at least 0 and below 1", "out-of-range")


@dataclass(frozen=True, kw_only=True)
class PairCondition(OneCondition):
    """The settings of one condition for pairs, whose condition may have no name here."""

    condition: str = _UNNAMED
    """Condition that scores fidelity; `identity` compares the result with the target."""
    name: str = "control"
    """Name of the control and of its file."""


@source
class PairSource(Source):
    """Pairs of every condition of a recipe, one `ConditionPairs` each."""

    name = "pairs"
    Settings = PairSettings
    one_condition = PairCondition
    prepares_ahead = True
    caches_encoders = True

    def __init__(self, recipe: PairSettings) -> None:
        self.recipe = recipe
        self.together = recipe.training.together
        self.of = {name: ConditionPairs(recipe, name) for name in recipe.condition_names}

    def notes(self, base: Base) -> list[str]:
        several = len(self.of) > 1
        return [f"{name}: {note}" if several else note for name, pairs in self.of.items() for note in pairs.notes(base)]

    def prepare(self, base: Base, control: Control) -> None:
        for name, pairs in self.of.items():
            pairs.prepare(base, control.for_condition(name))
        if self.together:
            self._check_images()

    def embedded(self, prompts: Sequence[str]) -> Text | None:
        found = (pairs.embedded(prompts) for pairs in self.of.values())
        return next((text for text in found if text is not None), None)

    def _check_images(self) -> None:
        """Check that the pairs of all conditions are of the same images, which are in the order of their hashes.

        Raises:
            UserError: they are not.
        """
        (first, own), *others = ((name, pairs.cache.image_keys()) for name, pairs in self.of.items())
        for name, keys in others:
            if keys != own:
                raise UserError(
                    f"this system trains on all conditions of an image at once, and the pairs of {first} and {name} are"
                    f" of different images: {len(own)} and {len(keys)} to train on, of which"
                    f" {len(set(own) & set(keys))} are the same",
                    "bad-data",
                )

    def batch(self, condition: str, step: Step) -> Batch:
        return self.of[condition].batch(step)

    def batch_together(self, conditions: Sequence[str], step: Step) -> Batch:
        batch = self.batch(conditions[0], step)
        images = {name: self.of[name].images_of(step) for name in conditions}
        return replace(batch, condition_images=images)

    def samples(self, condition: str, step: Step) -> list[str]:
        return self.of[condition].samples(step)

    def held_out(self, condition: str) -> HeldOut:
        return self.of[condition].held_out_samples()

    def scored_by(self, condition: str) -> Condition | None:
        return self.of[condition].condition

    @property
    def digest(self) -> str:
        first, *more = (pairs.content for pairs in self.of.values())
        return sha256_of(first, *more) if more else first

    @property
    def held_out_digest(self) -> str:
        return sha256_of(*(pairs.held_out_content for pairs in self.of.values()))

    def facts(self) -> dict[str, int | float]:
        return {"pairs": sum(pairs.count for pairs in self.of.values()), "held_out": self.recipe.held_out}


class ConditionPairs:
    """Pairs of one condition.

    Latents, text embeddings, and hints from frozen encoders come from the cache (`data/cache.py`).
    """

    def __init__(self, recipe: PairSettings, condition: str) -> None:
        self.recipe = recipe
        self.name = condition
        self.condition = conditions.find(condition)
        if self.condition.requires is not None:
            # Its model would need memory beside the trained networks, and may be missing.
            self.condition = scored_by_target(self.condition)
        self.found = load_pairs(recipe.pairs, condition, recipe.columns)
        training, self.held_out = split_pairs(self.found.pairs, recipe.held_out)
        self.count = len(training)
        self.pairs = [crop for pair in training for crop in pair.crops(recipe.crops)]

    def notes(self, base: Base) -> list[str]:
        """Notes of the reader, on empty or long prompts, and on condition images of another size."""
        limit = PromptLimit(reader="this base", tokens=base.prompt_tokens, cut_from=base.cut_from)
        notes = [*self.found.notes, *self.found.prompt_notes(limit)]
        recorded = self.found.recorded
        if self.name == _UNNAMED and recorded not in (None, _UNNAMED):
            notes.append(
                f"the pairs record the condition {recorded}, but the recipe's condition is {_UNNAMED}: the control is"
                f" saved and scored as {_UNNAMED}. For a control of {recorded}, set condition={recorded}"
            )
        side, size = min(open_image(self.pairs[0].source).size), base.size
        if side != size and not self.condition.provided:
            notes.append(
                f"condition images of these pairs are scaled from {side} to {size} pixels, but computed at {size} for"
                f" generation, where {self.condition.name} may look different; make the pairs with --size {size}"
            )
        return notes

    def prepare(self, base: Base, control: Control) -> None:
        """Compute the outputs of frozen networks, or read them from the cache."""
        self.size = base.size
        self.cache = PairCache(
            base,
            self.pairs,
            prompts=[pair.prompt for pair in self._scored],
            flip=self.recipe.flip,
            check=uses_bf16(self.recipe, base.device),
        )
        self.latents = self.cache.latents()
        self.texts, _, self.empty = self.cache.texts()
        self.content = self.cache.content()
        self.held_out_content = content_of(self.held_out)
        self.hints: ImageRows | None = self.cache.hints(control) if control.hint_is_frozen else None

    def batch(self, step: Step) -> Batch:
        """This process's pairs of a step."""
        local = step.local_slice
        chosen, flipped = torch.from_numpy(self._chosen(step))[local], self.flips(step)[local]
        dropped = torch.rand(step.global_batch, generator=step.generator)[local] < self.recipe.prompt_drop
        rows = [self.cache.positions[caption] for caption in self._captions(step)[local]]
        prompts = torch.where(dropped, self.empty, torch.tensor(rows))
        return Batch(
            latents=cast(Tensor, self.latents.gather(chosen, flipped)),
            text=self.texts.gather(prompts),
            condition_images=self.condition_images(chosen, flipped) if self.hints is None else None,
            hint=None if self.hints is None else self.hints.gather(chosen, flipped),
        )

    def hint(self, chosen: Tensor, flipped: Tensor) -> Hint | None:
        """Cached hints of the pairs with indices `chosen` `[B]`, mirrored where `flipped` `[B]`; None if not cached."""
        if self.hints is None:
            return None
        return float_hint(self.hints.gather(chosen, flipped))

    def condition_images(self, chosen: Tensor, flipped: Tensor) -> Tensor:
        """Condition images `uint8 [B, 3, H, W]` of the same pairs."""
        sides = zip(chosen.tolist(), flipped.tolist(), strict=True)
        images = [self.pairs[index].side(SOURCE, self.size, mirrored) for index, mirrored in sides]
        return stacked(images)

    def images_of(self, step: Step) -> Tensor:
        """Condition images of this process's pairs of a step, `uint8 [B, 3, H, W]`."""
        local = step.local_slice
        return self.condition_images(torch.from_numpy(self._chosen(step))[local], self.flips(step)[local])

    def samples(self, step: Step) -> list[str]:
        """Every pair of a step, with its sampled caption."""
        pairs = [self.pairs[index] for index in self._chosen(step)]
        captions = self._captions(step)
        return [f"{pair.source} -> {pair.target}: {text!r}" for pair, text in zip(pairs, captions, strict=True)]

    def held_out_samples(self) -> HeldOut:
        """The first held-out pairs."""
        pairs = self._scored
        condition_images, targets = zip(*(pair.images(self.size) for pair in pairs), strict=True)
        return HeldOut(
            condition_images=condition_images,
            targets=targets,
            prompts=[pair.prompt for pair in pairs],
            parameters=[pair.parameters for pair in pairs],
            references=references_of(pairs, self.size),
        )

    @property
    def _scored(self) -> Sequence[Pair]:
        return self.held_out[: self.recipe.score_pictures]

    def embedded(self, prompts: Sequence[str]) -> Text | None:
        """As `Source.embedded`."""
        positions = self.cache.positions
        if not set(prompts) <= set(positions):
            return None
        return self.texts.gather(torch.tensor([positions[prompt] for prompt in prompts]))

    def _chosen(self, step: Step) -> np.ndarray:
        """Indices of all pairs of a step."""
        return step.rng().integers(len(self.pairs), size=step.global_batch)

    def _captions(self, step: Step) -> list[str]:
        """A caption of each pair of a step, sampled if there are several."""
        fractions = step.rng(_CAPTIONS).random(step.global_batch)
        captions = [self.pairs[index].captions for index in self._chosen(step)]
        return [texts[int(fraction * len(texts))] for texts, fraction in zip(captions, fractions, strict=True)]

    def flips(self, step: Step) -> Tensor:
        """Which pairs of a step are mirrored, `bool [global_batch]`."""
        if not self.recipe.flip:
            return torch.zeros(step.global_batch, dtype=torch.bool)
        return torch.from_numpy(step.rng(_FLIPS).random(step.global_batch) < 0.5)
