"""Condition images, targets and prompts of an evaluation, from a set of images or from pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from controlkit import conditions
from controlkit.conditions.condition import known_name
from controlkit.data.pair import Pair, references_of
from controlkit.evaluation.sets import EvaluationSet, Example
from controlkit.images import resize_cover


@dataclass(frozen=True, kw_only=True)
class EvalSet:
    """Condition images with their target images and prompts; images are `uint8 [H, W, 3]`."""

    name: str
    condition_images: Sequence[np.ndarray]
    targets: Sequence[np.ndarray]
    prompts: Sequence[str]
    parameters: Sequence[Mapping[str, Any]] | None = None
    """Condition parameters of each condition image; None if all were computed with the defaults."""
    condition: str | None = None
    """Condition of the condition images; None if it is not known."""
    references: Sequence[np.ndarray] | None = None
    """What the conditions of results are compared with; None for the condition images."""
    scaled: int = 0
    """How many references are condition images that were scaled to this size."""
    rescaled: int = 0
    """How many condition images were scaled to this size, while their references are computed at it."""

    def scores(self, condition: conditions.Condition, results: Sequence[np.ndarray]) -> list[float]:
        """How well each result, `uint8 [H, W, 3]`, follows its condition image (`Condition.scores`)."""
        references = self.condition_images if self.references is None else self.references
        return condition.scores(references, results, self.targets, self.parameters)


def examples_eval_set(condition: conditions.Condition, examples: EvaluationSet[Example], size: int) -> EvalSet:
    """Scale the images of a set to `size` x `size` and compute their condition images."""
    targets = [np.asarray(resize_cover(Image.fromarray(image), size, size)) for image in examples.images]
    condition_images = [condition(target) for target in targets]
    return EvalSet(
        name=examples.name,
        condition_images=condition_images,
        targets=targets,
        prompts=examples.captions,
        condition=condition.name,
    )


def pairs_eval_set(pairs: Sequence[Pair], size: int, name: str = "held-out pairs") -> EvalSet:
    """Read pairs from disk at `size` x `size`; references are `Pair.reference`."""
    images = [pair.images(size) for pair in pairs]
    return EvalSet(
        name=name,
        condition_images=[source for source, _ in images],
        targets=[target for _, target in images],
        prompts=[pair.prompt for pair in pairs],
        parameters=[pair.parameters for pair in pairs],
        condition=pairs[0].condition if pairs else None,
        references=references_of(pairs, size),
        scaled=sum(pair.is_scaled(size) and not pair.is_reproducible for pair in pairs),
        rescaled=sum(pair.is_scaled(size) and pair.is_reproducible for pair in pairs),
    )


def different_conditions(*names: str | None) -> tuple[str, ...]:
    """The registered conditions of these names, if they are several; `identity` stands for images of any kind."""
    known = dict.fromkeys(filter(None, (known_name(name) for name in names if name)))
    return tuple(known) if len(known) > 1 and "identity" not in known else ()
