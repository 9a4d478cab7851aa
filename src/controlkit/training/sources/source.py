"""The interface of sources of data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from controlkit import conditions
from controlkit.bases.base import Base
from controlkit.bases.text import Text
from controlkit.conditions.condition import Condition
from controlkit.controls.control import Control
from controlkit.controls.hints import Hint
from controlkit.errors import UserError
from controlkit.training.objective import numpy_generator
from controlkit.training.recipe import ControlRecipe, OneCondition


@dataclass(frozen=True, kw_only=True)
class Step:
    """Random numbers of one batch, and this process's slice of it."""

    number: int
    seed: int
    global_batch: int
    """Samples over all processes. Random numbers are sampled for all, so that any number of processes gets the same."""
    local_slice: slice
    """This process's slice of the global batch."""
    generator: torch.Generator
    """Generator of the noise, after the batch; a source may use it first."""

    def rng(self, purpose: int = 0) -> np.random.Generator:
        """A generator that depends on (seed, number, purpose) only; each call returns the same."""
        return numpy_generator(self.seed, self.number, purpose)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A process's samples of one step, on the CPU or the base's device.

    Floating-point tensors may have any type, and are used in float32.
    """

    latents: Tensor | None = None
    """Scaled latents of the images, `[B, C, h, w]`; this or `images`."""
    images: Tensor | None = None
    """`uint8 [B, 3, H, W]`, to be encoded in the step."""
    text: Text | Sequence[str]
    """Prompts or their embeddings."""
    condition_images: Tensor | Mapping[str, Tensor] | None = None
    """`[B, 3, H, W]`, `uint8` or in [0, 1], or those of several conditions by their names; this, `hint` or `inputs`."""
    hint: Hint | None = None
    """The encoded condition images, of batch `B`."""
    inputs: Sequence[Mapping[str, Any]] | None = None
    """In place of both: the inputs of each sample, for a control whose inputs are `Source.values`."""


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Held-out samples of one condition; images are `uint8 [H, W, 3]`."""

    condition_images: Sequence[np.ndarray]
    targets: Sequence[np.ndarray]
    """The images of the pairs, with which results are compared."""
    prompts: Sequence[str]
    parameters: Sequence[Mapping[str, Any]] | None = None
    """Parameters of each condition image; None for the condition's defaults."""
    references: Sequence[np.ndarray] | None = None
    """What scores compare the conditions of results with; None for the condition images."""
    inputs: Sequence[Mapping[str, Any]] | None = None
    """The inputs of each sample, as of `Batch`; the condition images then only show them."""


@dataclass(frozen=True)
class Measure:
    """The score by which previews are compared."""

    name: str
    """Its name in `Source.scores`."""
    higher_is_better: bool = True
    """False for distances."""


class Source(ABC):
    """Images with prompts and condition images. A run creates one, prepares it and asks it for batches."""

    name: ClassVar[str]
    """The recipe setting that selects this source and locates its data."""
    Settings: ClassVar[type[ControlRecipe]]
    """A dataclass of the recipe settings of this source: one called `name`, any others, and other defaults of common
    settings."""
    one_condition: ClassVar[type[OneCondition]] = OneCondition
    """The settings of the condition for systems that train one, possibly with other defaults."""
    values: ClassVar[tuple[str, ...]] = ()
    """Names of the plain inputs that its samples have (`Batch.inputs`), for controls that take those and no image."""
    prepares_ahead: bool = False
    """Whether `batch` uses no network, GPU or thread, so that data workers may call it ahead of the step."""
    caches_encoders: ClassVar[bool] = False
    """Whether steps need neither the base's VAE nor its text encoders. They are then offloaded to the CPU."""

    @abstractmethod
    def __init__(self, recipe: Any) -> None:
        """Open the data, before a base is loaded.

        Raises:
            UserError: it is missing or unsuitable.
        """

    def notes(self, base: Base) -> list[str]:
        """Notes on the data, printed before training."""
        return []

    @abstractmethod
    def prepare(self, base: Base, control: Control) -> None:
        """Called once before the first step, for example to cache outputs of frozen networks."""

    def embedded(self, prompts: Sequence[str]) -> Text | None:
        """Embeddings of prompts on the CPU if they are cached, those of held-out samples and the empty one among them;
        else None."""
        return None

    @abstractmethod
    def batch(self, condition: str, step: Step) -> Batch:
        """This process's samples of a step, always the same for the same step."""

    def batch_together(self, conditions: Sequence[str], step: Step) -> Batch:
        """As `batch`, with images of several conditions by their names: of all of them if the source has them for each
        sample, else of the first alone."""
        first = conditions[0]
        batch = self.batch(first, step)
        assert isinstance(batch.condition_images, Tensor)
        return replace(batch, condition_images={first: batch.condition_images})

    @abstractmethod
    def samples(self, condition: str, step: Step) -> list[str]:
        """Names of all samples of a step, over all processes, to find the one that made the loss diverge."""

    @abstractmethod
    def held_out(self, condition: str) -> HeldOut:
        """The same few held-out samples in every call."""

    def scored_by(self, condition: str) -> Condition | None:
        """The condition whose fidelity scores previews; None, for no score, if it is unknown or needs weights."""
        try:
            kind = conditions.find(condition)
        except UserError:
            return None
        return kind if kind.requires is None else None

    def scores(self, condition: str, held_out: HeldOut, images: Sequence[np.ndarray]) -> dict[str, float]:
        """Scores of images `uint8 [H, W, 3]` generated from the held-out samples, by name."""
        kind = self.scored_by(condition)
        if kind is None:
            return {}
        references = held_out.condition_images if held_out.references is None else held_out.references
        score = kind.mean_score(references, images, held_out.targets, held_out.parameters)
        return {kind.fidelity.name: score}

    def measure(self, condition: str) -> Measure | None:
        """Which of `scores` compares previews of the condition; None if none does. Goes with `scores`."""
        kind = self.scored_by(condition)
        return None if kind is None else Measure(kind.fidelity.name, kind.fidelity.higher_is_better)

    @property
    def digest(self) -> str:
        """Hash of the prepared training data, if it can change before a run is resumed."""
        return ""

    @property
    def held_out_digest(self) -> str:
        """Hash of the held-out data, if it can change before a run is resumed."""
        return ""

    def facts(self) -> dict[str, int | float]:
        """Facts on the data for the metadata of the results."""
        return {}
