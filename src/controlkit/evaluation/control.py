"""`controlkit evaluate control`: does a control steer?"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from controlkit import conditions
from controlkit.bases.base import Base
from controlkit.controls.control import Control
from controlkit.data.pairs import Pair
from controlkit.errors import UserError
from controlkit.evaluation.base import draw_prompts, reconstruct
from controlkit.evaluation.pictures import EvaluationSet
from controlkit.evaluation.report import Report, gap_closed
from controlkit.images import contact_sheet, to_images, to_tensor
from controlkit.sampling.plan import ActiveControl
from controlkit.sampling.request import DEFAULT_GUIDANCE, DEFAULT_STEPS
from controlkit.sampling.sampler import sample_prompts


@dataclass(frozen=True, kw_only=True)
class Judged:
    """Condition images with the pictures and prompts they belong to; pictures are `uint8 [H, W, 3]`."""

    name: str
    given: Sequence[np.ndarray]
    truths: Sequence[np.ndarray]
    prompts: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Steer:
    """A control, one condition image for each picture, and how much it counts."""

    control: Control
    given: Sequence[np.ndarray]
    weight: float = 1.0


def judged_drawings(condition: conditions.Condition, pictures: EvaluationSet) -> Judged:
    """The condition images of pictures that ship."""
    truths = [drawing.image for drawing in pictures.drawings]
    prompts = [drawing.caption for drawing in pictures.drawings]
    return Judged(name=pictures.name, given=[condition(truth) for truth in truths], truths=truths, prompts=prompts)


def judged_pairs(pairs: Sequence[Pair], size: int) -> Judged:
    """Pairs from disk, brought to `size` x `size`."""
    images = [pair.images(size) for pair in pairs]
    return Judged(
        name="held-out pairs",
        given=[source for source, _ in images],
        truths=[target for _, target in images],
        prompts=[pair.prompt for pair in pairs],
    )


def evaluate_control(
    base: Base,
    control: Control,
    sets: Sequence[EvaluationSet | Judged],
    *,
    steps: int = DEFAULT_STEPS,
    guidance: float = DEFAULT_GUIDANCE,
    weight: float = 1.0,
) -> tuple[Report, Image.Image]:
    """Condition following on each set: no control (baseline), this control, the true picture (ceiling).

    Returns:
        The table and a sheet of the first eight pictures of each set.
    """
    if control.condition is None:
        raise UserError("this control's file does not say which condition it follows; evaluation needs to know")
    condition = conditions.find(control.condition)
    rows: list[tuple[str | float | None, ...]] = []
    sheet: dict[str, Sequence[np.ndarray]] = {}
    facts = {}
    for pictures in sets:
        judged = pictures if isinstance(pictures, Judged) else judged_drawings(condition, pictures)
        without = draw_prompts(base, judged.prompts, steps, guidance)
        use = Steer(control=control, given=judged.given, weight=weight)
        steered = draw_controlled(base, [use], judged.prompts, steps=steps, guidance=guidance)
        mirrored = reconstruct(base, judged.truths)
        baseline, value, ceiling = (_score(condition, judged, results) for results in (without, steered, mirrored))
        gap = gap_closed(baseline, value, ceiling)
        rows.append((f"{judged.name} ({len(judged.truths)})", baseline, value, ceiling, gap))
        facts[judged.name] = {"baseline": baseline, "control": value, "ceiling": ceiling, "gap_closed": gap}
        columns = {"given": judged.given, "no control": without, "control": steered, "truth": judged.truths}
        sheet |= {f"{judged.name}: {title}": group[:8] for title, group in columns.items()}
    direction = "higher" if condition.fidelity.higher_is_better else "lower"
    report = Report(
        title=f"{condition.name}: {condition.fidelity.name} ({direction} is better)",
        columns=("pictures", "no control", "control", "ceiling", "gap closed"),
        rows=tuple(rows),
        notes=(
            "ceiling: the true picture through the autoencoder.",
            "gap closed = (control - no control) / (ceiling - no control).",
        ),
        facts=facts,
    )
    cells = [[Image.fromarray(picture) for picture in group] for group in sheet.values()]
    return report, contact_sheet(cells, row_titles=list(sheet), cell=96)


def _score(condition: conditions.Condition, judged: Judged, results: Sequence[np.ndarray]) -> float:
    every = zip(judged.given, results, judged.truths, strict=True)
    return float(np.mean([condition.score(given, result, truth) for given, result, truth in every]))


def draw_controlled(
    base: Base,
    uses: Sequence[Steer],
    prompts: Sequence[str],
    *,
    steps: int,
    guidance: float,
    batch_size: int = 16,
) -> list[np.ndarray]:
    """One `uint8` picture for each prompt, under all of `uses`; picture i has seed i."""
    made: list[np.ndarray] = []
    count = len(prompts)
    for first in range(0, count, batch_size):
        group = slice(first, min(first + batch_size, count))
        active = [
            ActiveControl(
                use.control, use.control.encode(to_tensor(use.given[group]).to(base.device), base), use.weight
            )
            for use in uses
        ]
        for batch in sample_prompts(
            base,
            prompts=prompts[group],
            seeds=range(group.start, group.stop),
            uses=active,
            steps=steps,
            guidance=guidance,
            batch_size=batch_size,
        ):
            made += [np.asarray(image) for image in to_images(batch)]
        print(f"\rsteered {len(made)} of {count}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return made
