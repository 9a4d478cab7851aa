"""`controlkit study several-conditions`: fidelity to each condition with several controls together, and their cost.

CtrLoRA adds the residuals of several conditions (Xu et al. 2025, section 3.4), and controls of any systems can be
combined likewise. The study compares fidelity to each condition with that of its control alone. Controls that share a
network run in one batched pass, whose time is compared with one pass each. Samples and timings are stored in the folder
of the study; running it again resumes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from controlkit import conditions
from controlkit.bases.base import Base
from controlkit.bases.load import load_base
from controlkit.bases.residuals import Residuals
from controlkit.controls.control import Control, residuals_together
from controlkit.controls.inputs import takes_one_image
from controlkit.errors import UserError
from controlkit.evaluation.report import Report, Row, gap_closed
from controlkit.evaluation.sampling import EvalControl, generate_controlled, generate_uncontrolled, reconstruct
from controlkit.evaluation.sets import EvaluationSet, Example, evaluation_set
from controlkit.evaluation.settings import (
    condition_settings,
    content_of,
    control_settings,
    examples_settings,
    seeds_of,
)
from controlkit.formats.load import load_control
from controlkit.images import contact_sheet, to_tensor, write_png
from controlkit.sampling.request import DEFAULT_STEPS
from controlkit.sampling.settings import base_settings, sampling_settings, versions
from controlkit.sampling.uses import mode_name
from controlkit.studies.stored_results import (
    StoredResults,
    StudyResult,
    check_sampling_steps,
    study_settings,
    with_settings,
)

ENOUGH = 0.8
"""Share of a condition's gap that it should keep in company."""
_ROUNDS = 7
_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class SeveralConditions:
    """Settings of the study."""

    out: str = "runs/study/several-conditions"
    """Folder for the sheet and stored results (`kept/`; delete it to sample and time again)."""
    base: str = "nano"
    """The base."""
    device: str = "auto"
    """`cpu`, `cuda`, `mps`, or `auto` for the best available."""
    mixes: tuple[str, ...] = ("palette+lineart", "palette+nano/canny", "lineart+silhouette")
    """Controls of one condition image that act together, names or files joined by `+`."""
    weight: float = 1.0
    """Weight of every control, alone and together."""
    mode: str | None = None
    """Mode of the controls (`ControlUse.mode`); null is that of the base."""
    images: int = 48
    """Held-out images."""
    sampling_steps: int = DEFAULT_STEPS
    """DDIM steps."""
    timed: tuple[int, ...] = (2, 3, 4)
    """Numbers of conditions to time, of controls that share a network (in the order of the mixes, repeated if too
    few); 1 times nothing, as one pass is all that one control takes."""

    def __post_init__(self) -> None:
        check_sampling_steps(self.sampling_steps)
        if self.images < 1 or self.sampling_steps < 1 or not self.timed or min(self.timed) < 1:
            raise UserError(
                f"images {self.images}, sampling_steps {self.sampling_steps}, timed {list(self.timed)}: expected"
                " numbers of at least 1",
                "out-of-range",
            )
        object.__setattr__(self, "mode", mode_name(self.mode))
        if not self.mixes:
            raise UserError("mixes is empty; give at least one, such as palette+lineart", "missing-setting")
        for mix in self.mixes:
            if len(set(mix.split("+"))) < max(2, len(mix.split("+"))):
                raise UserError(
                    f"{mix!r} is not a mix; join two or more different controls with +, such as palette+lineart",
                    "contradiction",
                )


def run_several_conditions(settings: SeveralConditions) -> StudyResult:
    """Sample, score and time every mix.

    Raises:
        UserError: a control is missing, takes more than one image, or records no single condition.
    """
    base = load_base(settings.base, device=settings.device)
    shared: dict[str, Control] = {}
    names = list(dict.fromkeys(name for mix in settings.mixes for name in mix.split("+")))
    controls = {name: _loaded(name, base, shared) for name in names}
    images = evaluation_set("held-out").take(settings.images)
    mode = settings.mode or base.default_mode
    acting = {
        name: control_settings(base, control, weight=settings.weight, mode=mode) for name, control in controls.items()
    }
    stored = StoredResults(
        Path(settings.out),
        {"base": base.content, **sampling_settings(base, steps=settings.sampling_steps)},
    )
    fidelity, sheet = _fidelity(settings, base, controls, acting, images, stored)
    path = Path(settings.out) / "several-conditions.png"
    write_png(path, sheet)
    speed = _speed(base, _sharing(controls), acting, images, settings, stored)
    shared_settings = study_settings(settings, base, mode=mode, weight=settings.weight)
    conditions_of = {
        name: condition_settings(conditions.find(control.condition or "")) for name, control in controls.items()
    }
    details = {
        "controls": {name: {**acting[name], "condition": conditions_of[name]} for name in controls},
        "sets": [examples_settings(images)],
        "seeds": seeds_of(len(images.examples)),
    }
    (fidelity,) = with_settings([fidelity], shared_settings | details)
    if speed is None:
        return StudyResult(reports=(fidelity,), files={"images": path})
    # Timing samples nothing, so its table has no mode.
    timing_settings = {"study": shared_settings["study"], "controls": details["controls"]}
    speed = replace(speed, settings={**base_settings(base), **timing_settings})
    return StudyResult(reports=(fidelity, speed), files={"images": path})


