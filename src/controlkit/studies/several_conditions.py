"""`controlkit study several-conditions`: what two adapters of one base control do to each other, and what they cost.

CtrLoRA adds the residuals of several conditions (Xu et al. 2025, section 3.4). Here the adapters run in one batched
pass; the study compares fidelity to each condition with that of each alone, and the time with one pass after another.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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
from controlkit.evaluation.base import draw_prompts, reconstruct
from controlkit.evaluation.control import Steer, draw_controlled
from controlkit.evaluation.pictures import EvaluationSet, evaluation_set
from controlkit.evaluation.report import Report, Row, gap_closed
from controlkit.formats.load import load_control
from controlkit.images import contact_sheet, to_tensor, write_png
from controlkit.sampling.request import DEFAULT_STEPS, check_mode

_ROUNDS = 7
_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class SeveralConditions:
    """Settings of the study."""

    out: str = "runs/study/several-conditions"
    """Folder for the sheet."""
    base: str = "nano"
    """The base."""
    mixes: tuple[str, ...] = ("palette+lineart", "palette+canny", "lineart+silhouette")
    """Which adapters act together, their names or files joined by `+`; names mean `nano/NAME` first."""
    weight: float = 1.0
    """Of every adapter, alone and together."""
    mode: str | None = None
    """In which adapters act (`ControlUse.mode`); None is the base's own."""
    pictures: int = 48
    """Held-out pictures."""
    sampling_steps: int = DEFAULT_STEPS
    """DDIM steps."""
    timed: tuple[int, ...] = (1, 2, 3, 4)
    """Numbers of conditions that are timed (those of the mixes, in their order, over again if too few)."""

    def __post_init__(self) -> None:
        if self.pictures < 1 or self.sampling_steps < 1 or not self.timed or min(self.timed) < 1:
            raise UserError("pictures, sampling_steps and timed must be at least 1")
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
    pictures = evaluation_set("held-out").first(settings.pictures)
    fidelity, sheet = _fidelity(settings, base, controls, pictures)
    path = Path(settings.out) / "several-conditions.png"
    write_png(path, sheet)
    speed = _speed(base, list(controls.values()), pictures, settings)
    return Mixed(reports=(fidelity, speed), files={"pictures": path})


def _adapter(name: str, base: Base, shared: dict[str, Control]) -> CtrLoRA:
    try:
        control = load_control(f"nano/{name}", base, shared=shared)
    except UserError:
        control = load_control(name, base, shared=shared)
    if not isinstance(control, CtrLoRA) or control.condition is None:
        raise UserError(f"{name} is not an adapter that says which condition it follows")
    return control


def _fidelity(
    settings: SeveralConditions, base: Base, controls: dict[str, CtrLoRA], pictures: EvaluationSet
) -> tuple[Report, Image.Image]:
    truths = [drawing.image for drawing in pictures.drawings]
    prompts = [drawing.caption for drawing in pictures.drawings]
    kinds = {name: conditions.find(control.condition or "") for name, control in controls.items()}
    given = {name: [kind(truth) for truth in truths] for name, kind in kinds.items()}
    without = draw_prompts(base, prompts, settings.sampling_steps)
    ceiling = reconstruct(base, truths)

    def draw(names: Sequence[str]) -> list[np.ndarray]:
        uses = [
            Steer(control=controls[name], given=given[name], weight=settings.weight, mode=settings.mode)
            for name in names
        ]
        return draw_controlled(base, uses, prompts, steps=settings.sampling_steps)

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
        title=f"Fidelity to each condition, as gap closed ({len(truths)} pictures, weight {settings.weight:g})",
        columns=("mix", "condition", "alone", "together", "under the others alone"),
        rows=tuple(rows),
        notes=("the last column is what a condition gets from the others without its own adapter.",),
    )
    cells = [[Image.fromarray(image) for image in strip] for strip in strips]
    return report, contact_sheet(cells, row_titles=[*titles, "truth"], cell=80)


@torch.inference_mode()
def _speed(base: Base, controls: list[CtrLoRA], pictures: EvaluationSet, settings: SeveralConditions) -> Report:
    """One batched pass against one pass after another, for one step of one picture with guidance."""
    truth = pictures.drawings[0].image
    text = base.encode_text(["", pictures.drawings[0].caption])
    t = torch.tensor([500, 500])
    rows: list[Row] = []
    for count in settings.timed:
        group = [controls[index % len(controls)] for index in range(count)]
        hints = [
            control.encode(to_tensor([conditions.find(control.condition or "")(truth)]), base) for control in group
        ]

        def together(group: list[CtrLoRA] = group, hints: list[Tensor] = hints) -> list[Tensor]:
            made = CtrLoRA.forward_together(group, None, t, text, hints)
            return [one["middle"] for one in made]

        def apart(group: list[CtrLoRA] = group, hints: list[Tensor] = hints) -> list[Tensor]:
            return [c(None, t, text, hint)["middle"] for c, hint in zip(group, hints, strict=True)]

        off = max(float((a - b).abs().max()) for a, b in zip(together(), apart(), strict=True))
        times: dict[str, list[float]] = {"together": [], "apart": []}
        for _ in range(_ROUNDS):
            for name, run in (("together", together), ("apart", apart)):
                started = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - started)
        one, each = (1000 * float(np.median(times[name])) for name in ("together", "apart"))
        rows.append((str(count), f"{one:.1f}", f"{each:.1f}", f"{each / one:.2f}", f"{off:.0e}"))
    return Report(
        title="The control's own cost at one step, milliseconds",
        columns=("conditions", "one pass", "one after another", "ratio", "largest difference"),
        rows=tuple(rows),
        notes=(f"medians of {_ROUNDS} rounds, the two in turns; {torch.get_num_threads()} threads, {base.device}.",),
    )
