"""Noise -> latents -> pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from controlkit.bases.base import Base, Text, concatenate
from controlkit.sampling.plan import ActiveControl, Plan


@torch.inference_mode()
def sample(
    base: Base,
    *,
    prompt: str,
    negative_prompt: str = "",
    uses: Sequence[ActiveControl] = (),
    seeds: Sequence[int],
    steps: int = 20,
    guidance: float = 4.0,
    width: int | None = None,
    height: int | None = None,
    batch_size: int = 8,
) -> Iterator[Tensor]:
    """Draw one picture for each seed with DDIM (Song et al. 2021, eta 0) and classifier-free guidance.

    Yields:
        Batches of pictures `[b, 3, height, width]` in [0, 1], in the order of `seeds`.
    """
    width, height = width or base.size, height or base.size
    base.check_size(width, height)
    guided = guidance > 1
    positive = base.encode_text([prompt])
    texts = [base.encode_text([negative_prompt]), positive] if guided else [positive]
    scheduler = base.schedule()
    scheduler.set_timesteps(steps, device=base.device)
    plan = Plan(uses, scheduler.timesteps, texts)
    for first in range(0, len(seeds), batch_size):
        group = seeds[first : first + batch_size]
        x_t = initial_noise(base, group, width, height) * scheduler.init_noise_sigma
        text = concatenate(*(part.expand(len(group)) for part in texts))
        for index, t in enumerate(scheduler.timesteps):
            prediction = _predict(base, plan, index, x_t, t, text, guidance)
            x_t = scheduler.step(prediction, t, x_t, eta=0.0).prev_sample
        yield (base.decode(x_t) + 1) / 2


def initial_noise(base: Base, seeds: Sequence[int], width: int, height: int) -> Tensor:
    """Standard normal noise, each picture's from its own seed, drawn on the CPU as diffusers does."""
    shape = (base.latent_channels, height // base.factor, width // base.factor)
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(noise).to(base.device, base.dtype)


def _predict(base: Base, plan: Plan, index: int, x_t: Tensor, t: Tensor, text: Text, guidance: float) -> Tensor:
    parts = len(plan.texts)
    stacked = torch.cat([x_t] * parts)
    prediction = base.predict(stacked, t, text, plan.residuals(index, stacked))
    if parts == 1:
        return prediction
    without, with_text = prediction.chunk(2)
    return without + guidance * (with_text - without)
