"""`controlkit evaluate control`: does a control steer?"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from controlkit import conditions
from controlkit.bases.base import Base
from controlkit.conditions.fidelity import scored_by_target
from controlkit.controls.control import Control, encode_images, takes_one_image, words_of_inputs
from controlkit.data.pairs import Pair
from controlkit.errors import UserError
from controlkit.evaluation.report import Report, Row, gap_closed
from controlkit.evaluation.sampling import draw_prompts, reconstruct
from controlkit.evaluation.sets import EvaluationSet, Example
from controlkit.evaluation.settings import condition_settings, content_of, control_settings, seeds_of, set_settings
from controlkit.files import sha256_of
from controlkit.images import contact_sheet, resize_cover, to_images, to_tensor
from controlkit.sampling.plan import ActiveControl
from controlkit.sampling.request import DEFAULT_STEPS
from controlkit.sampling.sampler import images_at_once, sample_prompts
from controlkit.sampling.settings import base_settings, in_words, sampling_settings

_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class EvalSet:
    """Condition images with the images and prompts they belong to; images are `uint8 [H, W, 3]`."""

    name: str
    given: Sequence[np.ndarray]
    truths: Sequence[np.ndarray]
    prompts: Sequence[str]
    parameters: Sequence[Mapping[str, Any]] | None = None
    """Those that each condition image was made with; None if all were made with the defaults."""


AnySet = TypeVar("AnySet", EvaluationSet[Example], EvalSet, EvaluationSet[Example] | EvalSet)


@dataclass(frozen=True, kw_only=True)
class Steer:
    """A control, one condition image for each image, and how much it counts."""

    control: Control
    given: Sequence[np.ndarray]
    weight: float = 1.0
    mode: str | None = None
    """Of `request.MODES`; None is the base's own."""


def examples_eval_set(condition: conditions.Condition, examples: EvaluationSet[Example], size: int) -> EvalSet:
    """A set's images, scaled to `size` x `size`, with condition images made of them."""
    truths = [np.asarray(resize_cover(Image.fromarray(image), size, size)) for image in examples.images]
    given = [condition(truth) for truth in truths]
    return EvalSet(name=examples.name, given=given, truths=truths, prompts=examples.captions)


def pairs_eval_set(pairs: Sequence[Pair], size: int) -> EvalSet:
    """Pairs from disk, brought to `size` x `size`."""
    images = [pair.images(size) for pair in pairs]
    return EvalSet(
        name="held-out pairs",
        given=[source for source, _ in images],
        truths=[target for _, target in images],
        prompts=[pair.prompt for pair in pairs],
        parameters=[pair.parameters for pair in pairs],
    )


@dataclass(frozen=True, kw_only=True)
class Baselines:
    """What a control is compared with, whatever its condition: images of the same prompts and seeds."""

    without: Sequence[np.ndarray]
    """Drawn without any control: the baseline."""
    mirrored: Sequence[np.ndarray]
    """The true images through the autoencoder: the ceiling."""


