"""What a training run trains, as the loop sees it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn


class Objective(ABC):
    """Networks, their loss and their score. The loop (`trainer.py`) knows nothing else about a system."""

    trained: nn.ModuleDict
    """The networks whose weights change, by the name they have in the state."""

    def parameters(self) -> list[nn.Parameter]:
        """The parameters that the optimiser changes, always in the same order."""
        return [parameter for parameter in self.trained.parameters() if parameter.requires_grad]

    @abstractmethod
    def loss(self, step: int) -> Tensor:
        """The loss of optimiser step `step`; the same step always draws the same data and noise."""

    @abstractmethod
    def preview(self, step: int, folder: Path) -> dict[str, float]:
        """Write a strip of pictures of fixed seeds into `folder` and return named scores on held-out data."""

    @abstractmethod
    def save(self, folder: Path) -> list[Path]:
        """Write the finished networks into `folder`; returns what was written."""


def numpy_generator(seed: int, step: int, purpose: int = 0) -> np.random.Generator:
    """A generator that depends on (seed, step, purpose) alone, so a resumed run draws what it would have drawn."""
    return np.random.default_rng((seed, step, purpose))


def torch_generator(seed: int, step: int, purpose: int = 0) -> torch.Generator:
    """The same for torch, on the CPU, whose numbers do not depend on the device that trains."""
    mixed = np.random.SeedSequence((seed, step, purpose)).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(mixed[0]) << 31 ^ int(mixed[1]))
