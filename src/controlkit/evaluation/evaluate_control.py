"""Condition following of controls, with a baseline (no control) and a ceiling (the targets through the autoencoder)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from controlkit import conditions
from controlkit.bases.base import Base
from controlkit.conditions.fidelity import scored_by_target
from controlkit.controls.control import Control
from controlkit.errors import UserError
from controlkit.evaluation.baselines import Baselines, generate_baselines
from controlkit.evaluation.checks import check_computable, check_control, check_evaluation, check_prompt_modes
from controlkit.evaluation.eval_set import EvalSet, examples_eval_set
from controlkit.evaluation.report import Report, Row, gap_closed
from controlkit.evaluation.sampling import EvalControl, generate_controlled
from controlkit.evaluation.sets import EvaluationSet, Example
from controlkit.evaluation.settings import condition_settings, content_of, control_settings, seeds_of, set_settings
from controlkit.files import sha256_of
from controlkit.images import contact_sheet
from controlkit.sampling.prompts import Captioner, captioner_name, find_captioner, first_prompt
from controlkit.sampling.request import DEFAULT_STEPS
from controlkit.sampling.settings import base_settings, in_words, sampling_settings

_SHOWN = 8
_FD_COLUMN = ("FD-lite0 (no control, ceiling)",)
_FD_NOTE = (
    "FD-lite0 (lower is better): Frechet distance of EfficientNet-Lite0's features to the targets'. It compares only"
    " between sets of the same size.",
)


AnySet = TypeVar("AnySet", EvaluationSet[Example], EvalSet, EvaluationSet[Example] | EvalSet)


def evaluate_control(
    base: Base,
    control: Control,
    sets: Sequence[EvaluationSet[Example] | EvalSet],
    *,
    steps: int = DEFAULT_STEPS,
    guidance: float | None = None,
    sampler: str | None = None,
    weight: float = 1.0,
    mode: str | None = None,
    prompt_modes: Sequence[str] = ("given",),
    captioner: str | None = None,
    seed: int = 0,
    distance: bool = False,
    baselines: dict[str, Baselines] | None = None,
) -> tuple[Report, Image.Image]:
    """Score condition following on each set: no control (baseline), this control, the target (ceiling).

    Args:
        sets: sets of the same name are numbered: `held-out pairs`, `held-out pairs 2`.
        prompt_modes: each set is scored once in each (`GenerateRequest.prompt_mode`); given are its own prompts. The
            baseline has the same prompts.
        captioner: of the prompt mode `automatic`; default: that of the base.
        seed: of the first image of each set; the next image has the next seed.
        distance: also compute FD-lite0, the Frechet distance of EfficientNet-Lite0's features to those of the targets.
        baselines: cache of baselines, by a hash of what they depend on; missing ones are computed and added. Pass the
            same dict to several calls to compute them once.

    Returns:
        The table, and a contact sheet of the first eight images of each set.

    Raises:
        UserError: the control records no condition, or takes more than one image; or, with `distance`, a set has one
            image, or the `metrics` extra is not installed.
    """
    check_control(control)
    baselines = {} if baselines is None else baselines
    evaluated = _evaluate_each(
        base,
        control,
        sets,
        prompt_modes,
        baselines,
        steps=steps,
        guidance=guidance,
        sampler=sampler,
        weight=weight,
        mode=mode,
        captioner=captioner,
        seed=seed,
        distance=distance,
    )
    sheet: dict[str, Sequence[np.ndarray]] = {}
    for scored in evaluated:
        name = scored.eval_set.name
        columns = {
            "condition": scored.eval_set.condition_images,
            "no control": scored.baselines.no_control,
            "control": scored.controlled,
            "target": scored.eval_set.targets,
        }
        sheet |= {f"{name}: {title}": group[:_SHOWN] for title, group in columns.items()}
    report = Report(
        title=f"{evaluated[0].condition.name}: {evaluated[0].measure}",
        columns=("images", "no control", "control", "ceiling", "gap closed", *_FD_COLUMN[:distance]),
        rows=tuple((scored.images, *scored.values, *scored.fd_cell) for scored in evaluated),
        notes=(
            "ceiling: the target, encoded and decoded by the autoencoder.",
            "gap closed = (control - no control) / (ceiling - no control).",
            f"{evaluated[0].in_words}.",
            *_FD_NOTE[:distance],
            *_notes(evaluated),
        ),
        facts={scored.eval_set.name: scored.facts for scored in evaluated},
        settings={
            **base_settings(base),
            **sampling_settings(base, steps=steps, guidance=guidance, sampler=sampler),
            "control": evaluated[0].acting,
            "condition": condition_settings(evaluated[0].condition),
            "sets": [scored.set_settings for scored in evaluated],
        },
        images=tuple(row for scored in evaluated for row in scored.per_image),
    )
    cells = [[Image.fromarray(image) for image in group] for group in sheet.values()]
    return report, contact_sheet(cells, row_titles=list(sheet), cell=96)


def evaluate_controls(
    base: Base,
    controls: Mapping[str, Control],
    sets: Sequence[EvaluationSet[Example]],
    *,
    steps: int = DEFAULT_STEPS,
    guidance: float | None = None,
    sampler: str | None = None,
    weight: float = 1.0,
    mode: str | None = None,
    prompt_modes: Sequence[str] = ("given",),
    captioner: str | None = None,
    seed: int = 0,
    distance: bool = False,
) -> tuple[Report, Image.Image]:
    """Score condition following of several controls on the same images, in one table.

    Args:
        controls: by their name in the table.
        prompt_modes: as of `evaluate_control`, with `captioner`, `seed` and `distance`.

    Returns:
        The table, and a contact sheet of condition images and results for the first eight images of the first set.

    Raises:
        UserError: a control records no condition, or one that cannot be computed here; or it takes more than one image.
    """
    baselines: dict[str, Baselines] = {}
    every: list[_Evaluated] = []
    named: dict[str, _Evaluated] = {}
    rows: list[Row] = []
    facts: dict[str, Any] = {}
    acting: dict[str, Any] = {}
    each_image: list[dict[str, Any]] = []
    strips: list[Sequence[Image.Image]] = []
    titles: list[str] = []
    for name, control in controls.items():
        check_control(control, name)
        check_computable(control, name)
    for name, control in controls.items():
        evaluated = _evaluate_each(
            base,
            control,
            sets,
            prompt_modes,
            baselines,
            steps=steps,
            guidance=guidance,
            sampler=sampler,
            weight=weight,
            mode=mode,
            captioner=captioner,
            seed=seed,
            distance=distance,
        )
        every += evaluated
        named[name] = evaluated[0]
        rows += [(f"{name}, {scored.images}", scored.measure, *scored.values, *scored.fd_cell) for scored in evaluated]
        each_image += [{"control": name, **row} for scored in evaluated for row in scored.per_image]
        facts[name] = {scored.eval_set.name: scored.facts for scored in evaluated}
        acting[name] = {
            **evaluated[0].acting,
            "condition": condition_settings(evaluated[0].condition),
            "sets": [scored.set_settings for scored in evaluated],
        }
        for title, group in ((name, evaluated[0].eval_set.condition_images), ("result", evaluated[0].controlled)):
            strips.append([Image.fromarray(image) for image in group[:_SHOWN]])
            titles.append(title)
    short = [title.rpartition("/")[2] for title in titles[::2]]
    if len(set(short)) == len(short):  # of files their names, where these differ
        titles[::2] = short
    strips.append([Image.fromarray(image) for image in sets[0].images[:_SHOWN]])
    report = Report(
        title="Condition following",
        columns=(
            *("control, images", "measure", "no control", "control", "ceiling", "gap closed"),
            *_FD_COLUMN[:distance],
        ),
        rows=tuple(rows),
        notes=(
            "ceiling: the target, encoded and decoded by the autoencoder.",
            *_each_acting(named),
            *_FD_NOTE[:distance],
            *_notes(every),
        ),
        facts=facts,
        settings={
            **base_settings(base),
            **sampling_settings(base, steps=steps, guidance=guidance, sampler=sampler),
            "controls": acting,
        },
        images=tuple(each_image),
    )
    return report, contact_sheet(strips, row_titles=[*titles, "target"], cell=72)


@dataclass(frozen=True, kw_only=True)
class _Evaluated:
    """One control on one set."""

    condition: conditions.Condition
    eval_set: EvalSet
    baselines: Baselines
    controlled: Sequence[np.ndarray]
    acting: dict[str, Any]
    """The control, its weight and its mode (`control_settings`)."""
    sampling: dict[str, Any]
    """Steps, guidance and sampler."""
    prompting: dict[str, Any]
    """`prompt_mode` and `captioner`; empty if the prompts are those of the set."""
    baselines_each: Sequence[float]
    values_each: Sequence[float]
    ceilings_each: Sequence[float]
    """Scores of each image: without control, with it, and of its target."""
    seed: int
    """Of the first image."""
    fd: tuple[float, float, float] | None
    """FD-lite0 to the targets without control, with it, and of the ceiling; None if not asked for."""
    notes: tuple[str, ...]
    """Caveats of the scores."""

    @property
    def measure(self) -> str:
        direction = "higher" if self.condition.fidelity.higher_is_better else "lower"
        return f"{self.condition.fidelity.name} ({direction} is better)"

    @property
    def in_words(self) -> str:
        return in_words(self.acting | self.sampling)

    @property
    def baseline(self) -> float:
        return float(np.mean(self.baselines_each))

    @property
    def value(self) -> float:
        return float(np.mean(self.values_each))

    @property
    def ceiling(self) -> float:
        return float(np.mean(self.ceilings_each))

    @property
    def per_image(self) -> list[dict[str, Any]]:
        """Scores of each image, with its seed and prompt."""
        scores = zip(self.baselines_each, self.values_each, self.ceilings_each, strict=True)
        return [
            {
                "set": self.eval_set.name,
                "image": index,
                "seed": self.seed + index,
                "prompt": prompt,
                "no_control": baseline,
                "score": value,
                "ceiling": ceiling,
            }
            for index, (prompt, (baseline, value, ceiling)) in enumerate(
                zip(self.eval_set.prompts, scores, strict=True)
            )
        ]

    @property
    def images(self) -> str:
        return f"{self.eval_set.name} ({len(self.eval_set.targets)})"

    @property
    def values(self) -> tuple[float, float, float, float]:
        scores = (self.baseline, self.value, self.ceiling)
        return (*scores, gap_closed(*scores, higher_is_better=self.condition.fidelity.higher_is_better))

    @property
    def fd_cell(self) -> tuple[str, ...]:
        if self.fd is None:
            return ()
        baseline, value, ceiling = self.fd
        return (f"{value:.1f} ({baseline:.1f}, {ceiling:.1f})",)

    @property
    def facts(self) -> dict[str, float]:
        found = dict(zip(("baseline", "control", "ceiling", "gap_closed"), self.values, strict=True))
        if self.fd is not None:
            found |= dict(zip(("fd_lite0_baseline", "fd_lite0", "fd_lite0_ceiling"), self.fd, strict=True))
        return found

    @property
    def set_settings(self) -> dict[str, Any]:
        images = self.eval_set
        settings = set_settings(
            images.name,
            images.targets,
            images.prompts,
            condition_images=images.condition_images,
            references=images.references or (),
            parameters=images.parameters,
        )
        return settings | self.prompting | {"seeds": seeds_of(len(images.targets), self.seed)}


def _evaluate_each(
    base: Base,
    control: Control,
    sets: Sequence[EvaluationSet[Example] | EvalSet],
    prompt_modes: Sequence[str],
    baselines: dict[str, Baselines],
    **settings: Any,
) -> list[_Evaluated]:
    """`_evaluate` on each set in each prompt mode, after all settings and sets are checked."""
    check_evaluation(base, control, sets, prompt_modes, **settings)
    check_prompt_modes(base, prompt_modes)
    caption = find_captioner(settings["captioner"], base) if "automatic" in prompt_modes else None
    with base.in_use:
        return [
            _evaluate(base, control, each, baselines, prompt_mode=prompt_mode, caption=caption, **settings)
            for each in _numbered(sets)
            for prompt_mode in prompt_modes
        ]


def _evaluate(
    base: Base,
    control: Control,
    images: EvaluationSet[Example] | EvalSet,
    baselines: dict[str, Baselines],
    *,
    steps: int,
    guidance: float | None,
    sampler: str | None,
    weight: float,
    mode: str | None,
    prompt_mode: str,
    captioner: str | None,
    caption: Captioner | None,
    seed: int,
    distance: bool,
) -> _Evaluated:
    assert control.condition is not None  # check_control
    condition, notes = _scorable(conditions.find(control.condition))
    eval_set = images if isinstance(images, EvalSet) else examples_eval_set(condition, images, base.size)
    acting = control_settings(base, control, weight=weight, mode=mode)
    sampling = sampling_settings(base, steps=steps, guidance=guidance, sampler=sampler)
    use = EvalControl(control=control, condition_images=eval_set.condition_images, weight=weight, mode=mode)

    def controlled_by(prompts: Sequence[str]) -> list[np.ndarray]:
        return generate_controlled(base, [use], prompts, steps=steps, guidance=guidance, sampler=sampler, seed=seed)

    prompting: dict[str, Any] = {}
    if prompt_mode != "given":
        prompting = {"prompt_mode": prompt_mode}
        prompts = [first_prompt(prompt_mode, "", base)] * len(eval_set.prompts)
        if prompt_mode == "automatic":
            assert caption is not None
            prompting["captioner"] = captioner_name(captioner, base)
            prompts = caption([Image.fromarray(image) for image in controlled_by(prompts)])
        eval_set = replace(eval_set, name=f"{eval_set.name}, prompt {prompt_mode}", prompts=prompts)
    key = sha256_of(base.content, content_of(eval_set.targets, eval_set.prompts), repr(sampling), str(seed))
    if key not in baselines:
        baselines[key] = generate_baselines(base, eval_set.targets, eval_set.prompts, steps, guidance, sampler, seed)
    controlled = controlled_by(eval_set.prompts)
    baseline, value, ceiling = (
        eval_set.scores(condition, results)
        for results in (baselines[key].no_control, controlled, baselines[key].ceiling)
    )
    if condition.random and eval_set.parameters is not None and not all(eval_set.parameters):
        notes += (
            f"the {condition.name} parameters of {eval_set.name} are not recorded. Conditions of results are computed"
            " with the defaults, so scores are too low where other parameters were used.",
        )
    if eval_set.scaled and condition.fidelity.against == "condition":
        notes += (
            f"{eval_set.scaled} condition images of {eval_set.name} were scaled to the base's size, which thins lines:"
            f" the targets themselves score {np.mean(eval_set.scores(condition, eval_set.targets)):.3f}.",
        )
    if eval_set.rescaled:
        notes += (
            f"{eval_set.rescaled} condition images of {eval_set.name} were computed at another size and scaled"
            f" to {base.size} pixels, where {condition.name} may look different: generating computes them at"
            f" {base.size}. Pairs made with --size {base.size} show what the control does there.",
        )
    fd = None
    if distance:
        without, best = baselines[key].distances
        fd = (without, baselines[key].distance(controlled), best)
    return _Evaluated(
        condition=condition,
        eval_set=eval_set,
        baselines=baselines[key],
        controlled=controlled,
        acting=acting,
        sampling=sampling,
        prompting=prompting,
        baselines_each=baseline,
        values_each=value,
        ceilings_each=ceiling,
        seed=seed,
        fd=fd,
        notes=notes,
    )


def _scorable(condition: conditions.Condition) -> tuple[conditions.Condition, tuple[str, ...]]:
    """The condition with a measure that can be computed here, and notes on it.

    The condition of a result may need a learned model that is missing; the target never is.
    """
    if condition.requires is None or condition.fidelity.against == "target":
        return condition, ()
    try:
        condition(np.zeros((64, 64, 3), np.uint8))
    except UserError as error:
        note = f"{condition.name} of results cannot be computed, so results are compared with the targets ({error})."
        return scored_by_target(condition), (note,)
    return condition, ()


def _numbered(sets: Sequence[AnySet]) -> list[AnySet]:
    """`sets` with distinct names: repeated ones get a number."""
    named: list[AnySet] = []
    for each in sets:
        taken, name, number = {other.name for other in named}, each.name, 1
        while name in taken:
            number += 1
            name = f"{each.name} {number}"
        named.append(replace(each, name=name))
    return named


def _each_acting(evaluated: Mapping[str, _Evaluated]) -> list[str]:
    """Mode, weight and sampling of the controls: one line if they agree, else one per group of controls."""
    by_words: dict[str, list[str]] = {}
    for name, scored in evaluated.items():
        by_words.setdefault(scored.in_words, []).append(name)
    if len(by_words) == 1:
        return [f"{words}." for words in by_words]
    return [f"{', '.join(names)}: {words}." for words, names in by_words.items()]


def _notes(evaluated: Sequence[_Evaluated]) -> list[str]:
    no_gap = [
        f"{scored.condition.name} on {scored.images}: no gap to close, as the ceiling is not better than no control."
        for scored in evaluated
        if math.isnan(scored.values[-1]) and not math.isnan(scored.value)
    ]
    return list(dict.fromkeys([*(note for scored in evaluated for note in scored.notes), *no_gap]))