def draw_baselines(
    base: Base,
    truths: Sequence[np.ndarray],
    prompts: Sequence[str],
    steps: int,
    guidance: float | None,
    sampler: str | None = None,
) -> Baselines:
    """Baseline and ceiling of images and their prompts."""
    return Baselines(
        without=draw_prompts(base, prompts, steps, guidance, sampler=sampler), mirrored=reconstruct(base, truths)
    )


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
    ends: dict[str, Baselines] | None = None,
) -> tuple[Report, Image.Image]:
    """Condition following on each set: no control (baseline), this control, the true image (ceiling).

    Args:
        sets: those of one name are numbered, `held-out pairs`, `held-out pairs 2`.
        ends: baselines and ceilings that earlier calls drew and kept in this dict, by a hash of what they depend on;
            what is missing is drawn and added.

    Returns:
        The table and a sheet of the first eight images of each set.
    """
    ends = {} if ends is None else ends
    judgements = [
        _judge(base, control, one, ends, steps=steps, guidance=guidance, sampler=sampler, weight=weight, mode=mode)
        for one in _numbered(sets)
    ]
    sheet: dict[str, Sequence[np.ndarray]] = {}
    for made in judgements:
        name = made.judged.name
        columns = {
            "given": made.judged.given,
            "no control": made.ends.without,
            "control": made.steered,
            "truth": made.judged.truths,
        }
        sheet |= {f"{name}: {title}": group[:_SHOWN] for title, group in columns.items()}
    report = Report(
        title=f"{judgements[0].condition.name}: {judgements[0].measure}",
        columns=("images", "no control", "control", "ceiling", "gap closed"),
        rows=tuple((made.images, *made.values) for made in judgements),
        notes=(
            "ceiling: the true image through the autoencoder.",
            "gap closed = (control - no control) / (ceiling - no control).",
            f"{judgements[0].in_words}.",
            *_notes(judgements),
        ),
        facts={made.judged.name: made.facts for made in judgements},
        settings={
            **base_settings(base),
            **sampling_settings(base, steps=steps, guidance=guidance, sampler=sampler),
            "control": judgements[0].acting,
            "condition": condition_settings(judgements[0].condition),
            "sets": [made.set_settings for made in judgements],
        },
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
) -> tuple[Report, Image.Image]:
    """Condition following of several controls on the same images, in one table.

    Args:
        controls: by the name that the table gives them.

    Returns:
        The table, and a sheet of what was given and what came out for the first eight images of the first set.
    """
    ends: dict[str, Baselines] = {}
    every: list[_Judgement] = []
    named: dict[str, _Judgement] = {}
    rows: list[Row] = []
    facts: dict[str, Any] = {}
    acting: dict[str, Any] = {}
    strips: list[Sequence[Image.Image]] = []
    titles: list[str] = []
    for name, control in controls.items():
        judgements = [
            _judge(base, control, one, ends, steps=steps, guidance=guidance, sampler=sampler, weight=weight, mode=mode)
            for one in _numbered(sets)
        ]
        every += judgements
        named[name] = judgements[0]
        rows += [(f"{name}, {made.images}", made.measure, *made.values) for made in judgements]
        facts[name] = {made.judged.name: made.facts for made in judgements}
        acting[name] = {
            **judgements[0].acting,
            "condition": condition_settings(judgements[0].condition),
            "sets": [made.set_settings for made in judgements],
        }
        for title, group in ((name, judgements[0].judged.given), ("result", judgements[0].steered)):
            strips.append([Image.fromarray(image) for image in group[:_SHOWN]])
            titles.append(title)
    strips.append([Image.fromarray(image) for image in sets[0].images[:_SHOWN]])
    report = Report(
        title="Condition following",
        columns=("control, images", "measure", "no control", "control", "ceiling", "gap closed"),
        rows=tuple(rows),
        notes=("ceiling: the true image through the autoencoder.", *_each_acting(named), *_notes(every)),
        facts=facts,
        settings={
            **base_settings(base),
            **sampling_settings(base, steps=steps, guidance=guidance, sampler=sampler),
            "controls": acting,
        },
    )
    return report, contact_sheet(strips, row_titles=[*titles, "truth"], cell=72)


@dataclass(frozen=True, kw_only=True)
class _Judgement:
    """One control on one set."""

    condition: conditions.Condition
    judged: EvalSet
    ends: Baselines
    steered: Sequence[np.ndarray]
    acting: dict[str, Any]
    """The control, its weight and its mode, as `control_settings` tells them."""
    sampling: dict[str, Any]
    """Steps, guidance and sampler."""
    baseline: float
    value: float
    ceiling: float
    notes: tuple[str, ...]
    """What a reader of the figures has to know beside them."""

    @property
    def measure(self) -> str:
        direction = "higher" if self.condition.fidelity.higher_is_better else "lower"
        return f"{self.condition.fidelity.name} ({direction} is better)"

    @property
    def in_words(self) -> str:
        return in_words(self.acting | self.sampling)

    @property
    def images(self) -> str:
        return f"{self.judged.name} ({len(self.judged.truths)})"

    @property
    def values(self) -> tuple[float, float, float, float]:
        return (self.baseline, self.value, self.ceiling, gap_closed(self.baseline, self.value, self.ceiling))

    @property
    def facts(self) -> dict[str, float]:
        return dict(zip(("baseline", "control", "ceiling", "gap_closed"), self.values, strict=True))

    @property
    def set_settings(self) -> dict[str, Any]:
        made = self.judged
        told = set_settings(made.name, made.truths, made.prompts, given=made.given, parameters=made.parameters)
        return told | {"seeds": seeds_of(len(made.truths))}


