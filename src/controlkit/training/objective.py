"""The interface between the training loop and what it trains."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from controlkit.bases.schedules import Schedule
from controlkit.training.ahead import Prepare, on_device
from controlkit.training.diffusion import Draw, Noised, draw
from controlkit.training.recipe import Recipe


class Objective(ABC):
    """Networks, loss and previews: all that the loop (`trainer.py`) knows of a system.

    `loss` should read nothing from the device (no `item()`), for which a GPU would wait at every step.
    """

    trained: nn.ModuleDict
    """The trained networks, by their names in the state."""
    recipe: Recipe
    """Its recipe."""
    data: str = ""
    """Hash of the training data, if it can change before a run is resumed."""
    held_out_data: str = ""
    """Hash of the held-out data, if it can change before a run is resumed."""
    frozen: str = ""
    """Fingerprint of what is frozen; a resumed run needs the same."""
    frozen_before: str = ""
    """`frozen` as earlier versions recorded it."""
    process: int = 0
    """Index of this process."""
    processes: int = 1
    """Number of processes. All sample the random numbers of the global batch, and each takes its slice, so that any
    number of processes trains on the same as one with the global batch."""

    not_ahead: str = "this objective prepares its batches in `loss`"
    """Why data workers cannot call `prepare`; empty if they can."""
    ahead: Prepare | None = None
    """Where prepared batches come from; None prepares them in the step."""

    by_time: Tensor | None = None
    """`Noised.by_time` of this process's slice of the last step; None if the loss has no times."""

    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters, always in the same order."""
        return [parameter for parameter in self.trained.parameters() if parameter.requires_grad]

    @abstractmethod
    def loss(self, step: int) -> Tensor:
        """The loss of step `step`; the same step always samples the same data and noise."""

    def prepare(self, step: int) -> Any:
        """What step `step` needs and no network computes, on the CPU: data, prompts, random numbers.

        Depends on the step only, uses no network and no GPU; data workers call it ahead of the step.
        """
        raise NotImplementedError(f"{type(self).__name__} prepares nothing ahead of its steps")

    def prepared(self, step: int, device: torch.device) -> Any:
        """What `prepare(step)` returns, on `device`."""
        return on_device((self.ahead or self.prepare)(step), device)

    def draw(self, schedule: Schedule, shape: Sequence[int], generator: torch.Generator) -> Draw:
        """Noise and times of this process's slice of a step, for latents `[C, h, w]`, by the recipe's time sampling."""
        sampling = getattr(self.recipe, "time_sampling", None)
        return draw(schedule, shape, generator, self.global_batch, self.local_slice, sampling)

    def noised(self, schedule: Schedule, latents: Tensor, drawn: Draw) -> Noised:
        """Noisy latents of a step, with the recipe's weighting."""
        return drawn.noised(schedule, latents, getattr(self.recipe, "snr_gamma", None))

    def diffusion_loss(self, noisy: Noised, prediction: Tensor) -> Tensor:
        """The weighted mean squared error of a prediction; also sets `by_time`, which is unweighted."""
        squared = noisy.squared_error(prediction)
        self.by_time = noisy.by_time(squared)
        return noisy.mean(squared)

    @property
    def base_runs(self) -> str:
        """How the base's denoiser runs in a step: `graph`, or `eager` with the reason; empty if it has none."""
        return ""

    @abstractmethod
    def preview(self, step: int, folder: Path) -> dict[str, float]:
        """Write images from fixed seeds into `folder` and return named scores on held-out data."""

    def merits(self, scores: Mapping[str, float]) -> list[float] | None:
        """What `patience` compares of the scores of a preview, higher is better; None if nothing can be compared."""
        return None

    @property
    def has_merits(self) -> bool:
        """Whether `merits` will compare the previews of this run."""
        return type(self).merits is not Objective.merits

    @property
    def preview_settings(self) -> dict[str, Any]:
        """Settings of the samples that `preview` scores, as JSON values: guidance mode and scale, steps, sampler."""
        return {}

    def samples(self, step: int) -> Sequence[str]:
        """Names of the samples of step `step`, over all processes, to find the one that made the loss diverge."""
        return ()

    @abstractmethod
    def save(self, folder: Path, step: int) -> list[Path]:
        """Write the finished networks into `folder`; returns the files."""

    def numpy_generator(self, step: int) -> np.random.Generator:
        """Random generator of a step's data."""
        return numpy_generator(self.recipe.seed, step)

    def torch_generator(self, step: int) -> torch.Generator:
        """Random generator of a step's noise."""
        return torch_generator(self.recipe.seed, step)

    @property
    def global_batch(self) -> int:
        """Samples of a step, over all processes."""
        return self.recipe.batch_size * self.processes

    @property
    def local_slice(self) -> slice:
        """This process's slice of the global batch."""
        first = self.recipe.batch_size * self.process
        return slice(first, first + self.recipe.batch_size)


def numpy_generator(seed: int, step: int, purpose: int = 0) -> np.random.Generator:
    """A generator that depends on (seed, step, purpose) only, so that a resumed run samples the same."""
    return np.random.default_rng((seed, step, purpose))


def torch_generator(seed: int, step: int, purpose: int = 0) -> torch.Generator:
    """The same for torch, on the CPU so that its numbers do not depend on the training device."""
    mixed = np.random.SeedSequence((seed, step, purpose)).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(mixed[0]) << 31 ^ int(mixed[1]))
