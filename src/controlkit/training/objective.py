"""What a training run trains, as the loop sees it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from controlkit.bases.schedules import Schedule
from controlkit.training.diffusion import Noised, noised
from controlkit.training.recipe import Recipe


class Objective(ABC):
    """Networks, their loss and their score. The loop (`trainer.py`) knows nothing else about a system."""

    trained: nn.ModuleDict
    """The networks whose weights change, by the name they have in the state."""
    recipe: Recipe
    """What it was made from."""
    data: str = ""
    """Hash of what it trains on, where that is something a person may change between a run and its continuation."""
    frozen: str = ""
    """Fingerprint of the weights that it trains on top of and leaves as they are; no others can take their place."""
    process: int = 0
    """Which of the processes that train together this is."""
    processes: int = 1
    """How many there are. All draw the same whole batch's random numbers, and each takes its share of it, so that any
    number of processes trains on what one process with the whole batch would."""

    by_time: Tensor | None = None
    """Of this process's share of the last step, `Noised.by_time`; None where the loss has no time."""

    def parameters(self) -> list[nn.Parameter]:
        """The parameters that the optimiser changes, always in the same order."""
        return [parameter for parameter in self.trained.parameters() if parameter.requires_grad]

    @abstractmethod
    def loss(self, step: int) -> Tensor:
        """The loss of optimiser step `step`; the same step always draws the same data and noise."""

    def noised(self, schedule: Schedule, latents: Tensor, generator: torch.Generator) -> Noised:
        """Noise and times for this process's share of the latents of a step, as the recipe draws and weights them."""
        recipe = self.recipe
        return noised(
            schedule,
            latents,
            generator,
            self.global_batch,
            self.local_slice,
            time_sampling=getattr(recipe, "time_sampling", None),
            snr_gamma=getattr(recipe, "snr_gamma", None),
        )

    def diffusion_loss(self, drawn: Noised, prediction: Tensor) -> Tensor:
        """The weighted mean squared error of a prediction; `by_time` becomes what it was at each time, unweighted."""
        squared = drawn.squared_error(prediction)
        self.by_time = drawn.by_time(squared)
        return drawn.mean(squared)

    @abstractmethod
    def preview(self, step: int, folder: Path) -> dict[str, float]:
        """Write a strip of images of fixed seeds into `folder` and return named scores on held-out data."""

    @property
    def preview_settings(self) -> dict[str, Any]:
        """What the scores of `preview` depend on, as plain values: the control's mode, guidance, steps, sampler."""
        return {}

    def samples(self, step: int) -> Sequence[str]:
        """What the whole batch of step `step` was made of, for a person who looks for what went wrong in it."""
        return ()

    @abstractmethod
    def save(self, folder: Path) -> list[Path]:
        """Write the finished networks into `folder`; returns what was written."""

    def numpy_generator(self, step: int) -> np.random.Generator:
        """What data is drawn with at a step."""
        return numpy_generator(self.recipe.seed, step)

    def torch_generator(self, step: int) -> torch.Generator:
        """What noise is drawn with at a step."""
        return torch_generator(self.recipe.seed, step)

    @property
    def global_batch(self) -> int:
        """Samples of a step, over all processes."""
        return self.recipe.batch_size * self.processes

    @property
    def local_slice(self) -> slice:
        """Which of them are this process's."""
        first = self.recipe.batch_size * self.process
        return slice(first, first + self.recipe.batch_size)


def numpy_generator(seed: int, step: int, purpose: int = 0) -> np.random.Generator:
    """A generator that depends on (seed, step, purpose) alone, so a resumed run draws what it would have drawn."""
    return np.random.default_rng((seed, step, purpose))


def torch_generator(seed: int, step: int, purpose: int = 0) -> torch.Generator:
    """The same for torch, on the CPU, whose numbers do not depend on the device that trains."""
    mixed = np.random.SeedSequence((seed, step, purpose)).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(mixed[0]) << 31 ^ int(mixed[1]))