def _loaded(name: str, base: Base, shared: dict[str, Control]) -> Control:
    control = load_control(name, base, shared=shared)
    if not takes_one_image(control) or control.condition is None:
        raise UserError(
            f"{name} is {control.title}; the study needs controls of one condition image whose file records one"
            " condition",
            "wrong-kind",
        )
    return control


def _sharing(controls: Mapping[str, Control]) -> dict[str, Control]:
    """The most controls that share a network; empty without two."""
    groups: dict[int, dict[str, Control]] = {}
    for name, control in controls.items():
        if control.shared_network is not None:
            groups.setdefault(id(control.shared_network), {})[name] = control
    largest = max(groups.values(), key=len, default={})
    return largest if len(largest) > 1 else {}


def _fidelity(
    settings: SeveralConditions,
    base: Base,
    controls: Mapping[str, Control],
    acting: dict[str, dict[str, Any]],
    images: EvaluationSet[Example],
    stored: StoredResults,
) -> tuple[Report, Image.Image]:
    targets, prompts = images.images, images.captions
    kinds = {name: conditions.find(control.condition or "") for name, control in controls.items()}
    condition_images = {name: [kind(target) for target in targets] for name, kind in kinds.items()}
    steps = settings.sampling_steps
    set_content = {"set": content_of(targets, prompts)}
    no_control = stored.images("without control", set_content, lambda: generate_uncontrolled(base, prompts, steps))
    ceiling = reconstruct(base, targets)

    def generate(names: Sequence[str]) -> list[np.ndarray]:
        uses = [
            EvalControl(
                control=controls[name],
                condition_images=condition_images[name],
                weight=settings.weight,
                mode=settings.mode,
            )
            for name in names
        ]
        # The names of these settings count in the names of stored files.
        used = [{**acting[name], "given": content_of(condition_images[name], ())} for name in names]
        return stored.images(
            "+".join(names),
            {**set_content, "controls": used},
            lambda: generate_controlled(base, uses, prompts, steps=steps),
        )

    def closed(name: str, results: Sequence[np.ndarray]) -> float:
        def score(images: Sequence[np.ndarray]) -> float:
            return kinds[name].mean_score(condition_images[name], images, targets)

        direction = kinds[name].fidelity.higher_is_better
        return gap_closed(score(no_control), score(results), score(ceiling), higher_is_better=direction)

    alone = {name: generate([name]) for name in controls}
    rows: list[Row] = []
    gaps: list[tuple[str, str, float, float]] = []
    strips: list[Sequence[np.ndarray]] = []
    titles: list[str] = []
    for mix in settings.mixes:
        names = mix.split("+")
        together = generate(names)
        for name in names:
            others = [closed(name, alone[other]) for other in names if other != name]
            gaps.append((mix, name, closed(name, alone[name]), closed(name, together)))
            rows.append((*gaps[-1], max(others)))
            if f"{name} alone" not in titles:
                strips += [condition_images[name][:_SHOWN], alone[name][:_SHOWN]]
                titles += [f"{name}: condition", f"{name} alone"]
        strips.append(together[:_SHOWN])
        titles.append(mix)
    strips.append(targets[:_SHOWN])
    report = Report(
        title=f"Fidelity to each condition, as gap closed ({len(targets)} images, weight {settings.weight:g})",
        columns=("mix", "condition", "alone", "together", "under the others alone"),
        rows=tuple(rows),
        notes=("last column: fidelity to the condition under the other controls, without its own.", _kept(gaps)),
    )
    cells = [[Image.fromarray(image) for image in strip] for strip in strips]
    return report, contact_sheet(cells, row_titles=[*titles, "target"], cell=80)


