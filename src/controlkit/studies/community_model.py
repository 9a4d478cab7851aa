"""`controlkit study community-model`: a control on a model that was fine-tuned from its base, as it is and transferred.

nano is fine-tuned on one of its styles, as communities fine-tune Stable Diffusion; then the control that was trained on
nano steers the result directly, and by offset (`formats/transfer.py`).
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
from controlkit.evaluation.evaluate_control import Steer, draw_controlled
from controlkit.evaluation.report import Report, Row, gap_closed
from controlkit.evaluation.sampling import draw_prompts, reconstruct
from controlkit.evaluation.sets import EvaluationSet, Example
from controlkit.evaluation.settings import condition_settings, content_of, control_settings, seeds_of, set_settings
from controlkit.formats.load import load_control
from controlkit.formats.transfer import LIMITS, transfer
from controlkit.images import contact_sheet, write_png
from controlkit.nano.evaluation_sets import read_set
from controlkit.sampling.plan import ActiveControl
from controlkit.sampling.request import check_mode
from controlkit.sampling.settings import sampling_settings
from controlkit.studies.kept import Kept, study_settings, with_settings
from controlkit.training.recipes import build_recipe
from controlkit.training.run import run

_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class CommunityModel:
    """Settings of the study."""

    out: str = "runs/study/community-model"
    """Folder for the fine-tuned model, the sheet and the images that are kept (`kept/`)."""
    base: str = "nano"
    """The base to fine-tune."""
    control: str = "canny"
    """A ControlNet that was trained on it."""
    icons: str = "data/nano/icons.npz"
    """Rendered icons (`recipes/nano/build_pictures.py`)."""
    style: str = "twemoji"
    """The style that the community model is tuned to."""
    steps: int = 600
    """Optimiser steps of the fine-tuning."""
    batch_size: int = 32
    """Images a step."""
    learning_rate: float = 2e-4
    """Peak rate of the fine-tuning."""
    images: int = 48
    """Held-out images."""
    sampling_steps: int = 20
    """DDIM steps."""
    mode: str = "balanced"
    """In which the control acts (`ControlUse.mode`); `balanced` is that of the table in docs/files.md."""

    def __post_init__(self) -> None:
        check_mode(self.mode)
        if min(self.images, self.sampling_steps, self.steps, self.batch_size) < 1:
            raise UserError("images, sampling_steps, steps and batch_size must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Compared:
    """What came out."""

    reports: tuple[Report, ...]
    files: dict[str, Path]


def run_community_model(settings: CommunityModel) -> Compared:
    """Fine-tune what is not fine-tuned yet, and compare.

    Raises:
        UserError: icons or the control are missing, or the control is no ControlNet.
    """
    original = load_base(settings.base)
    control = load_control(settings.control, original)
    if not isinstance(control, ControlNet):
        raise UserError(f"{settings.control} is a {control.kind}; this study takes a ControlNet")
    if control.condition is None:
        raise UserError(f"{settings.control} does not say which condition it follows")
    tuned = _fine_tuned(settings)
    moved, offset = transfer(control, original, tuned)
    images = read_set("held-out")
    own_style = [drawing for drawing in images.examples if drawing.style == settings.style]
    judged = EvaluationSet(settings.style, tuple(own_style[: settings.images]))
    ways: list[tuple[str, Base, Control]] = [
        ("the base, its control", original, control),
        ("community model, control as it is", tuned, control),
        ("community model, control by offset", tuned, moved),
    ]
    report, sheet = _compare(settings, control.condition, judged, ways, offset.distance)
    path = Path(settings.out) / "community-model.png"
    write_png(path, sheet)
    mode = ActiveControl.mode_in(settings.mode, original, control)
    told = study_settings(settings, original, mode=mode)
    return Compared(reports=with_settings([report], told), files={"images": path})


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
    judged: EvaluationSet[Example],
    ways: Sequence[tuple[str, Base, Control]],
    distance: float,
) -> tuple[Report, Image.Image]:
    kind = conditions.find(condition)
    truths, prompts = judged.images, judged.captions
    given = [kind(truth) for truth in truths]
    steps = settings.sampling_steps

    def score(made: Sequence[np.ndarray]) -> float:
        return kind.mean_score(given, made, truths)

    rows: list[Row] = []
    strips: list[Sequence[np.ndarray]] = [given[:_SHOWN]]
    without: dict[int, list[np.ndarray]] = {}
    kept = Kept(Path(settings.out), {"set": content_of(truths, prompts), "given": content_of(given, ())})
    controls: dict[str, Any] = {}
    for name, base, control in ways:
        own = {"base": base.content, **sampling_settings(base, steps=steps)}
        if id(base) not in without:
            plain = partial(draw_prompts, base, prompts, steps)
            without[id(base)] = kept.images("without control", own, plain)
            strips.append(without[id(base)][:_SHOWN])
        acting = control_settings(base, control, weight=1.0, mode=settings.mode)
        use = Steer(control=control, given=given, mode=settings.mode)
        steered = partial(draw_controlled, base, [use], prompts, steps=steps)
        made = kept.images(name, {**own, "control": acting}, steered)
        controls[name] = {**acting, "base": {"fingerprint": base.fingerprint, "content": base.content}}
        low, value, high = score(without[id(base)]), score(made), score(reconstruct(base, truths))
        rows.append((name, low, value, high, gap_closed(low, value, high)))
        strips.append(made[:_SHOWN])
    names = [name for name, _, _ in ways]
    titles = ["given", "the base, no control", names[0], "community model, no control", *names[1:], "truth"]
    strips.append(truths[:_SHOWN])
    report = Report(
        title=f"{kind.name}: {kind.fidelity.name} on {len(truths)} held-out images of {settings.style}",
        columns=("how", "no control", "control", "ceiling", "gap closed"),
        rows=tuple(rows),
        notes=(
            f"the community model: {settings.base} tuned to {settings.style} for {settings.steps} steps;"
            f" its UNet is {distance:.1%} away where the control copied it.",
            LIMITS,
        ),
        facts={"distance": distance},
        settings={
            "controls": controls,
            "condition": condition_settings(kind),
            "sets": [set_settings(f"held-out, {settings.style}", truths, prompts, given=given)],
            "seeds": seeds_of(len(truths)),
        },
    )
    cells = [[Image.fromarray(image) for image in strip] for strip in strips]
    return report, contact_sheet(cells, row_titles=titles, cell=80)
