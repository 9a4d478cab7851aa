"""Images for baselines and ceilings: prompts without control, and images through the autoencoder."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from controlkit.bases.base import Base
from controlkit.images import to_images, to_tensor
from controlkit.progress import Progress
from controlkit.sampling.sampler import sample_prompts


def generate_uncontrolled(
    base: Base,
    prompts: Sequence[str],
    steps: int,
    guidance: float | None = None,
    seeds: Sequence[int] | None = None,
    sampler: str | None = None,
) -> list[np.ndarray]:
    """Generate one `uint8` image per prompt without control; image i has seed i by default."""
    progress = Progress("denoising steps without control")
    seeds = list(range(len(prompts))) if seeds is None else seeds
    batches = sample_prompts(
        base,
        prompts=prompts,
        seeds=seeds,
        steps=steps,
        guidance=guidance,
        sampler=sampler,
        on_step=lambda step: progress(step.done, step.total),
    )
    return [np.asarray(image) for batch in batches for image in to_images(batch)]


def reconstruct(base: Base, images: Sequence[np.ndarray], batch_size: int = 32) -> list[np.ndarray]:
    """Encode and decode `uint8` images with the autoencoder of the base."""
    decoded: list[np.ndarray] = []
    for first in range(0, len(images), batch_size):
        x = to_tensor(images[first : first + batch_size]).to(base.device) * 2 - 1
        with torch.inference_mode():
            y = base.decode(base.encode_image(x))
        decoded += [np.asarray(image) for image in to_images((y + 1) / 2)]
    return decoded