def _kept(gaps: Sequence[tuple[str, str, float, float]]) -> str:
    """Which conditions keep less than `ENOUGH` of their gap in company, as a note.

    Args:
        gaps: mix, condition, gap closed alone and together.
    """
    closed = [gap for gap in gaps if gap[2] > 0]  # NaN is not
    less = [
        f"{name} in {mix} ({alone:.2f} to {together:.2f})"
        for mix, name, alone, together in closed
        if together < ENOUGH * alone
    ]
    none = [f"{name} in {mix}" for mix, name, alone, _ in gaps if not alone > 0]
    every = "every other condition" if none else "every condition"
    share = f"below {ENOUGH} for {', '.join(less)}" if less else f"at least {ENOUGH} for {every}"
    kept = f"together / alone is {share}."
    if not none:
        return kept
    without = f"no ratio for {', '.join(none)}: alone, the control closes none of the gap"
    return f"{without}; {kept}" if closed else f"{without}."


def _speed(
    base: Base,
    controls: Mapping[str, Control],
    acting: dict[str, dict[str, Any]],
    images: EvaluationSet[Example],
    settings: SeveralConditions,
    stored: StoredResults,
) -> Report | None:
    """Time one batched pass of controls that share a network against one pass each, for one step of one image with
    guidance; None without controls or numbers above 1."""
    counts = [count for count in settings.timed if count > 1]
    if not controls or not counts:
        return None
    names = list(controls)
    example = images.examples[0]
    machine = {"device": str(base.device), "threads": torch.get_num_threads(), "versions": versions()}
    rows: list[Row] = []
    for count in counts:
        chosen = [names[index % len(names)] for index in range(count)]
        timed = {
            **machine,
            "rounds": _ROUNDS,
            "set": content_of([example.image], [example.caption]),
            "controls": [acting[name]["fingerprint"] for name in chosen],
        }
        group = [controls[name] for name in chosen]
        times = stored.numbers(f"timing {count}", timed, partial(_times, base, group, example))
        rows.append((count, *(times[name] for name in _TIMES)))
    return Report(
        title="Cost of the controls per step, milliseconds",
        columns=("conditions", *_TIMES.values()),
        rows=tuple(rows),
        notes=(
            f"medians of {_ROUNDS} rounds, the two in turns, in an order that changes from round to round; ratio: one"
            f" after another / one pass, of each round. {torch.get_num_threads()} threads, {base.device}.",
        ),
    )


_TIMES = {
    "together": "one pass",
    "apart": "one after another",
    "ratio": "ratio",
    "lowest": "lowest ratio",
    "highest": "highest ratio",
    "difference": "largest difference",
}
"""Values of `_times` => their columns."""


@torch.inference_mode()
def _times(base: Base, group: Sequence[Control], example: Example) -> dict[str, float]:
    """Medians over rounds of the milliseconds of one pass for all of `group`, of one pass each, and of their ratio; the
    lowest and highest ratio, and the largest difference of the residuals."""
    text = base.encode_text(["", example.caption])
    t = torch.tensor([500, 500], device=base.device)
    images = [to_tensor([conditions.find(control.condition or "")(example.image)]) for control in group]
    hints = [control.encode(image.to(base.device), base) for control, image in zip(group, images, strict=True)]

    x_t = torch.zeros(2, base.latent_channels, *[base.size // base.factor] * 2, device=base.device, dtype=base.dtype)

    def together() -> list[Residuals]:
        return residuals_together(group, x_t, t, text, hints)

    def apart() -> list[Residuals]:
        return [control(x_t, t, text, hint) for control, hint in zip(group, hints, strict=True)]

    difference = max(
        float((one[site] - other[site]).abs().max())
        for one, other in zip(together(), apart(), strict=True)
        for site in one
    )
    ways = [("together", together), ("apart", apart)]
    times: dict[str, list[float]] = {name: [] for name, _ in ways}
    for _ in range(_ROUNDS):
        for name, run in ways:
            started = time.perf_counter()
            run()
            if base.device.type != "cpu":
                torch.accelerator.synchronize()
            times[name].append(1000 * (time.perf_counter() - started))
        ways.reverse()
    ratios = [apart / together for together, apart in zip(times["together"], times["apart"], strict=True)]
    medians = {name: float(np.median(values)) for name, values in (times | {"ratio": ratios}).items()}
    return medians | {"lowest": min(ratios), "highest": max(ratios), "difference": difference}
