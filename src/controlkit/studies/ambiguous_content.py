"""`controlkit study ambiguous-content`: which concept results show, by what the prompt says and by condition.

A condition image may leave open what it shows. Zhang et al. 2023 (arXiv 2302.05543) describe that the model then
interprets shapes by itself under an empty prompt, and that a wrong interpretation can survive a strong prompt (the
"glass of water" among the limitations of their first version). Here each control gets condition images of concepts that
nano was trained on, with an empty prompt, the right caption, and a caption that names another concept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from controlkit import conditions
from controlkit.bases.base import Base
from controlkit.bases.load import load_base
from controlkit.controls.control import Control
from controlkit.errors import UserError
from controlkit.evaluation.features import LITE0, lite0, lite0_features
from controlkit.evaluation.metrics import retrieval_accuracy
from controlkit.evaluation.report import Report, Row, gap_closed
from controlkit.evaluation.sampling import EvalControl, generate_controlled, generate_uncontrolled, reconstruct
from controlkit.evaluation.sets import EvaluationSet
from controlkit.evaluation.settings import (
    condition_settings,
    content_of,
    control_settings,
    examples_settings,
    seeds_of,
)
from controlkit.formats.load import load_control
from controlkit.images import contact_sheet, write_png
from controlkit.nano.evaluation_sets import read_set
from controlkit.nano.icons import Drawing, caption_of
from controlkit.sampling.request import DEFAULT_STEPS
from controlkit.sampling.settings import sampling_settings
from controlkit.sampling.uses import mode_name
from controlkit.studies.stored_results import (
    StoredResults,
    StudyResult,
    check_sampling_steps,
    study_settings,
    with_settings,
)

PROMPTS = ("empty", "right", "conflicting")
"""Kinds of prompts."""
_NO_CONTROL = "no control"
_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class AmbiguousContent:
    """Settings of the study."""

    out: str = "runs/study/ambiguous-content"
    """Folder for the sheet and stored images (`kept/`)."""
    base: str = "nano"
    """The base."""
    device: str = "auto"
    """`cpu`, `cuda`, `mps`, or `auto` for the best available."""
    controls: tuple[str, ...] = (
        "canny",
        "nano/canny",
        "nano/lineart",
        "nano/scribble",
        "nano/silhouette",
        "nano/color_regions",
        "nano/blur",
        "nano/palette",
    )
    """Controls of one condition each: names or files."""
    images: int = 96
    """Images of concepts that the base was trained on (up to 200)."""
    nearest: int = 5
    """Concepts among which the right one must be, of the 50 of the set."""
    mode: str | None = None
    """Mode of the controls (`ControlUse.mode`); null is that of the base."""
    sampling_steps: int = DEFAULT_STEPS
    """DDIM steps."""

    def __post_init__(self) -> None:
        check_sampling_steps(self.sampling_steps)
        object.__setattr__(self, "mode", mode_name(self.mode))
        for name in ("images", "nearest", "sampling_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; expected at least 1", "out-of-range")
        if not self.controls:
            raise UserError("controls is empty; give at least one, such as canny", "missing-setting")


def run_ambiguous_content(settings: AmbiguousContent) -> StudyResult:
    """Sample every control under every kind of prompt, and score concepts and fidelity.

    Raises:
        UserError: a control is missing or records no condition, `nearest` is more than the concepts of the set, or the
            `metrics` extra is not installed.
    """
    lite0()  # the scores come last, after minutes
    gallery = read_set("seen-again")
    count = len({drawing.concept for drawing in gallery.examples})
    if settings.nearest > count:
        raise UserError(
            f"nearest is {settings.nearest}; the set has {count} concepts, so give 1 to {count}", "out-of-range"
        )
    base = load_base(settings.base, device=settings.device)
    shared: dict[str, Control] = {}
    controls = {name: load_control(name, base, shared=shared) for name in settings.controls}
    for name, control in controls.items():
        if control.condition is None:
            raise UserError(f"{name} records no condition; this study needs one", "missing-setting")
    images = EvaluationSet("seen", read_set("seen").examples).take(settings.images)
    study = _Study(settings, base, controls, images, gallery)
    made: dict[str, dict[str, list[np.ndarray]]] = {_NO_CONTROL: {p: study.uncontrolled(p) for p in PROMPTS}}
    for name in controls:
        made[name] = {prompt: study.controlled(name, prompt) for prompt in PROMPTS}
    path = Path(settings.out) / "ambiguous-content.png"
    write_png(path, study.sheet(made))
    mode = settings.mode or base.default_mode
    details = {
        "controls": {
            name: {
                **control_settings(base, control, weight=1.0, mode=mode),
                "condition": condition_settings(study.conditions[name]),
            }
            for name, control in controls.items()
        },
        "sets": [examples_settings(images), examples_settings(gallery)],
        "prompts": {kind: content_of((), study.prompts[kind]) for kind in PROMPTS},
        "seeds": seeds_of(len(images.examples)),
    }
    reports = with_settings(
        [study.concepts(made), study.fidelity(made)],
        study_settings(settings, base, mode=mode) | details,
    )
    return StudyResult(reports=reports, files={"images": path})


class _Study:
    def __init__(
        self,
        settings: AmbiguousContent,
        base: Base,
        controls: Mapping[str, Control],
        images: EvaluationSet[Drawing],
        gallery: EvaluationSet[Drawing],
    ) -> None:
        self.settings, self.base, self.images, self.gallery = settings, base, images, gallery
        self.controls = controls
        self.conditions = {name: conditions.find(control.condition or "") for name, control in controls.items()}
        self.given = {name: [kind(target) for target in images.images] for name, kind in self.conditions.items()}
        """Control -> its condition images."""
        self.shown = [drawing.concept for drawing in images.examples]
        self.named = other_concepts(self.shown, [drawing.concept for drawing in gallery.examples])
        self.prompts: dict[str, list[str]] = {
            "empty": [""] * len(self.shown),
            "right": images.captions,
            "conflicting": [
                caption_of(concept, drawing.style, drawing.colour)
                for concept, drawing in zip(self.named, images.examples, strict=True)
            ],
        }
        sampling = sampling_settings(base, steps=settings.sampling_steps)
        self._stored = StoredResults(Path(settings.out), {"base": base.content, **sampling})
        self._reconstructed = reconstruct(base, images.images)

    def uncontrolled(self, prompt: str) -> list[np.ndarray]:
        """Images without control."""
        prompts = self.prompts[prompt]
        sample = partial(generate_uncontrolled, self.base, prompts, self.settings.sampling_steps)
        return self._stored.images(f"{_NO_CONTROL}, {prompt} prompt", {"prompts": prompts}, sample)

    def controlled(self, name: str, prompt: str) -> list[np.ndarray]:
        """Images under a control."""
        control, given = self.controls[name], self.given[name]
        prompts, mode = self.prompts[prompt], self.settings.mode
        use = EvalControl(control=control, condition_images=given, mode=mode)
        steps = self.settings.sampling_steps
        sample = partial(generate_controlled, self.base, [use], prompts, steps=steps)
        acting = control_settings(self.base, control, weight=1.0, mode=mode)
        depends = {"prompts": prompts, "given": content_of(given, ()), "control": acting}
        return self._stored.images(f"{name}, {prompt} prompt", depends, sample)

    def concepts(self, made: Mapping[str, Mapping[str, Sequence[np.ndarray]]]) -> Report:
        """How often images show the concept of the condition image, and that of the prompt."""
        names = [drawing.concept for drawing in self.gallery.examples]
        gallery, count, nearest = lite0_features(self.gallery.images), len(set(names)), self.settings.nearest

        def share(features: Tensor, wanted: Sequence[str]) -> float:
            return retrieval_accuracy(features, wanted, gallery, names, nearest)

        chance = min(1.0, nearest / count)
        rows: list[Row] = [("chance", *[chance] * 4)]
        facts: dict[str, dict[str, float]] = {}
        for name, by_prompt in made.items():
            features = {prompt: lite0_features(images) for prompt, images in by_prompt.items()}
            shown = [share(features[prompt], self.shown) for prompt in PROMPTS]
            followed = share(features["conflicting"], self.named)
            rows.append((name, *shown, followed))
            facts[name] = dict(zip((*PROMPTS, "prompt_followed"), (*shown, followed), strict=True))
        ceiling = share(lite0_features(self._reconstructed), self.shown)
        rows.append(("true images through the autoencoder (ceiling)", *[ceiling] * 3, None))
        return Report(
            title=f"The right concept among the {nearest} nearest of {count} ({len(self.shown)} images)",
            columns=("", *(f"{prompt} prompt" for prompt in PROMPTS), "conflicting prompt: its own concept"),
            rows=tuple(rows),
            notes=(
                "first three columns: the concept of the image that the condition image is of; no control follows the"
                " prompt alone. Last: the concept that the conflicting prompt names.",
            ),
            facts={"concepts": facts, "chance": chance, "ceiling": ceiling},
            settings={"features": LITE0},
        )

    def fidelity(self, made: Mapping[str, Mapping[str, Sequence[np.ndarray]]]) -> Report:
        """Gap closed under each kind of prompt; the baseline has the same prompts."""
        targets = self.images.images
        rows: list[Row] = []
        for name, kind in self.conditions.items():
            given = self.given[name]
            high = kind.mean_score(given, self._reconstructed, targets)
            closed = []
            for prompt in PROMPTS:
                low, value = (kind.mean_score(given, made[which][prompt], targets) for which in (_NO_CONTROL, name))
                closed.append(gap_closed(low, value, high, higher_is_better=kind.fidelity.higher_is_better))
            rows.append((name, *closed))
        return Report(
            title=f"Fidelity to the condition, as gap closed ({len(targets)} images)",
            columns=("", *(f"{prompt} prompt" for prompt in PROMPTS)),
            rows=tuple(rows),
            notes=("the baseline of each column is no control with the same prompts.",),
            facts={"gap_closed": {str(name): dict(zip(PROMPTS, values, strict=True)) for name, *values in rows}},
        )

    def sheet(self, made: Mapping[str, Mapping[str, Sequence[np.ndarray]]]) -> Image.Image:
        """The first images: target, and for each control its condition images and the results under each prompt."""
        strips: dict[str, Sequence[np.ndarray]] = {"image": self.images.images}
        strips |= {f"{_NO_CONTROL}: {prompt}": made[_NO_CONTROL][prompt] for prompt in PROMPTS}
        for name, given in self.given.items():
            strips[f"{name}: condition"] = given
            strips |= {f"{name}: {prompt}": made[name][prompt] for prompt in PROMPTS}
        cells = [[Image.fromarray(image) for image in strip[:_SHOWN]] for strip in strips.values()]
        titles = [f"not {concept.replace('-', ' ')}" for concept in self.named[:_SHOWN]]
        return contact_sheet(cells, titles, list(strips), cell=80)


def other_concepts(concepts: Sequence[str], known: Sequence[str]) -> list[str]:
    """For each of `concepts` another one of `known`: half of the sorted list further."""
    names = sorted(set(known))
    return [names[(names.index(concept) + len(names) // 2) % len(names)] for concept in concepts]