def _judge(
    base: Base,
    control: Control,
    images: EvaluationSet[Example] | EvalSet,
    ends: dict[str, Baselines],
    *,
    steps: int,
    guidance: float | None,
    sampler: str | None,
    weight: float,
    mode: str | None,
) -> _Judgement:
    if control.condition is None:
        raise UserError("this control's file does not say which condition it follows; evaluation needs to know")
    if not takes_one_image(control):
        raise UserError(f"{control.title} takes {words_of_inputs(control)}; evaluation gives one condition image alone")
    condition, notes = _measured(conditions.find(control.condition))
    judged = images if isinstance(images, EvalSet) else examples_eval_set(condition, images, base.size)
    sampling = sampling_settings(base, steps=steps, guidance=guidance, sampler=sampler)
    key = sha256_of(base.content, content_of(judged.truths, judged.prompts), repr(sampling))
    if key not in ends:
        ends[key] = draw_baselines(base, judged.truths, judged.prompts, steps, guidance, sampler)
    use = Steer(control=control, given=judged.given, weight=weight, mode=mode)
    steered = draw_controlled(base, [use], judged.prompts, steps=steps, guidance=guidance, sampler=sampler)
    drawn = (ends[key].without, steered, ends[key].mirrored)
    baseline, value, ceiling = (
        condition.mean_score(judged.given, results, judged.truths, judged.parameters) for results in drawn
    )
    if condition.random and judged.parameters is not None and not all(judged.parameters):
        notes += (
            f"nothing tells how {condition.name} of {judged.name} was drawn; that of a result is drawn with the"
            " default parameters, so the figures say too little where others were used.",
        )
    return _Judgement(
        condition=condition,
        judged=judged,
        ends=ends[key],
        steered=steered,
        acting=control_settings(base, control, weight=weight, mode=mode),
        sampling=sampling,
        baseline=baseline,
        value=value,
        ceiling=ceiling,
        notes=notes,
    )


def _measured(condition: conditions.Condition) -> tuple[conditions.Condition, tuple[str, ...]]:
    """The condition with a measure that can be taken here, and what there is to say about it.

    A result's own condition image may need a learned model that is not to be had; the true image always is.
    """
    if condition.requires is None or condition.fidelity.against == "target":
        return condition, ()
    try:
        condition(np.zeros((64, 64, 3), np.uint8))
    except UserError as error:
        told = f"{condition.name} of a result cannot be drawn, so results are compared with the true image ({error})."
        return scored_by_target(condition), (told,)
    return condition, ()


def _numbered(sets: Sequence[AnySet]) -> list[AnySet]:
    """`sets` with names of their own: another of a name has its number behind it."""
    named: list[AnySet] = []
    for one in sets:
        taken, name, number = {other.name for other in named}, one.name, 1
        while name in taken:
            number += 1
            name = f"{one.name} {number}"
        named.append(replace(one, name=name))
    return named


def _each_acting(judgements: Mapping[str, _Judgement]) -> list[str]:
    """Mode, weight and sampling of the controls: once if they are the same, else by the controls' names."""
    by_words: dict[str, list[str]] = {}
    for name, made in judgements.items():
        by_words.setdefault(made.in_words, []).append(name)
    if len(by_words) == 1:
        return [f"{words}." for words in by_words]
    return [f"{', '.join(names)}: {words}." for words, names in by_words.items()]


def _notes(judgements: Sequence[_Judgement]) -> list[str]:
    return list(dict.fromkeys(note for made in judgements for note in made.notes))


def draw_controlled(
    base: Base,
    uses: Sequence[Steer],
    prompts: Sequence[str],
    *,
    steps: int,
    guidance: float | None = None,
    sampler: str | None = None,
    batch_size: int | None = None,
) -> list[np.ndarray]:
    """One `uint8` image for each prompt, under all of `uses`; image i has seed i."""
    made: list[np.ndarray] = []
    count = len(prompts)
    batch_size = batch_size or images_at_once(base.size, base.size)
    for first in range(0, count, batch_size):
        group = slice(first, min(first + batch_size, count))
        active = [
            ActiveControl.in_mode(
                use.mode,
                base,
                control=use.control,
                hint=encode_images(use.control, to_tensor(use.given[group]).to(base.device), base),
                weight=use.weight,
            )
            for use in uses
        ]
        for batch in sample_prompts(
            base,
            prompts=prompts[group],
            seeds=range(group.start, group.stop),
            uses=active,
            steps=steps,
            guidance=guidance,
            sampler=sampler,
            batch_size=batch_size,
        ):
            made += [np.asarray(image) for image in to_images(batch)]
        print(f"\rsteered {len(made)} of {count}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return made
