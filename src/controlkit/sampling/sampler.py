"""Noise -> latents -> images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from controlkit.bases.base import Base
from controlkit.bases.prompt_encoding import PLAIN, TextOptions
from controlkit.bases.schedules import Solver
from controlkit.bases.solver_names import solver_name
from controlkit.bases.text import Text, concatenate
from controlkit.controls.control import Control
from controlkit.controls.hints import rows_of
from controlkit.errors import UserError
from controlkit.sampling.graphs import NetworkCalls
from controlkit.sampling.plan import ActiveControl, Plan, rows_at_once
from controlkit.sampling.request import DEFAULT_STEPS
from controlkit.sampling.residual_cache import ResidualCache
from controlkit.sampling.start_image import StartImage
from controlkit.sampling.step import Step


def sample(base: Base, *, prompt: str, seeds: Sequence[int], **settings: Any) -> Iterator[Tensor]:
    """Generate images of one prompt, one per seed; `settings` are those of `sample_prompts`."""
    return sample_prompts(base, prompts=[prompt], seeds=seeds, **settings)


def solver_of(base: Base, sampler: str | None, steps: int, width: int, height: int) -> Solver:
    """The solver of a sampler for images of a size in pixels; None is the sampler of the base.

    Raises:
        UserError: the base does not support the sampler or this number of steps.
    """
    schedule = base.schedule_for(width, height)
    return schedule.solver(solver_name(sampler or base.default_sampler), steps, base.device, base.name)


@torch.inference_mode()
def sample_prompts(
    base: Base,
    *,
    prompts: Sequence[str],
    seeds: Sequence[int],
    negative_prompt: str = "",
    uses: Sequence[ActiveControl] = (),
    steps: int = DEFAULT_STEPS,
    guidance: float | None = None,
    sampler: str | None = None,
    width: int | None = None,
    height: int | None = None,
    batch_size: int | None = None,
    start: StartImage | None = None,
    text: TextOptions = PLAIN,
    cache: ResidualCache | None = None,
    low_memory: bool = False,
    encode_text: Callable[..., Text] | None = None,
    calls: NetworkCalls | None = None,
    on_step: Callable[[Step], object] | None = None,
) -> Iterator[Tensor]:
    """Generate one image per seed with classifier-free guidance.

    Args:
        prompts: one for all images, or one per image.
        uses: controls, with one hint for all images or one per image.
        guidance: guidance scale; 1 switches guidance off. Default: that of the base. A base that reads it
            (`Base.reads_guidance`) has no unconditional branch.
        sampler: one of `request.SAMPLERS`. Default: that of the base.
        width: in pixels; default, also of `height`: the size of the base.
        batch_size: images per batch. Default: 16 up to 256 x 256, fewer for larger ones.
        start: the image to start from, of this size, one for all or one per image; controls' start and end then are
            fractions of the steps that run.
        text: how the prompts are read.
        cache: keeps residuals that do not depend on the noise, for the next call under the same condition.
        low_memory: keep the text encoders on the CPU except while prompts are encoded, and decode image by image.
        encode_text: in place of `Base.encode_text`, for prompts that are encoded already.
        calls: how the networks are called, with a report of it afterwards. Default: as CUDA graphs where they pay.
        on_step: called after every denoising step. An exception that it raises ends the sampling.

    Yields:
        Batches of images `[b, 3, height, width]` in [0, 1], in the order of `seeds`.

    Raises:
        UserError: the base does not support this size, number of steps or sampler, or needs an image and a mask; graphs
            are demanded and not possible; or the latents are NaN or infinite.
    """
    calls = NetworkCalls(base) if calls is None else calls
    calls.begin([use.control for use in uses if use.weight != 0])
    width, height = width or base.size, height or base.size
    guidance = base.default_guidance if guidance is None else guidance
    batch_size = batch_size or images_at_once(width, height)
    base.check_size(width, height)
    schedule, solver = base.schedule_for(width, height), solver_of(base, sampler, steps, width, height)
    if base.is_inpainting and (start is None or start.mask is None):
        raise UserError(
            f"{base.name} is an inpainting model, which needs an image and a mask: pass --image and --mask, or use a"
            " text-to-image model",
            "missing-setting",
        )
    first_step = 0 if start is None else start.first_step(base, steps) * solver.order
    timesteps = solver.timesteps[first_step:]
    total = -(-len(seeds) // batch_size) * len(timesteps)
    done = 0
    plan: Plan | None = None
    one_for_all = len(prompts) == 1 and all(rows_of(use.hint) == 1 for use in uses)
    for first in range(0, len(seeds), batch_size):
        group = slice(first, first + batch_size)
        last = first + batch_size >= len(seeds)
        if plan is None or not one_for_all:
            size = (width, height)
            with base.text_encoders_loaded(aside=low_memory):
                encode = encode_text or base.encode_text
                texts = [encode(prompts if len(prompts) == 1 else prompts[group], size, text)]
                texts = [base.guided(each, guidance) for each in texts]
                if guidance > 1 and not base.reads_guidance:
                    # The empty prompt is the same on both sides.
                    options = replace(text, negative=True) if negative_prompt else text
                    texts.insert(0, encode([negative_prompt], size, options))
                texts = base.fitted(*texts)
            active = [use.of_images(group) for use in uses]
            at_once = rows_at_once(width, height)
            plan = Plan(active, timesteps, texts, cache, rows_at_once=at_once, base_key=base.merged, calls=calls)
            kinds = [plan.acting(place) for place in range(len(timesteps))]
        plan.reused = one_for_all and not last
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[group]]
        solver.begin(first_step, generators)
        normal = partial(noise_of, base, generators, width, height)
        begun = None if start is None else start.of_images(group).begin(base, solver, first_step, normal)
        x_t = normal() * solver.initial if begun is None else begun.x_t
        masked = None if begun is None else begun.masked
        alike = max(0, len(seeds) // batch_size - first // batch_size - 1)  # later batches of this size
        for place, t in enumerate(timesteps):
            index = first_step + place
            calls.left = kinds[place:].count(kinds[place]) + alike * kinds.count(kinds[place])
            taken = solver.input(x_t, index)
            *others, prediction = _predict(base, plan, calls, place, taken, t, masked)
            for unconditional in others:
                prediction = base.combined(unconditional, prediction, guidance)
            x_t = solver.step(prediction, x_t, index)
            x_t = x_t if begun is None else begun.kept(x_t, solver, index + 1)
            done += 1
            if on_step is not None:
                places = range(first, first + len(x_t))
                clean = partial(schedule.clean, prediction, taken, t)
                on_step(Step(base, done, total, place + 1, len(timesteps), places, clean))
        if not plan.reused:
            plan.release()  # else its residuals would take memory while the latents are decoded
        if not torch.isfinite(x_t).all():
            raise _not_finite(seeds[group], base, [use.control for use in uses])
        with base.slicing(low_memory):
            images = base.decode(x_t)
        if not torch.isfinite(images).all():
            raise _not_finite(seeds[group], base, [])
        yield (images + 1) / 2


def _not_finite(seeds: Sequence[int], base: Base, controls: Sequence[Control]) -> UserError:
    what = f"seeds {', '.join(map(str, seeds))} produced NaN or Inf"
    cause = "the file is damaged"
    advice = "lower the control weights or the guidance scale"
    if base.dtype == torch.float16:
        cause = "the file is damaged, or its weights overflow fp16: try --precision bf16 or fp32"
        advice = f"in fp16 this is usually overflow: try --precision bf16 or fp32, or {advice}"
    networks: list[tuple[str, nn.Module]] = [(control.title, control) for control in controls]
    merged = " with the LoRAs merged into it" if base.merged else ""
    networks += [(f"the {part} of {base.name}{merged}", network) for part, network in base.named_networks().items()]
    for owner, network in networks:
        for name, weight in network.named_parameters():
            if not torch.isfinite(weight).all():
                return UserError(f"{what}: the weight {name} of {owner} has some; {cause}", "damaged-file")
    return UserError(f"{what}; {advice}", "not-finite")


def images_at_once(width: int, height: int) -> int:
    """The default batch size for images of this size: 16 small ones, 4 of 512 x 512."""
    return max(1, min(16, 2**20 // (width * height)))


def initial_noise(base: Base, seeds: Sequence[int], width: int, height: int) -> Tensor:
    """Standard normal latents, one per seed, sampled on the CPU as diffusers does."""
    return noise_of(base, [torch.Generator().manual_seed(seed) for seed in seeds], width, height)


def noise_of(base: Base, generators: Sequence[torch.Generator], width: int, height: int) -> Tensor:
    """Standard normal latents, one per generator."""
    shape = (base.latent_channels, height // base.factor, width // base.factor)
    noise = [torch.randn(shape, generator=generator) for generator in generators]
    return torch.stack(noise).to(base.device, base.dtype)


def _predict(
    base: Base, plan: Plan, calls: NetworkCalls, index: int, x_t: Tensor, t: Tensor, masked: Tensor | None = None
) -> tuple[Tensor, ...]:
    """The network's prediction for each part of the plan."""
    parts = len(plan.texts)
    stacked = torch.cat([x_t] * parts)
    texts = [part.expand(len(x_t)) for part in plan.text(index)]
    residuals, taps = plan.residuals(index, stacked), plan.taps(index, stacked, base)
    predictions = []
    passes = plan.passes(index)
    for first, last, modules in passes:
        rows = slice(first * len(x_t), last * len(x_t))
        added = None if residuals is None else residuals.rows(rows.start, rows.stop)
        hidden = None if masked is None else torch.cat([masked] * (last - first))
        text = concatenate(*texts[first:last])
        made = calls.predict(stacked[rows], t, text, added, taps, plan.tapping(index), modules, hidden)
        predictions.append(made.clone() if len(passes) > 1 else made)  # the next call may overwrite a graph's output
    return torch.cat(predictions).chunk(parts)
