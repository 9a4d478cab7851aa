"""What a control is compared with: images without it, and the targets through the autoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import Tensor

from controlkit.bases.base import Base
from controlkit.evaluation.features import lite0_features
from controlkit.evaluation.metrics import frechet_distance
from controlkit.evaluation.sampling import generate_uncontrolled, reconstruct
from controlkit.evaluation.settings import seeds_of


@dataclass(frozen=True, kw_only=True)
class Baselines:
    """Images that a control is compared with; they depend on the prompts and seeds, not on the condition."""

    no_control: Sequence[np.ndarray]
    """The baseline: the same prompts and seeds without control."""
    ceiling: Sequence[np.ndarray]
    """The targets, encoded and decoded by the autoencoder."""
    targets: Sequence[np.ndarray]

    @cached_property
    def features(self) -> Tensor:
        """EfficientNet-Lite0 features of the targets `[N, 1280]`."""
        return lite0_features(self.targets)

    @cached_property
    def distances(self) -> tuple[float, float]:
        """FD-lite0 of the baseline and of the ceiling to the targets."""
        return self.distance(self.no_control), self.distance(self.ceiling)

    def distance(self, images: Sequence[np.ndarray]) -> float:
        """FD-lite0 of images to the targets.

        Raises:
            UserError: the `metrics` extra is not installed.
        """
        return frechet_distance(lite0_features(images), self.features)


def generate_baselines(
    base: Base,
    targets: Sequence[np.ndarray],
    prompts: Sequence[str],
    steps: int,
    guidance: float | None,
    sampler: str | None = None,
    seed: int = 0,
) -> Baselines:
    """Compute the baseline and the ceiling of targets and their prompts; image i has seed `seed` + i."""
    seeds = seeds_of(len(prompts), seed)
    no_control = generate_uncontrolled(base, prompts, steps, guidance, seeds=seeds, sampler=sampler)
    return Baselines(no_control=no_control, ceiling=reconstruct(base, targets), targets=targets)
