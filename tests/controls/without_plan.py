"""Sampling under controls image by image, branch by branch and step by step, without a plan."""

from __future__ import annotations

from dataclasses import replace

import torch

from controlkit.bases.residuals import Residuals
from controlkit.bases.taps import Tap
from controlkit.controls.control import Acts, Reads
from controlkit.controls.hints import expand
from controlkit.sampling.sampler import initial_noise


@torch.no_grad()
def naive(base, uses, prompts, seeds, steps, guidance):
    images = []
    for number, seed in enumerate(seeds):
        solver = base.schedule.solver("ddim", steps, base.device, base.name)
        x_t = initial_noise(base, [seed], base.size, base.size) * solver.initial
        own = [use.of_images(slice(number, number + 1)) for use in uses]
        for index, t in enumerate(solver.timesteps):
            acting = [use for use in own if use.acts_at(index, steps)]
            halves = []
            for positive, prompt in enumerate(("", prompts[number % len(prompts)])):
                text = base.encode_text([prompt])
                halves.append(one_call(base, acting, x_t, t.expand(1), text, positive=bool(positive)))
            x_t = solver.step(halves[0] + guidance * (halves[1] - halves[0]), x_t, index)
        images.append((base.decode(x_t) + 1) / 2)
    return torch.cat(images)


@torch.no_grad()
def one_call(base, uses, x_t, t, text, *, positive):
    """The base under the controls that act, on one branch of guidance."""
    told = text
    for use in uses:
        if Acts.TOKENS in use.control.acts:
            null = None if positive else use.control.unconditional(use.hint)
            acts = positive or null is not None or not use.conditional_only
            tokens = use.control.tokens(use.hint if null is None else null) * (use.weight if acts else 0)
            told = told.extended(tokens.expand(len(text), *tokens.shape[1:]))
    total, taps = Residuals(), {}
    for use in uses:
        control, read = use.control, told if use.control.reads_tokens else text
        if use.conditional_only and not positive:
            continue
        hint = expand(use.hint, len(x_t))
        if Acts.RESIDUALS in control.acts:
            total = total + use.weighted(control(x_t if Reads.NOISE in control.reads else None, t, read, hint))
        if Acts.TAPS in control.acts:
            null = None if positive else control.unconditional(use.hint)
            hint = hint if null is None else expand(null, len(x_t))
            for point, tap in control.taps(base, x_t, t, read, hint).items():
                taps.setdefault(point, []).append(scaled(tap, use.weight))
    return base.predict(x_t, t, told, total, taps)


def scaled(tap, weight):
    tap = tap if isinstance(tap, Tap) else Tap(function=tap)
    if not tap.weighted:
        return tap

    def function(stream):
        output = tap.function(stream)
        return None if output is None else output * weight

    return replace(tap, function=function)
