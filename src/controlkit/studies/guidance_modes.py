"""`controlkit study guidance-modes`: every guidance mode on the same seeds, with an empty and with a full prompt.

Zhang et al. 2023, figure 5: CFG resolution weighting matters where the prompt says nothing. Samples are stored in the
folder of the study; running it again resumes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from controlkit import conditions
from controlkit.bases.load import load_base
from controlkit.errors import UserError
from controlkit.evaluation.report import Report, Row, gap_closed
from controlkit.evaluation.sampling import EvalControl, generate_controlled, generate_uncontrolled, reconstruct
from controlkit.evaluation.sets import evaluation_set
from controlkit.evaluation.settings import condition_settings, content_of, control_settings, examples_settings, seeds_of
from controlkit.formats.load import load_control
from controlkit.images import contact_sheet, write_png
from controlkit.sampling.plan import ActiveControl
from controlkit.sampling.request import DEFAULT_STEPS
from controlkit.sampling.settings import base_settings, sampling_settings
from controlkit.sampling.uses import MODES, mode_name
from controlkit.studies.stored_results import StoredResults, StudyResult, check_sampling_steps

_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class GuidanceModes:
    """Settings of the study."""

    out: str = "runs/study/guidance-modes"
    """Folder for the sheet and stored results (`kept/`; delete it to sample again)."""
    base: str = "nano"
    """The base."""
    device: str = "auto"
    """`cpu`, `cuda`, `mps`, or `auto` for the best available."""
    control: str = "canny"
    """The control: a name or a file that adds residuals."""
    modes: tuple[str, ...] = MODES
    """Guidance modes (`ControlUse.mode`)."""
    weight: float = 1.0
    """Weight of the control."""
    images: int = 48
    """Held-out images; the sheet shows the first eight."""
    sampling_steps: int = DEFAULT_STEPS
    """Denoising steps."""

    def __post_init__(self) -> None:
        check_sampling_steps(self.sampling_steps)
        if self.images < 1 or self.sampling_steps < 1 or not self.modes:
            raise UserError(
                f"images {self.images}, sampling_steps {self.sampling_steps}, modes {list(self.modes)}: expected"
                " numbers of at least 1 and at least one mode",
                "out-of-range",
            )
        object.__setattr__(self, "modes", tuple(mode_name(mode) for mode in self.modes))


def run_guidance_modes(settings: GuidanceModes) -> StudyResult:
    """Sample and score every mode.

    Raises:
        UserError: the control is missing or records no condition, or a mode cannot weight it.
    """
    base = load_base(settings.base, device=settings.device)
    control = load_control(settings.control, base)
    if control.condition is None:
        raise UserError(f"{settings.control} records no condition, which this study scores", "missing-setting")
    condition = conditions.find(control.condition)
    modes = [ActiveControl.mode_in(mode, base, control) for mode in settings.modes]
    acting = {mode: control_settings(base, control, weight=settings.weight, mode=mode) for mode in dict.fromkeys(modes)}
    images = evaluation_set("held-out").take(settings.images)
    targets, steps = images.images, settings.sampling_steps
    condition_images = [condition(target) for target in targets]
    sampling = sampling_settings(base, steps=steps)
    stored = StoredResults(Path(settings.out), {"base": base.content, **sampling})
    ceiling = reconstruct(base, targets)

    def score(results: Sequence[np.ndarray]) -> float:
        return condition.mean_score(condition_images, results, targets)

    rows: list[Row] = []
    strips: list[Sequence[np.ndarray]] = [condition_images]
    titles = ["condition"]
    for title, prompts in (("empty prompt", [""] * len(targets)), ("full prompt", images.captions)):
        content = {"set": content_of(targets, prompts)}
        no_control = stored.images(
            f"{title}, no control", content, partial(generate_uncontrolled, base, prompts, steps)
        )
        strips.append(no_control)
        titles.append(f"{title}: no control")
        for mode, used in acting.items():
            use = EvalControl(control=control, condition_images=condition_images, weight=settings.weight, mode=mode)
            results = stored.images(
                f"{title}, {mode}",
                {**content, "control": used, "given": content_of(condition_images, ())},
                partial(generate_controlled, base, [use], prompts, steps=steps),
            )
            values = [score(group) for group in (no_control, results, ceiling)]
            closed = gap_closed(*values, higher_is_better=condition.fidelity.higher_is_better)
            rows.append((title, mode, *values, closed))
            strips.append(results)
            titles.append(mode)
    direction = "higher" if condition.fidelity.higher_is_better else "lower"
    report = Report(
        title=f"{condition.name}: {condition.fidelity.name} ({direction} is better), {len(targets)} held-out images",
        columns=("prompt", "mode", "no control", "control", "ceiling", "gap closed"),
        rows=tuple(rows),
        notes=(
            "no control: the same prompts and seeds; ceiling: the target, encoded and decoded by the autoencoder.",
            f"weight {settings.weight:g}, guidance {sampling['guidance']:g}, {steps} {sampling['sampler']} steps.",
        ),
        settings={
            **base_settings(base),
            **sampling,
            "controls": acting,
            "condition": condition_settings(condition),
            "sets": [examples_settings(images)],
            "seeds": seeds_of(len(targets)),
        },
    )
    strips.append(targets)
    cells = [[Image.fromarray(image) for image in strip[:_SHOWN]] for strip in strips]
    path = Path(settings.out) / "guidance-modes.png"
    write_png(path, contact_sheet(cells, row_titles=[*titles, "target"], cell=80))
    return StudyResult(reports=(report,), files={"images": path})
