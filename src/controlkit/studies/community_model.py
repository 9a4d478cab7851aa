"""`controlkit study community-model`: a control on a fine-tuned base, unchanged and transferred.

nano is fine-tuned on one of its styles, as communities fine-tune Stable Diffusion. The control trained on nano is then
used on the result unchanged, and transferred by offset (`formats/transfer.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from controlkit import conditions
from controlkit.bases.base import Base
from controlkit.bases.load import load_base
from controlkit.controls.control import Control
from controlkit.controls.controlnet import ControlNet
from controlkit.errors import UserError
from controlkit.evaluation.evaluate_control import EvalControl, generate_controlled
from controlkit.evaluation.report import Report, Row, gap_closed
from controlkit.evaluation.sampling import generate_uncontrolled, reconstruct
from controlkit.evaluation.sets import EvaluationSet, Example
from controlkit.evaluation.settings import condition_settings, content_of, control_settings, seeds_of, set_settings
from controlkit.formats.load import load_control
from controlkit.formats.transfer import LIMITS, transfer
from controlkit.images import contact_sheet, write_png
from controlkit.nano.evaluation_sets import read_set
from controlkit.sampling.plan import ActiveControl
from controlkit.sampling.request import mode_name
from controlkit.sampling.settings import sampling_settings
from controlkit.studies.stored_results import StoredResults, StudyResult, study_settings, with_settings
from controlkit.training.recipes import build_recipe
from controlkit.training.run import run

_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class CommunityModel:
    """Settings of the study."""

    out: str = "runs/study/community-model"
    """Folder for the fine-tuned model, the sheet and stored images (`kept/`)."""
    base: str = "nano"
    """The base to fine-tune."""
    control: str = "canny"
    """A ControlNet trained on it."""
    icons: str = "data/nano/icons.npz"
    """Rendered icons (`recipes/nano/build_pictures.py`)."""
    style: str = "twemoji"
    """The style to fine-tune on."""
    steps: int = 600
    """Optimiser steps of the fine-tuning."""
    batch_size: int = 32
    """Images per step."""
    learning_rate: float = 2e-4
    """Peak learning rate of the fine-tuning."""
    images: int = 48
    """Held-out images."""
    sampling_steps: int = 20
    """DDIM steps."""
    mode: str = "balanced"
    """Mode of the control (`ControlUse.mode`); the table in docs/files.md has `balanced`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "mode", mode_name(self.mode))
        for name in ("images", "sampling_steps", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; expected at least 1", "out-of-range")


def run_community_model(settings: CommunityModel) -> StudyResult:
    """Fine-tune the base unless that is done, and compare.

    Raises:
        UserError: icons or the control are missing, or the control is not a ControlNet or records no condition.
    """
    original = load_base(settings.base)
    control = load_control(settings.control, original)
    if not isinstance(control, ControlNet):
        raise UserError(f"{settings.control} is a {control.kind}; this study needs a ControlNet", "wrong-kind")
    if control.condition is None:
        raise UserError(f"{settings.control} records no condition; this study needs one", "missing-setting")
    tuned = _fine_tuned(settings)
    transferred, offset = transfer(control, original, tuned)
    images = read_set("held-out")
    in_style = [drawing for drawing in images.examples if drawing.style == settings.style]
    eval_set = EvaluationSet(settings.style, tuple(in_style[: settings.images]))
    ways: list[tuple[str, Base, Control]] = [
        ("the base, its control", original, control),
        ("community model, control as it is", tuned, control),
        ("community model, control by offset", tuned, transferred),
    ]
    report, sheet = _compare(settings, control.condition, eval_set, ways, offset.distance)
    path = Path(settings.out) / "community-model.png"
    write_png(path, sheet)
    mode = ActiveControl.mode_in(settings.mode, original, control)
    shared = study_settings(settings, original, mode=mode)
    return StudyResult(reports=with_settings([report], shared), files={"images": path})


def _fine_tuned(settings: CommunityModel) -> Base:
    out = Path(settings.out) / "base"
    recipe = build_recipe(
        {
            "system": "base",
            "out": str(out),
            "icons": settings.icons,
            "start": settings.base,
            "styles": [settings.style],
            "steps": settings.steps,
            "batch_size": settings.batch_size,
            "learning_rate": settings.learning_rate,
            "warmup_steps": min(50, settings.steps),
            "ema": 0.99,
            "preview_every": settings.steps,
        },
        origin="controlkit study",
    )
    run(recipe)
    return load_base(out / "base")


def _compare(
    settings: CommunityModel,
    condition: str,
    eval_set: EvaluationSet[Example],
    ways: Sequence[tuple[str, Base, Control]],
    distance: float,
) -> tuple[Report, Image.Image]:
    kind = conditions.find(condition)
    targets, prompts = eval_set.images, eval_set.captions
    condition_images = [kind(target) for target in targets]
    steps = settings.sampling_steps

    def score(images: Sequence[np.ndarray]) -> float:
        return kind.mean_score(condition_images, images, targets)

    rows: list[Row] = []
    strips: list[Sequence[np.ndarray]] = [condition_images[:_SHOWN]]
    no_control: dict[int, list[np.ndarray]] = {}
    # The names of these settings count in the names of stored files.
    shared = {"set": content_of(targets, prompts), "given": content_of(condition_images, ())}
    stored = StoredResults(Path(settings.out), shared)
    controls: dict[str, Any] = {}
    for name, base, control in ways:
        sampling = {"base": base.content, **sampling_settings(base, steps=steps)}
        if id(base) not in no_control:
            uncontrolled = partial(generate_uncontrolled, base, prompts, steps)
            no_control[id(base)] = stored.images("without control", sampling, uncontrolled)
            strips.append(no_control[id(base)][:_SHOWN])
        acting = control_settings(base, control, weight=1.0, mode=settings.mode)
        use = EvalControl(control=control, condition_images=condition_images, mode=settings.mode)
        controlled = partial(generate_controlled, base, [use], prompts, steps=steps)
        images = stored.images(name, {**sampling, "control": acting}, controlled)
        controls[name] = {**acting, "base": {"fingerprint": base.fingerprint, "content": base.content}}
        low, value, high = score(no_control[id(base)]), score(images), score(reconstruct(base, targets))
        rows.append((name, low, value, high, gap_closed(low, value, high)))
        strips.append(images[:_SHOWN])
    names = [name for name, _, _ in ways]
    titles = ["condition", "the base, no control", names[0], "community model, no control", *names[1:], "target"]
    strips.append(targets[:_SHOWN])
    report = Report(
        title=f"{kind.name}: {kind.fidelity.name} on {len(targets)} held-out images of {settings.style}",
        columns=("how", "no control", "control", "ceiling", "gap closed"),
        rows=tuple(rows),
        notes=(
            f"community model: {settings.base} fine-tuned on {settings.style} for {settings.steps} steps. The layers of"
            f" its UNet that the control copied differ by {distance:.1%}.",
            LIMITS,
        ),
        facts={"distance": distance},
        settings={
            "controls": controls,
            "condition": condition_settings(kind),
            "sets": [set_settings(f"held-out, {settings.style}", targets, prompts, condition_images=condition_images)],
            "seeds": seeds_of(len(targets)),
        },
    )
    cells = [[Image.fromarray(image) for image in strip] for strip in strips]
    return report, contact_sheet(cells, row_titles=titles, cell=80)
