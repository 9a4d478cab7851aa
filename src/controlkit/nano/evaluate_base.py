"""`controlkit evaluate base`: quality of a base trained on nano's images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from controlkit.bases.base import Base
from controlkit.evaluation.features import LITE0, lite0_features
from controlkit.evaluation.metrics import frechet_distance, joint_frechet_distance, psnr_and_ssim, retrieval_accuracy
from controlkit.evaluation.report import Report, gap_closed
from controlkit.evaluation.sampling import generate_uncontrolled, reconstruct
from controlkit.evaluation.sets import EvaluationSet
from controlkit.evaluation.settings import content_of, examples_settings, seeds_of
from controlkit.images import contact_sheet
from controlkit.nano.evaluation_sets import SETS, read_set
from controlkit.nano.icons import COLOURS, TRAINED_STYLES, Drawing, background_colour, caption_of
from controlkit.sampling.request import DEFAULT_STEPS
from controlkit.sampling.settings import base_settings, sampling_settings

Named = tuple[str, Sequence[np.ndarray]]
"""(name, images)."""

GRID = (
    ("cat face", "noto", "white"),
    ("red apple", "fluent", "teal"),
    ("sailboat", "twemoji", "yellow"),
    ("mushroom", "emojione", "green"),
    ("rocket", "noto", "purple"),
    ("owl", "fluent", "pink"),
    ("hamburger", "twemoji", "blue"),
    ("house", "emojione", "gray"),
)
"""Concept, style and background of the rows of `base_grid`."""


def evaluate_base(
    base: Base, steps: int = DEFAULT_STEPS, guidance: float | None = None, sampler: str | None = None
) -> list[Report]:
    """Autoencoder, background colour, distribution and retrieval, each with its baseline and ceiling.

    Generates 1,096 images, which takes a few minutes on two cores.
    """
    held_out, seen = read_set("held-out"), read_set("seen")

    def generate(images: EvaluationSet[Drawing], shuffled: bool = False) -> list[np.ndarray]:
        captions = images.captions
        order = np.random.default_rng(0).permutation(len(captions)) if shuffled else range(len(captions))
        return generate_uncontrolled(base, [captions[index] for index in order], steps, guidance, sampler=sampler)

    def through(name: str) -> list[np.ndarray]:
        return reconstruct(base, read_set(name).images)

    ceiling = "true images through the autoencoder (ceiling)"
    # The images of `seen` are what results are compared with, so their ceiling is of other drawings of the captions.
    again = ("true images at another scale and place, through the autoencoder (ceiling)", through("seen-again"))
    of_seen = generate(seen)
    reports = [
        _autoencoder(base, held_out),
        _colour(base, held_out, steps, guidance, sampler),
        _distribution(held_out, generate(held_out), generate(held_out, shuffled=True), (ceiling, through("held-out"))),
        _distribution(seen, of_seen, generate(seen, shuffled=True), again),
        _retrieval(seen, of_seen, again),
    ]
    sampling = sampling_settings(base, steps=steps, guidance=guidance, sampler=sampler)
    # The first report reconstructs true images; nothing is sampled.
    common = [base_settings(base), *[base_settings(base) | sampling] * (len(reports) - 1)]
    return [replace(report, settings=own | report.settings) for own, report in zip(common, reports, strict=True)]


def base_grid(
    base: Base, steps: int = DEFAULT_STEPS, guidance: float | None = None, sampler: str | None = None
) -> Image.Image:
    """Images of eight fixed prompts (rows) with four fixed seeds (columns), not cherry-picked."""
    prompts = [caption_of(concept, style, colour) for concept, style, colour in GRID]
    made = generate_uncontrolled(
        base, [p for p in prompts for _ in range(4)], steps, guidance, [0, 1, 2, 3] * len(prompts), sampler
    )
    images = [Image.fromarray(image) for image in made]
    rows = [images[first : first + 4] for first in range(0, len(images), 4)]
    return contact_sheet(rows, [f"seed {seed}" for seed in range(4)], prompts, cell=96)


def _autoencoder(base: Base, images: EvaluationSet[Drawing]) -> Report:
    rows = []
    for examples in (images, read_set("openmoji")):
        targets = examples.images
        psnr, ssim = psnr_and_ssim(targets, reconstruct(base, targets))
        rows.append((f"{examples.name} ({len(targets)} images)", psnr, ssim))
    return Report(
        title="Autoencoder",
        columns=("images", "PSNR, dB", "SSIM"),
        rows=tuple(rows),
        facts={"psnr": rows[0][1], "ssim": rows[0][2]},
        settings={"sets": [examples_settings(images), examples_settings(read_set("openmoji"))]},
    )


def _colour(
    base: Base, images: EvaluationSet[Drawing], steps: int, guidance: float | None, sampler: str | None
) -> Report:
    concepts = sorted({drawing.concept for drawing in images.examples})[:20]
    asked = list(product(concepts, COLOURS))
    # Shifted by one for each concept, so that every colour is asked for in every style.
    styles = [TRAINED_STYLES[(i + i // len(COLOURS)) % len(TRAINED_STYLES)] for i in range(len(asked))]
    prompts = [caption_of(concept, style, colour) for (concept, colour), style in zip(asked, styles, strict=True)]
    made = [
        background_colour(image) for image in generate_uncontrolled(base, prompts, steps, guidance, sampler=sampler)
    ]
    right = float(np.mean([colour == found for (_, colour), found in zip(asked, made, strict=True)]))
    targets = images.images
    ceiling = [
        background_colour(image) == drawing.colour
        for image, drawing in zip(reconstruct(base, targets), images.examples, strict=True)
    ]
    return Report(
        title="Background colour that the prompt asks for (240 prompts: 12 colours x 20 held-out concepts)",
        columns=("", "accuracy"),
        rows=(
            ("chance (baseline)", 1 / len(COLOURS)),
            ("generated", right),
            ("true images through the autoencoder (ceiling)", float(np.mean(ceiling))),
        ),
        facts={"colour_accuracy": right},
        settings={
            "sets": [examples_settings(images)],
            "prompts": {"count": len(prompts), "content": content_of((), prompts)},
            "seeds": seeds_of(len(prompts)),
        },
    )


def _distribution(
    images: EvaluationSet[Drawing], generated: Sequence[np.ndarray], shuffled: Sequence[np.ndarray], ceiling: Named
) -> Report:
    """Distances of generated to true images, as sets and pairwise, in EfficientNet-Lite0's features."""
    targets = lite0_features(images.images)
    captions = _caption_features(images.examples)
    rows = []
    for name, group in (("captions shuffled (baseline)", shuffled), ("generated", generated), ceiling):
        features = lite0_features(group)
        rows.append(
            (
                name,
                frechet_distance(features, targets),
                joint_frechet_distance(features, captions, targets, captions),
                float((features - targets).pow(2).sum(1).mean()),
            )
        )
    columns = ("", "FD-lite0", "joint FD-lite0", "paired distance")
    (_, *baseline), (_, *value), (_, *best) = rows
    left = [1 - gap_closed(b, v, c, higher_is_better=False) for b, v, c in zip(baseline, value, best, strict=True)]
    return Report(
        title=f"Distance to {len(targets)} images of {SETS[images.name]} (lower is better)",
        columns=columns,
        rows=(*rows, ("share of the baseline's distance to the ceiling that is left", None, *left[1:])),
        notes=(
            "FD-lite0 does not see captions, so shuffling them hardly changes it; joint FD-lite0",
            "(DeVries et al. 2019) is of features beside what captions say; paired: from the caption's own image.",
        ),
        facts={"fd_lite0": rows[1][1], "joint_share_left": left[1], "paired_share_left": left[2]},
        settings={"sets": [examples_settings(images)], "seeds": seeds_of(len(targets)), "features": LITE0},
    )


