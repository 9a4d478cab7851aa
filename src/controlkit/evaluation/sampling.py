"""Baseline and ceiling of an evaluation: images of prompts without control, and true images through the autoencoder."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
import torch

from controlkit.bases.base import Base
from controlkit.images import to_images, to_tensor
from controlkit.sampling.sampler import sample_prompts


def draw_prompts(
    base: Base,
    prompts: Sequence[str],
    steps: int,
    guidance: float | None = None,
    seeds: Sequence[int] | None = None,
    sampler: str | None = None,
) -> list[np.ndarray]:
    """One `uint8` image for each prompt; image i has seed i unless `seeds` says otherwise."""
    seeds = list(range(len(prompts))) if seeds is None else seeds
    images: list[np.ndarray] = []
    for batch in sample_prompts(base, prompts=prompts, seeds=seeds, steps=steps, guidance=guidance, sampler=sampler):
        images += [np.asarray(image) for image in to_images(batch)]
        print(f"\rdrawn {len(images)} of {len(prompts)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return images


def reconstruct(base: Base, images: Sequence[np.ndarray], batch_size: int = 32) -> list[np.ndarray]:
    """`uint8` images through the autoencoder and back."""
    made: list[np.ndarray] = []
    for first in range(0, len(images), batch_size):
        x = to_tensor(images[first : first + batch_size]).to(base.device) * 2 - 1
        with torch.inference_mode():
            y = base.decode(base.encode_image(x))
        made += [np.asarray(image) for image in to_images((y + 1) / 2)]
    return made
