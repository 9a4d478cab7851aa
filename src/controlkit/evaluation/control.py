"""`controlkit evaluate control`: does a control steer?"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
from PIL import Image

from controlkit import conditions
from controlkit.bases.base import Base
from controlkit.controls.control import Control
from controlkit.errors import UserError
from controlkit.evaluation.base import draw_prompts, reconstruct
from controlkit.evaluation.pictures import EvaluationSet
from controlkit.evaluation.report import Report, gap_closed
from controlkit.images import contact_sheet, to_images, to_tensor
from controlkit.sampling.plan import ActiveControl
from controlkit.sampling.sampler import sample_prompts


def evaluate_control(
    base: Base,
    control: Control,
    sets: Sequence[EvaluationSet],
    *,
    steps: int = 20,
    guidance: float = 4.0,
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
    sheet: dict[str, list[np.ndarray]] = {}
    facts = {}
    for pictures in sets:
        truths = [drawing.image for drawing in pictures.drawings]
        prompts = [drawing.caption for drawing in pictures.drawings]
        given = [condition(truth) for truth in truths]
        without = draw_prompts(base, prompts, steps, guidance)
        steered = draw_controlled(base, control, given, prompts, steps=steps, guidance=guidance, weight=weight)
        baseline, value, ceiling = (
            _score(condition, given, results, truths) for results in (without, steered, reconstruct(base, truths))
        )
        gap = gap_closed(baseline, value, ceiling)
        rows.append((f"{pictures.name} ({len(truths)})", baseline, value, ceiling, gap))
        facts[pictures.name] = {"baseline": baseline, "control": value, "ceiling": ceiling, "gap_closed": gap}
        for title, group in (("given", given), ("no control", without), ("control", steered), ("truth", truths)):
            sheet[f"{pictures.name}: {title}"] = group[:8]
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


def _score(
    condition: conditions.Condition,
    given: Sequence[np.ndarray],
    results: Sequence[np.ndarray],
    truths: Sequence[np.ndarray],
) -> float:
    return float(np.mean([condition.score(g, r, t) for g, r, t in zip(given, results, truths, strict=True)]))


def draw_controlled(
    base: Base,
    control: Control,
    given: Sequence[np.ndarray],
    prompts: Sequence[str],
    *,
    steps: int,
    guidance: float,
    weight: float = 1.0,
    batch_size: int = 16,
) -> list[np.ndarray]:
    """One `uint8` picture for each pair of condition image and prompt; picture i has seed i."""
    made: list[np.ndarray] = []
    for first in range(0, len(given), batch_size):
        group = slice(first, first + batch_size)
        hint = control.encode(to_tensor(given[group]).to(base.device), base)
        use = ActiveControl(control, hint, weight)
        seeds = range(first, first + len(prompts[group]))
        for batch in sample_prompts(
            base,
            prompts=prompts[group],
            seeds=seeds,
            uses=[use],
            steps=steps,
            guidance=guidance,
            batch_size=batch_size,
        ):
            made += [np.asarray(image) for image in to_images(batch)]
        print(f"\rsteered {len(made)} of {len(given)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return made
