"""`controlkit study several-conditions`: what two adapters of one base control do to each other, and what they cost.

CtrLoRA adds the residuals of several conditions (Xu et al. 2025, section 3.4). Here the adapters run in one batched
pass; the study compares fidelity to each condition with that of each alone, and the time with one pass after another.
What was sampled and timed is kept in the study's folder, so that running it again resumes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from controlkit import conditions
from controlkit.bases.base import Base
from controlkit.bases.load import load_base
from controlkit.controls.control import Control
from controlkit.controls.ctrlora import CtrLoRA
from controlkit.errors import UserError
from controlkit.evaluation.evaluate_control import Steer, draw_controlled
from controlkit.evaluation.report import Report, Row, gap_closed
from controlkit.evaluation.sampling import draw_prompts, reconstruct
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
from controlkit.sampling.request import DEFAULT_STEPS, check_mode
from controlkit.sampling.settings import base_settings, sampling_settings, versions
from controlkit.studies.kept import Kept, study_settings, with_settings

_ROUNDS = 7
_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class SeveralConditions:
    """Settings of the study."""

    out: str = "runs/study/several-conditions"
    """Folder for the sheet and for what is kept (`kept/`; without it, all is sampled and timed anew)."""
    base: str = "nano"
    """The base."""
    mixes: tuple[str, ...] = ("palette+lineart", "palette+canny", "lineart+silhouette")
    """Which adapters act together, their names or files joined by `+`; names mean `nano/NAME` first."""
    weight: float = 1.0
    """Of every adapter, alone and together."""
    mode: str | None = None
    """In which adapters act (`ControlUse.mode`); None is the base's own."""
    images: int = 48
    """Held-out images."""
    sampling_steps: int = DEFAULT_STEPS
    """DDIM steps."""
    timed: tuple[int, ...] = (1, 2, 3, 4)
    """Numbers of conditions that are timed (those of the mixes, in their order, over again if too few)."""

    def __post_init__(self) -> None:
        if self.images < 1 or self.sampling_steps < 1 or not self.timed or min(self.timed) < 1:
            raise UserError("images, sampling_steps and timed must be at least 1")
        check_mode(self.mode)
        if not self.mixes:
            raise UserError("mixes is empty; give one or more, such as palette+lineart")
        for mix in self.mixes:
            if len(set(mix.split("+"))) < max(2, len(mix.split("+"))):
                raise UserError(f"{mix!r} is not a mix; join two or more adapters by +, such as palette+lineart")


@dataclass(frozen=True, kw_only=True)
class Mixed:
    """What came out."""

    reports: tuple[Report, ...]
    files: dict[str, Path]


def run_several_conditions(settings: SeveralConditions) -> Mixed:
    """Draw and judge every mix, and time them.

    Raises:
        UserError: a control is missing, is no adapter, or does not say which condition it follows.
    """
    base = load_base(settings.base)
    shared: dict[str, Control] = {}
    names = list(dict.fromkeys(name for mix in settings.mixes for name in mix.split("+")))
    controls = {name: _adapter(name, base, shared) for name in names}
    images = evaluation_set("held-out").first(settings.images)
    mode = settings.mode or base.default_mode
    acting = {
        name: control_settings(base, control, weight=settings.weight, mode=mode) for name, control in controls.items()
    }
    kept = Kept(
        Path(settings.out),
        {"base": base.content, **sampling_settings(base, steps=settings.sampling_steps)},
    )
    fidelity, sheet = _fidelity(settings, base, controls, acting, images, kept)
    path = Path(settings.out) / "several-conditions.png"
    write_png(path, sheet)
    speed = _speed(base, controls, acting, images, settings, kept)
    told = study_settings(settings, base, mode=mode, weight=settings.weight)
    conditions_of = {
        name: condition_settings(conditions.find(control.condition or "")) for name, control in controls.items()
    }
    more = {
        "controls": {name: {**acting[name], "condition": conditions_of[name]} for name in controls},
        "sets": [examples_settings(images)],
        "seeds": seeds_of(len(images.examples)),
    }
    (fidelity,) = with_settings([fidelity], told | more)
    # Nothing is sampled for the times, so no mode stands under them.
    speed = replace(speed, settings={**base_settings(base), "study": told["study"], "controls": more["controls"]})
    return Mixed(reports=(fidelity, speed), files={"images": path})


def _adapter(name: str, base: Base, shared: dict[str, Control]) -> CtrLoRA:
    try:
        control = load_control(f"nano/{name}", base, shared=shared)
    except UserError:
        control = load_control(name, base, shared=shared)
    if not isinstance(control, CtrLoRA) or control.condition is None:
        raise UserError(f"{name} is not an adapter that says which condition it follows")
    return control


