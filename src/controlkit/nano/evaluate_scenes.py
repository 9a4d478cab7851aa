"""`controlkit evaluate scenes`: whether a control of boxes with phrases puts each icon into its box, on nano."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from controlkit.bases.base import Base
from controlkit.controls.control import Control
from controlkit.controls.inputs import encode_each, takes_values, words_of_inputs
from controlkit.errors import UserError
from controlkit.evaluation.features import LITE0
from controlkit.evaluation.report import Report, Row, gap_closed
from controlkit.evaluation.sampling import generate_uncontrolled, reconstruct
from controlkit.evaluation.settings import control_settings, seeds_of, set_settings
from controlkit.images import contact_sheet, to_images
from controlkit.nano.evaluation_sets import read_set
from controlkit.nano.icons import TRAINED_STYLES, IconSets
from controlkit.nano.scene_metrics import concept_accuracies, mean_iou
from controlkit.nano.scenes import Scene, by_style, draw_scene, picture_of_boxes
from controlkit.progress import Progress
from controlkit.sampling.plan import ActiveControl
from controlkit.sampling.request import DEFAULT_STEPS
from controlkit.sampling.sampler import sample_prompts
from controlkit.sampling.settings import base_settings, sampling_settings

_SEED = 21
_SHOWN = 8
_INPUT = "boxes"


def evaluation_scenes(icons: str | Path, count: int) -> list[Scene]:
    """Scenes of the concepts of the evaluation set `seen`, always the same.

    Args:
        icons: file of `nano.icons.render_sets`.

    Raises:
        UserError: the file cannot be read.
    """
    concepts = {drawing.concept for drawing in read_set("seen").examples}
    styles = by_style(IconSets(icons).select(styles=TRAINED_STYLES, held_out=False, concepts=concepts))
    rng = np.random.default_rng(_SEED)
    return [draw_scene(styles, rng) for _ in range(count)]


def evaluate_scenes(
    base: Base,
    control: Control,
    scenes: Sequence[Scene],
    *,
    steps: int = DEFAULT_STEPS,
    guidance: float | None = None,
    sampler: str | None = None,
    weight: float = 1.0,
    mode: str | None = None,
) -> tuple[Report, Image.Image]:
    """Score overlap and concepts of the boxes of scenes: without boxes, with swapped phrases, with boxes, and of the
    scenes themselves through the autoencoder.

    Returns:
        The table, and a contact sheet of the first eight scenes.

    Raises:
        UserError: the control does not take boxes with phrases alone, or the `metrics` extra is not installed.
    """
    if not takes_values(control, (_INPUT,)):
        raise UserError(
            f"{control.title} takes {words_of_inputs(control)}; scenes are for controls of boxes with phrases",
            "unsupported",
        )
    targets, prompts = [scene.image for scene in scenes], [scene.caption for scene in scenes]
    boxes, concepts = [scene.boxes for scene in scenes], [scene.concepts for scene in scenes]
    settings: dict[str, Any] = {"steps": steps, "guidance": guidance, "sampler": sampler}

    def controlled(inputs: Sequence[Mapping[str, Any]], words: str) -> list[np.ndarray]:
        with torch.inference_mode():
            hint = encode_each(control, inputs, base)
        progress = Progress(f"denoising steps with {words}")
        batches = sample_prompts(
            base,
            prompts=prompts,
            seeds=range(len(prompts)),
            uses=[ActiveControl.in_mode(mode, base, control=control, hint=hint, weight=weight)],
            on_step=lambda step: progress(step.done, step.total),
            **settings,
        )
        return [np.asarray(image) for batch in batches for image in to_images(batch)]

    groups = {
        "no boxes (baseline)": generate_uncontrolled(base, prompts, steps, guidance, sampler=sampler),
        "swapped phrases": controlled([scene.swapped for scene in scenes], "swapped phrases"),
        "boxes": controlled([scene.inputs for scene in scenes], "boxes"),
        "scenes through the autoencoder (ceiling)": reconstruct(base, targets),
    }
    scores: dict[str, tuple[float, ...]] = {
        name: (mean_iou(images, boxes), *concept_accuracies(images, boxes, concepts)) for name, images in groups.items()
    }
    baseline, _, value, ceiling = scores.values()
    gaps = [gap_closed(*three, higher_is_better=True) for three in zip(baseline, value, ceiling, strict=True)]
    rows: list[Row] = [(name, *values) for name, values in scores.items()]
    report = Report(
        title=f"Two icons in their boxes ({len(scenes)} scenes)",
        columns=("", "IoU", "concept, top-1", "concept, top-5"),
        rows=(*rows, ("gap closed", *gaps)),
        notes=(
            "IoU: of each box with the bounding box of what is drawn nearest to it.",
            "concept: the features of a box's crop are nearest to those of its concept, of 50; chance 0.02 and 0.1.",
            "swapped phrases: scored by the phrases before they were exchanged between the two boxes.",
        ),
        facts={name: dict(zip(("iou", "top1", "top5"), values, strict=True)) for name, values in scores.items()},
        settings={
            **base_settings(base),
            **sampling_settings(base, **settings),
            "control": control_settings(base, control, weight=weight, mode=mode),
            "sets": [set_settings("scenes", targets, prompts)],
            "seeds": seeds_of(len(scenes)),
            "features": LITE0,
        },
    )
    shown = {"boxes given": [picture_of_boxes(own) for own in boxes], **groups, "scene": targets}
    cells = [[Image.fromarray(image) for image in images[:_SHOWN]] for images in shown.values()]
    return report, contact_sheet(cells, row_titles=list(shown), cell=96)
