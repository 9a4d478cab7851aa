"""`controlkit study community-model`: controls on fine-tuned bases, unchanged and transferred.

nano is fine-tuned on each of its styles, as communities fine-tune Stable Diffusion. Controls trained on nano are then
used on the results unchanged, and transferred by offset (`formats/transfer.py`); of an adapter, its base control is
transferred. A last comparison replaces the text encoder: the offset does not correct for it (lllyasviel/ControlNet,
discussion 12).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import CLIPTextModel

from controlkit import conditions
from controlkit.bases.base import Base
from controlkit.bases.load import load_base
from controlkit.bases.stable_diffusion import StableDiffusion
from controlkit.controls.control import Control
from controlkit.errors import UserError
from controlkit.evaluation.report import Report, Row, gap_closed
from controlkit.evaluation.sampling import EvalControl, generate_controlled, generate_uncontrolled, reconstruct
from controlkit.evaluation.sets import EvaluationSet
from controlkit.evaluation.settings import condition_settings, content_of, control_settings, seeds_of, set_settings
from controlkit.files import one_spelling, read_json, spelled
from controlkit.formats.load import load_control
from controlkit.formats.transfer import LIMITS, transfer
from controlkit.images import contact_sheet, write_png
from controlkit.nano.base_objective import save_base
from controlkit.nano.evaluation_sets import read_set
from controlkit.nano.icons import TRAINED_STYLES, Drawing, background_colour
from controlkit.sampling.settings import sampling_settings
from controlkit.sampling.uses import mode_name
from controlkit.studies.stored_results import (
    StoredResults,
    StudyResult,
    check_sampling_steps,
    study_settings,
    with_settings,
)
from controlkit.training.recipes import build_recipe
from controlkit.training.run import run

ORIGINAL, AS_IT_IS, BY_OFFSET = "the base", "as it is", "by offset"
"""How a control is used: on its own base, or on another one unchanged or transferred."""
WAYS = (AS_IT_IS, BY_OFFSET)
"""How a control is used on another base than its own."""
KEPT, REPLACED = "text encoder kept", "text encoder replaced"
"""The two bases of the last comparison."""
_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class CommunityModel:
    """Settings of the study."""

    out: str = "runs/study/community-model"
    """Folder for the fine-tuned models, the sheet and stored images (`kept/`)."""
    base: str = "nano"
    """The base to fine-tune."""
    device: str = "auto"
    """`cpu`, `cuda`, `mps`, or `auto` for the best available."""
    controls: tuple[str, ...] = ("canny", "nano/canny", "nano/scribble", "nano/palette")
    """Controls trained on it that contain a copy of it, or whose base control does: names or files."""
    icons: str = "data/nano/icons.npz"
    """Rendered icons (`recipes/nano/build_pictures.py`)."""
    styles: tuple[str, ...] = TRAINED_STYLES
    """The styles to fine-tune on, one model each."""
    steps: int = 600
    """Optimiser steps of each fine-tuning."""
    text_steps: int | None = 1200
    """Optimiser steps, on all styles, of the two models that compare text encoders: nano's, and one trained from random
    weights; null leaves the comparison out."""
    batch_size: int = 32
    """Images per step."""
    learning_rate: float = 2e-4
    """Peak learning rate of the fine-tuning."""
    images: int = 48
    """Held-out images per style."""
    sampling_steps: int = 20
    """DDIM steps."""
    mode: str = "balanced"
    """Mode of the controls (`ControlUse.mode`); the table in docs/files.md has `balanced`."""

    def __post_init__(self) -> None:
        check_sampling_steps(self.sampling_steps)
        object.__setattr__(self, "mode", mode_name(self.mode))
        for name in ("images", "sampling_steps", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; expected at least 1", "out-of-range")
        if self.text_steps is not None and self.text_steps < 1:
            raise UserError(f"text_steps is {self.text_steps}; expected at least 1, or null", "out-of-range")
        for name in ("controls", "styles"):
            if not getattr(self, name):
                raise UserError(f"{name} is empty; give at least one", "missing-setting")
            _check_distinct(name, getattr(self, name))
        if unknown := sorted(set(self.styles) - set(TRAINED_STYLES)):
            raise UserError(f"styles has {', '.join(unknown)}; known: {', '.join(TRAINED_STYLES)}", "unknown-name")


def _check_distinct(name: str, values: Sequence[str]) -> None:
    if repeated := sorted({value for value in values if values.count(value) > 1}):
        raise UserError(f"{name} repeats {', '.join(repeated)}; name each once", "contradiction")


def run_community_model(settings: CommunityModel) -> StudyResult:
    """Fine-tune the bases unless that is done, and compare.

    Raises:
        UserError: icons or a control are missing, or a control contains no copy of its base or records no condition.
    """
    drawings = read_set("held-out").examples
    in_style = {
        style: EvaluationSet(style, tuple(one for one in drawings if one.style == style)).take(settings.images)
        for style in settings.styles
    }
    study = _Study(settings)
    cases: list[_Case] = []
    for style, images in in_style.items():
        for name in settings.controls:
            cases.append(study.case(name, study.original, images, style=style, how=ORIGINAL))
            for way in WAYS:
                cases.append(study.case(name, study.tuned(style), images, style=style, how=way))
    encoders = [] if settings.text_steps is None else _text_encoder_cases(study)
    path = Path(settings.out) / "community-model.png"
    shown = [case for case in cases if case.style == settings.styles[0]]
    write_png(path, _sheet([*shown, *(case for case in encoders if case.control == settings.controls[0])]))
    reports = [_report(study, name, [case for case in cases if case.control == name]) for name in settings.controls]
    reports.append(_summary(settings, cases))
    if encoders:
        reports.append(_text_encoder_report(study, encoders))
    shared = study_settings(settings, study.original, mode=settings.mode)
    return StudyResult(reports=with_settings(reports, shared), files={"images": path})


@dataclass(frozen=True, kw_only=True)
class _Case:
    """One control on one base and one set of images."""

    control: str
    style: str
    how: str
    images: EvaluationSet[Drawing]
    condition: conditions.Condition
    given: Sequence[np.ndarray]
    no_control: Sequence[np.ndarray]
    controlled: Sequence[np.ndarray]
    scores: tuple[float, float, float]
    """Of no control, of the control, and of the ceiling."""
    distance: float
    """Of the base from the original, on the layers that the control copied; 0 for the original."""
    settings: dict[str, Any]

    @property
    def closed(self) -> float:
        return gap_closed(*self.scores, higher_is_better=self.condition.fidelity.higher_is_better)

    @property
    def backgrounds(self) -> float:
        """Share of the images with the background colour that the prompt names."""
        found = map(background_colour, self.controlled)
        return float(np.mean([a == b.colour for a, b in zip(found, self.images.examples, strict=True)]))


class _Study:
    def __init__(self, settings: CommunityModel) -> None:
        self.settings = settings
        self.out = one_spelling(settings.out)  # runs are found again by their recipes, which name paths
        self._check_recorded_rates()
        base = load_base(settings.base, device=settings.device)
        self.original = base
        shared: dict[str, Control] = {}
        self.controls = {name: load_control(name, base, shared=shared) for name in settings.controls}
        for name, control in self.controls.items():
            if _copied_from_base(control).copied_network() is None:
                raise UserError(
                    f"{name} is a {control.kind}, which contains no copy of its base; this study needs one",
                    "wrong-kind",
                )
            if control.condition is None:
                raise UserError(f"{name} records no condition; this study needs one", "missing-setting")
        self._tuned: dict[str, Base] = {}
        self._ceilings: dict[tuple[str, str], list[np.ndarray]] = {}
        self._moved: dict[tuple[str, str], tuple[Control, float]] = {}

    def _check_recorded_rates(self) -> None:
        """Check the learning rate of the fine-tunings in the folder, which training lets change when it resumes.

        Raises:
            UserError: one has another rate than the settings.
        """
        for path in sorted((self.out / "bases").glob("*/recipe.json")):
            rate = read_json(path)["learning_rate"]
            if rate != self.settings.learning_rate:
                raise UserError(
                    f"{path.parent} was fine-tuned with learning_rate {rate:g}, and the study has"
                    f" {self.settings.learning_rate:g}; set learning_rate={rate:g}, or another out",
                    "resume-mismatch",
                )

    def tuned(self, style: str) -> Base:
        """The base fine-tuned on a style."""
        if style not in self._tuned:
            self._tuned[style] = self._fine_tuned(style, self.settings.base, [style], self.settings.steps)
        return self._tuned[style]

    @cached_property
    def by_text_encoder(self) -> dict[str, Base]:
        """The base fine-tuned on all styles, with its own text encoder and with one trained from random weights."""
        settings = self.settings
        assert settings.text_steps is not None  # the caller checks
        start = self.out / "bases" / "random-text-encoder"
        if not (start / "model_index.json").is_file():
            save_base(_with_random_text_encoder(self.original), start, self.original.dtype)
        styles, steps = list(settings.styles), settings.text_steps
        return {
            KEPT: self._fine_tuned("text-encoder-kept", settings.base, styles, steps),
            REPLACED: self._fine_tuned("text-encoder-replaced", str(start), styles, steps),
        }

    def _fine_tuned(self, name: str, start: str, styles: list[str], steps: int) -> Base:
        out = self.out / "bases" / name
        recipe = build_recipe(
            {
                "system": "base",
                "out": str(out),
                "icons": spelled(self.settings.icons),
                "start": spelled(start),
                "device": self.settings.device,
                "styles": styles,
                "steps": steps,
                "batch_size": self.settings.batch_size,
                "learning_rate": self.settings.learning_rate,
                "warmup_steps": min(50, steps),
                "ema": 0.99,
                "preview_every": steps,
            },
            origin="controlkit study",
        )
        run(recipe)
        return load_base(out / "base", device=self.settings.device)

    def case(self, name: str, base: Base, images: EvaluationSet[Drawing], *, style: str, how: str) -> _Case:
        """Sample and score a control on a base.

        Args:
            style: of the images, for tables.
            how: `ORIGINAL`, or one of `WAYS`.
        """
        control, distance = self.controls[name], 0.0
        if how != ORIGINAL:
            moved, distance = self._transferred(name, base)
            control = moved if how == BY_OFFSET else control
        mode, steps = self.settings.mode, self.settings.sampling_steps
        kind = conditions.find(control.condition or "")
        targets, prompts = images.images, images.captions
        given = [kind(target) for target in targets]
        stored = StoredResults(Path(self.settings.out), {"set": content_of(targets, prompts)})
        sampling = {"base": base.content, **sampling_settings(base, steps=steps)}
        uncontrolled = partial(generate_uncontrolled, base, prompts, steps)
        no_control = stored.images(f"{style}: {base.name} without control", sampling, uncontrolled)
        acting = control_settings(base, control, weight=1.0, mode=mode)
        use = EvalControl(control=control, condition_images=given, mode=mode)
        controlled = partial(generate_controlled, base, [use], prompts, steps=steps)
        depends = {**sampling, "control": acting, "given": content_of(given, ())}
        made = stored.images(f"{style}: {name}, {how}", depends, controlled)
        ceiling = self._ceiling(base, images)
        low, value, high = (kind.mean_score(given, group, targets) for group in (no_control, made, ceiling))
        return _Case(
            control=name,
            style=style,
            how=how,
            images=images,
            condition=kind,
            given=given,
            no_control=no_control,
            controlled=made,
            scores=(low, value, high),
            distance=distance,
            settings={**acting, "base": {"fingerprint": base.fingerprint, "content": base.content}},
        )

    def _ceiling(self, base: Base, images: EvaluationSet[Drawing]) -> list[np.ndarray]:
        """The images through the autoencoder, which are the same for every control."""
        key = (base.content, images.name)
        if key not in self._ceilings:
            self._ceilings[key] = reconstruct(base, images.images)
        return self._ceilings[key]

    def _transferred(self, name: str, base: Base) -> tuple[Control, float]:
        """A control transferred to a base, and the distance of the base."""
        key = (name, base.content)
        if key not in self._moved:
            control = self.controls[name]
            copied = _copied_from_base(control)
            moved, offset = transfer(copied, self.original, base)
            # The copy of an adapter gets the transferred base control.
            self._moved[key] = (copy.deepcopy(control, {id(copied): moved}), offset.distance)
        return self._moved[key]


def _copied_from_base(control: Control) -> Control:
    """The control that contains the copy of the base: itself, or that of an adapter."""
    shared = control.shared_network
    return shared if isinstance(shared, Control) else control


def _with_random_text_encoder(base: Base) -> Base:
    torch.manual_seed(1)
    return StableDiffusion(
        name=base.name,
        tokenizer=base.tokenizer,
        text_encoder=CLIPTextModel(base.text_encoder.config),
        vae=base.vae,
        unet=base.unet,
        scheduler_config=base.scheduler_config,
        defaults=base.defaults,
    )


def _text_encoder_cases(study: _Study) -> list[_Case]:
    examples = [drawing for drawing in read_set("held-out").examples if drawing.style in study.settings.styles]
    images = EvaluationSet("all styles", tuple(examples)).take(study.settings.images)
    cases = []
    for name in study.settings.controls:
        cases.append(study.case(name, study.original, images, style=ORIGINAL, how=ORIGINAL))
        for what, base in study.by_text_encoder.items():
            cases += [study.case(name, base, images, style=what, how=way) for way in WAYS]
    return cases


def _report(study: _Study, name: str, cases: Sequence[_Case]) -> Report:
    kind, count = cases[0].condition, len(cases[0].images.examples)
    distances = {case.style: case.distance for case in cases if case.how != ORIGINAL}
    listed = ", ".join(f"{style} {distance:.1%}" for style, distance in distances.items())
    return Report(
        title=f"{name}: {kind.fidelity.name} on {count} held-out images of each style",
        columns=("base, control", "no control", "control", "ceiling", "gap closed"),
        rows=tuple((f"{case.style}: {_words(case.how)}", *case.scores, case.closed) for case in cases),
        notes=(
            f"community models: {study.settings.base} fine-tuned on a style for {study.settings.steps} steps. The"
            f" layers of the UNet that the control copied differ by: {listed}.",
            LIMITS,
        ),
        facts={"distance": max(distances.values()), "distances": distances},
        settings=_case_settings(cases),
    )


def _summary(settings: CommunityModel, cases: Sequence[_Case]) -> Report:
    rows: list[Row] = []
    closed: dict[str, dict[str, float]] = {}
    for name in settings.controls:
        closed[name] = {
            how: float(np.mean([case.closed for case in cases if (case.control, case.how) == (name, how)]))
            for how in (ORIGINAL, *WAYS)
        }
        rows.append((name, *closed[name].values()))
    return Report(
        title=f"Gap closed, mean over {len(settings.styles)} styles",
        columns=("control", "on the base", *(f"on the community model, {way}" for way in WAYS)),
        rows=tuple(rows),
        facts={"gap_closed": closed},
    )


def _text_encoder_report(study: _Study, cases: Sequence[_Case]) -> Report:
    rows: list[Row] = []
    for case in cases:
        model = ORIGINAL if case.how == ORIGINAL else f"{case.style}, {case.how}"
        rows.append((f"{case.control}: {model}", *case.scores, case.closed, case.backgrounds))
    distances = {case.style: case.distance for case in cases if case.how != ORIGINAL}
    return Report(
        title=f"A replaced text encoder ({len(cases[0].images.examples)} held-out images)",
        columns=("control: base", "no control", "control", "ceiling", "gap closed", "background as asked"),
        rows=tuple(rows),
        notes=(
            f"both models: {study.settings.base} fine-tuned on these styles for {study.settings.text_steps} steps, one"
            " with its own text encoder, one with a text encoder trained from random weights, which the control reads.",
            "background as asked: share of the images whose background has the colour that the prompt names.",
            f"The layers that the control copied differ by: {', '.join(f'{k} {v:.1%}' for k, v in distances.items())}.",
        ),
        facts={"distances": distances},
        settings=_case_settings(cases),
    )


def _case_settings(cases: Sequence[_Case]) -> dict[str, Any]:
    sets = {
        (case.control, case.style): set_settings(
            f"held-out, {case.images.name}",
            case.images.images,
            case.images.captions,
            condition_images=case.given,
        )
        for case in cases
    }
    return {
        "controls": {f"{case.control}, {case.style}: {case.how}": case.settings for case in cases},
        "conditions": {case.control: condition_settings(case.condition) for case in cases},
        "sets": list(sets.values()),
        "seeds": seeds_of(len(cases[0].images.examples)),
    }


def _words(how: str) -> str:
    return "the base, its control" if how == ORIGINAL else f"community model, control {how}"


def _sheet(cases: Sequence[_Case]) -> Image.Image:
    """For each set and control: condition images, results without control and with it in each way, and targets."""
    strips: dict[str, Sequence[np.ndarray]] = {}
    for case in cases:
        strips[f"{case.style}: target"] = case.images.images
        strips[f"{case.style}: no control, {_model(case)}"] = case.no_control
        strips[f"{case.style}: {case.control}, condition"] = case.given
        strips[f"{case.style}: {case.control}, {case.how}"] = case.controlled
    cells = [[Image.fromarray(image) for image in strip[:_SHOWN]] for strip in strips.values()]
    return contact_sheet(cells, row_titles=list(strips), cell=64)


def _model(case: _Case) -> str:
    return ORIGINAL if case.how == ORIGINAL else "community model"
