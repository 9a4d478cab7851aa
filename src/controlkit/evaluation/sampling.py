"""Images of evaluations: prompts under controls and without, and images through the autoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from controlkit.bases.base import Base
from controlkit.controls.control import Control
from controlkit.controls.inputs import encode_images
from controlkit.images import to_images, to_tensor
from controlkit.progress import Progress
from controlkit.sampling.plan import ActiveControl
from controlkit.sampling.sampler import images_at_once, sample_prompts
from controlkit.sampling.step import Step


@dataclass(frozen=True, kw_only=True)
class EvalControl:
    """A control with one condition image per prompt, its weight and its mode."""

    control: Control
    condition_images: Sequence[np.ndarray]
    weight: float = 1.0
    mode: str | None = None
    """One of `uses.MODES`; None is the default of the base."""


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


def generate_controlled(
    base: Base,
    uses: Sequence[EvalControl],
    prompts: Sequence[str],
    *,
    steps: int,
    guidance: float | None = None,
    sampler: str | None = None,
    batch_size: int | None = None,
    seed: int = 0,
) -> list[np.ndarray]:
    """Generate one `uint8` image per prompt under all of `uses`; image i has seed `seed` + i."""
    generated: list[np.ndarray] = []
    count = len(prompts)
    batch_size = batch_size or images_at_once(base.size, base.size)
    starts = range(0, count, batch_size)
    progress = Progress("denoising steps under control")

    def report(turn: int, step: Step) -> None:
        whole = step.among(turn * step.total, len(starts) * step.total)
        progress(whole.done, whole.total)

    for turn, first in enumerate(starts):
        group = slice(first, min(first + batch_size, count))
        active = [
            ActiveControl.in_mode(
                use.mode,
                base,
                control=use.control,
                hint=encode_images(use.control, to_tensor(use.condition_images[group]).to(base.device), base),
                weight=use.weight,
            )
            for use in uses
        ]
        for batch in sample_prompts(
            base,
            prompts=prompts[group],
            seeds=range(seed + group.start, seed + group.stop),
            uses=active,
            steps=steps,
            guidance=guidance,
            sampler=sampler,
            batch_size=batch_size,
            on_step=partial(report, turn),
        ):
            generated += [np.asarray(image) for image in to_images(batch)]
    return generated


def reconstruct(base: Base, images: Sequence[np.ndarray], batch_size: int = 32) -> list[np.ndarray]:
    """Encode and decode `uint8` images with the autoencoder of the base."""
    decoded: list[np.ndarray] = []
    for first in range(0, len(images), batch_size):
        x = to_tensor(images[first : first + batch_size]).to(base.device) * 2 - 1
        with torch.inference_mode():
            y = base.decode(base.encode_image(x))
        decoded += [np.asarray(image) for image in to_images((y + 1) / 2)]
    return decoded