def _fidelity(
    settings: SeveralConditions,
    base: Base,
    controls: dict[str, CtrLoRA],
    acting: dict[str, dict[str, Any]],
    images: EvaluationSet[Example],
    kept: Kept,
) -> tuple[Report, Image.Image]:
    truths, prompts = images.images, images.captions
    kinds = {name: conditions.find(control.condition or "") for name, control in controls.items()}
    given = {name: [kind(truth) for truth in truths] for name, kind in kinds.items()}
    shown = {"set": content_of(truths, prompts)}
    without = kept.images("without control", shown, lambda: draw_prompts(base, prompts, settings.sampling_steps))
    ceiling = reconstruct(base, truths)

    def draw(names: Sequence[str]) -> list[np.ndarray]:
        uses = [
            Steer(control=controls[name], given=given[name], weight=settings.weight, mode=settings.mode)
            for name in names
        ]
        own = [{**acting[name], "given": content_of(given[name], ())} for name in names]
        return kept.images(
            "+".join(names),
            {**shown, "controls": own},
            lambda: draw_controlled(base, uses, prompts, steps=settings.sampling_steps),
        )

    def closed(name: str, results: Sequence[np.ndarray]) -> float:
        def score(made: Sequence[np.ndarray]) -> float:
            return kinds[name].mean_score(given[name], made, truths)

        return gap_closed(score(without), score(results), score(ceiling))

    alone = {name: draw([name]) for name in controls}
    rows: list[Row] = []
    strips: list[Sequence[np.ndarray]] = []
    titles: list[str] = []
    for mix in settings.mixes:
        names = mix.split("+")
        together = draw(names)
        for name in names:
            others = [closed(name, alone[other]) for other in names if other != name]
            rows.append((mix, name, closed(name, alone[name]), closed(name, together), max(others)))
            strips += [given[name][:_SHOWN], alone[name][:_SHOWN]]
            titles += [f"{name}: given", f"{name} alone"]
        strips.append(together[:_SHOWN])
        titles.append(mix)
    strips.append(truths[:_SHOWN])
    report = Report(
        title=f"Fidelity to each condition, as gap closed ({len(truths)} images, weight {settings.weight:g})",
        columns=("mix", "condition", "alone", "together", "under the others alone"),
        rows=tuple(rows),
        notes=("the last column is what a condition gets from the others without its own adapter.",),
    )
    cells = [[Image.fromarray(image) for image in strip] for strip in strips]
    return report, contact_sheet(cells, row_titles=[*titles, "truth"], cell=80)


def _speed(
    base: Base,
    controls: dict[str, CtrLoRA],
    acting: dict[str, dict[str, Any]],
    images: EvaluationSet[Example],
    settings: SeveralConditions,
    kept: Kept,
) -> Report:
    """One batched pass against one pass after another, for one step of one image with guidance."""
    names = list(controls)
    example = images.examples[0]
    machine = {"device": str(base.device), "threads": torch.get_num_threads(), "versions": versions()}
    rows: list[Row] = []
    for count in settings.timed:
        chosen = [names[index % len(names)] for index in range(count)]
        own = {
            **machine,
            "set": content_of([example.image], [example.caption]),
            "controls": [acting[name]["fingerprint"] for name in chosen],
        }
        group = [controls[name] for name in chosen]
        made = kept.numbers(f"timing {count}", own, partial(_times, base, group, example))
        rows.append((count, *(made[name] for name in ("together", "apart", "ratio", "difference"))))
    return Report(
        title="The control's own cost at one step, milliseconds",
        columns=("conditions", "one pass", "one after another", "ratio", "largest difference"),
        rows=tuple(rows),
        notes=(f"medians of {_ROUNDS} rounds, the two in turns; {torch.get_num_threads()} threads, {base.device}.",),
    )


@torch.inference_mode()
def _times(base: Base, group: Sequence[CtrLoRA], example: Example) -> dict[str, float]:
    """Milliseconds of one pass for all of `group` and of one after another, their ratio, and how far the two are
    apart."""
    text = base.encode_text(["", example.caption])
    t = torch.tensor([500, 500])
    hints = [
        control.encode(to_tensor([conditions.find(control.condition or "")(example.image)]), base) for control in group
    ]

    def together() -> list[Tensor]:
        return [made["middle"] for made in CtrLoRA.forward_together(group, None, t, text, hints)]

    def apart() -> list[Tensor]:
        return [c(None, t, text, hint)["middle"] for c, hint in zip(group, hints, strict=True)]

    off = max(float((a - b).abs().max()) for a, b in zip(together(), apart(), strict=True))
    times: dict[str, list[float]] = {"together": [], "apart": []}
    for _ in range(_ROUNDS):
        for name, run in (("together", together), ("apart", apart)):
            started = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - started)
    one, each = (1000 * float(np.median(times[name])) for name in ("together", "apart"))
    return {"together": one, "apart": each, "ratio": each / one, "difference": off}
