"""The contract of a source of data, and what training asks of one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    """The random numbers of one batch, and which of its samples this process takes."""

    number: int
    seed: int
    global_batch: int
    """Samples over all processes. Numbers are drawn for all of them, so that any number of processes draws the same."""
    local_slice: slice
    """Which of them are this process's."""
    generator: torch.Generator
    """What noise is drawn with once the batch is there; what a source draws with it comes first."""

    def rng(self, purpose: int = 0) -> np.random.Generator:
        """A generator that depends on (seed, number, purpose) alone: asked for again, it draws the same."""
        return numpy_generator(self.seed, self.number, purpose)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A process's samples of one step, on the base's device."""

    latents: Tensor
    """Scaled latents of the images, `[B, C, h, w]`."""
    text: Text | Sequence[str]
    """Prompts, or what the base's text encoders made of them."""
    condition_images: Tensor | None = None
    """`[B, 3, H, W]` in [0, 1]; this or `hint`."""
    hint: Hint | None = None
    """What the control made of them, of batch `B`."""


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Held-out samples of one condition; images are `uint8 [H, W, 3]`."""

    condition_images: Sequence[np.ndarray]
    targets: Sequence[np.ndarray]
    """The true images."""
    prompts: Sequence[str]
    parameters: Sequence[Mapping[str, Any]] | None = None
    """Those that each condition image was made with; None is the condition's defaults."""


class Source(ABC):
    """Images with prompts and condition images. One of these is made for a run, prepared, and asked for batches."""

    name: ClassVar[str]
    """The setting of recipes that says where the data lies; it chooses this source."""
    Settings: ClassVar[type[ControlRecipe]]
    """A dataclass of the settings that a recipe has with this source: one of this `name`, and whatever else it needs;
    also other defaults of those that every recipe has."""
    one_condition: ClassVar[type[OneCondition]] = OneCondition
    """The settings that name the condition of a system that trains one; with other defaults where that helps."""
    caches_encoders: ClassVar[bool] = False
    """Whether steps run neither the base's autoencoder nor its text encoders. They wait on the CPU then, and frozen
    weights may be stored in bf16."""

    @abstractmethod
    def __init__(self, recipe: Any) -> None:
        """Look at the data, before a base is loaded.

        Raises:
            UserError: it is not there, or does not do.
        """

    def notes(self, base: Base) -> list[str]:
        """What to tell of the data before training."""
        return []

    @abstractmethod
    def prepare(self, base: Base, control: Control) -> None:
        """Called once before the first step; what frozen networks make of the data can be cached here."""

    @abstractmethod
    def batch(self, condition: str, step: Step) -> Batch:
        """This process's samples of a step; the same step always has the same."""

    @abstractmethod
    def samples(self, condition: str, step: Step) -> list[str]:
        """Names of all samples of a step, over all processes, for a person to find the one that did harm."""

    @abstractmethod
    def held_out(self, condition: str) -> HeldOut:
        """Always the same few, that this condition is never trained on."""

    def scored_by(self, condition: str) -> Condition | None:
        """The condition whose fidelity is the score of previews; None, which is no score, for one that cannot be made
        here: it needs weights, or is not known."""
        try:
            kind = conditions.find(condition)
        except UserError:
            return None
        return kind if kind.requires is None else None

    @property
    def digest(self) -> str:
        """Hash of the data once it is prepared, where a person may change it between a run and its continuation."""
        return ""

    def facts(self) -> dict[str, int]:
        """What a finished file says of the data."""
        return {}
