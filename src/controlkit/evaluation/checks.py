"""Settings and sets of an evaluation of controls, checked before anything is sampled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np

from controlkit import conditions
from controlkit.bases.base import Base
from controlkit.controls.control import Control
from controlkit.controls.inputs import takes_one_image, words_of_inputs
from controlkit.errors import UserError
from controlkit.evaluation.eval_set import EvalSet, different_conditions
from controlkit.evaluation.sets import EvaluationSet, Example
from controlkit.sampling.prompts import first_prompt
from controlkit.sampling.request import check_prompt_mode, check_sampling


def check_evaluation(
    base: Base,
    control: Control,
    sets: Sequence[EvaluationSet[Example] | EvalSet],
    prompt_modes: Sequence[str],
    *,
    steps: int,
    guidance: float | None,
    sampler: str | None,
    weight: float,
    captioner: str | None,
    distance: bool,
    **_others: Any,
) -> None:
    """Check the arguments of `evaluate_control`.

    Raises:
        UserError: a setting is invalid or has no effect; there is no set, or one is empty, of another condition or
            size, or of one image where a distance is asked for.
    """
    if isinstance(steps, bool) or not isinstance(steps, Integral):
        raise UserError(f"steps is {steps!r}; expected an integer", "wrong-type")
    check_sampling(int(steps), guidance, sampler)
    _check_names_of_modes(prompt_modes, captioner)
    if isinstance(weight, bool) or not isinstance(weight, Real) or not math.isfinite(weight):
        raise UserError(f"weight is {weight!r}; expected a finite number", "out-of-range")
    if not isinstance(sets, Sequence) or not sets:
        raise UserError("sets must be a list of one set of images or more", "wrong-type")
    for images in sets:
        count = len(images.targets if isinstance(images, EvalSet) else images.images)
        if not count:
            raise UserError(f"{images.name} has no images to evaluate on", "empty-data")
        theirs = images.condition if isinstance(images, EvalSet) else None
        if known := different_conditions(control.condition, theirs):
            raise UserError(
                f"the control is of {known[0]}, but the condition images of {images.name} are of {known[1]}",
                "contradiction",
            )
        if isinstance(images, EvalSet):
            _check_size(images, base)
        else:
            check_computable(control)
        if distance and count < 2:
            raise UserError(
                f"FD-lite0 needs at least 2 images, and {images.name} has {count}; evaluate more images, or leave out"
                " --distance",
                "out-of-range",
            )


def _check_names_of_modes(prompt_modes: Sequence[str], captioner: str | None) -> None:
    """Check the names of prompt modes, and that a captioner has a use.

    Raises:
        UserError: a name is unknown or repeats, or no mode uses the captioner.
    """
    if isinstance(prompt_modes, str) or not prompt_modes:
        raise UserError(f"prompt_modes is {prompt_modes!r}; expected a list, such as ('given',)", "wrong-type")
    for prompt_mode in prompt_modes:
        check_prompt_mode(prompt_mode)
    if repeated := next((name for name in prompt_modes if list(prompt_modes).count(name) > 1), None):
        raise UserError(f"prompt_modes: {repeated} repeats; name each once", "contradiction")
    if captioner is not None and "automatic" not in prompt_modes:
        raise UserError(f"captioner {captioner!r} needs the prompt mode automatic", "contradiction")


def _check_size(images: EvalSet, base: Base) -> None:
    """Check that images have the base's size.

    Raises:
        UserError: one has another.
    """
    size = (base.size, base.size)
    for image in (*images.targets, *images.condition_images, *(images.references or ())):
        if image.shape[:2] != size:
            height, width = image.shape[:2]
            raise UserError(
                f"{images.name} has an image of {width} x {height}; {base.name} is evaluated at {base.size} x"
                f" {base.size}: pairs_eval_set(pairs, {base.size})",
                "wrong-size",
            )


def check_control(control: Control, name: str | None = None) -> None:
    """Check that a control can be scored.

    Args:
        name: of the control, for the error.

    Raises:
        UserError: its file records no condition, or it takes other inputs than one image.
    """
    named = "" if name is None else f" {name}"
    if control.condition is None:
        raise UserError(
            f"the control{named} records no condition; write one with `controlkit convert IN OUT --to controlkit"
            " --condition NAME`",
            "missing-setting",
        )
    if not takes_one_image(control):
        raise UserError(
            f"{control.title}{named} takes {words_of_inputs(control)}; evaluation passes one condition image only",
            "unsupported",
        )


def check_computable(control: Control, name: str | None = None) -> None:
    """Check that the condition of a control can be computed from an image here; one that needs a model is computed
    once.

    Args:
        name: of the control, for the error.

    Raises:
        UserError: it is unknown, comes with the data, or needs a package or weights that are missing.
    """
    assert control.condition is not None  # check_control
    condition = conditions.find(control.condition)
    if condition.provided:
        raise UserError(
            f"{'the control' if name is None else name} is of {condition.name}, whose condition images come with the"
            " data and are not computed from an image; evaluate it on pairs (--pairs, in Python pairs_eval_set)",
            "unsupported",
        )
    if condition.requires is not None:
        condition(np.zeros((64, 64, 3), np.uint8))


def check_prompt_modes(base: Base, prompt_modes: Sequence[str]) -> None:
    """Check that a base has the prompts that the modes ask for.

    Raises:
        UserError: it has no default prompt.
    """
    for prompt_mode in prompt_modes:
        if prompt_mode != "given":
            first_prompt(prompt_mode, "", base)