def _retrieval(images: EvaluationSet[Drawing], generated: Sequence[np.ndarray], ceiling: Named) -> Report:
    concepts = [drawing.concept for drawing in images.examples]
    gallery = lite0_features(images.images)
    found, best = (
        retrieval_accuracy(lite0_features(group), concepts, gallery, concepts) for group in (generated, ceiling[1])
    )
    count = len(set(concepts))
    return Report(
        title=f"The right concept among the 5 nearest of {count} that were trained on ({len(concepts)} prompts)",
        columns=("", "top-5"),
        rows=(("chance (baseline)", 5 / count), ("generated", found), (ceiling[0], best)),
        facts={"retrieval_top5": found, "retrieval_share_of_ceiling": found / best},
        settings={"sets": [examples_settings(images)], "seeds": seeds_of(len(concepts)), "features": LITE0},
    )


def _caption_features(drawings: Sequence[Drawing]) -> Tensor:
    """One-hot concept, style and colour of each caption, `[N, D]`."""
    facts = [(drawing.concept, drawing.style, drawing.colour) for drawing in drawings]
    columns = [sorted(set(names)) for names in zip(*facts, strict=True)]
    return torch.tensor(
        [[float(word == name) for word, names in zip(row, columns, strict=True) for name in names] for row in facts]
    )
