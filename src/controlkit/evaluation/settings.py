"""The settings that a report's numbers depend on, as plain values for JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from controlkit.bases.base import Base, hash_of_halves
from controlkit.conditions import Condition
from controlkit.controls.control import Control
from controlkit.evaluation.sets import EvaluationSet, Example
from controlkit.files import sha256_of_all
from controlkit.sampling.plan import ActiveControl


def set_settings(
    name: str,
    images: Sequence[np.ndarray],
    prompts: Sequence[str],
    *,
    given: Sequence[np.ndarray] = (),
    parameters: Sequence[Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """A set of images `uint8 [H, W, 3]`: its size and a hash of all that belongs to it.

    Args:
        given: the condition images.
        parameters: those that each condition image was made with; None if all were made with the defaults.
    """
    settings: dict[str, Any] = {"name": name, "images": len(images), "content": content_of(images, prompts, given)}
    if parameters is not None:
        settings["condition_parameters"] = [dict(values) for values in parameters]
    return settings


def examples_settings(examples: EvaluationSet[Example]) -> dict[str, Any]:
    """`set_settings` of a set without condition images."""
    return set_settings(examples.name, examples.images, examples.captions)


def content_of(images: Sequence[np.ndarray], prompts: Sequence[str], given: Sequence[np.ndarray] = ()) -> str:
    """Hash of images, their prompts and their condition images."""

    def parts() -> Iterator[bytes | str]:
        for group in (images, given):
            yield str(len(group))
            for image in group:
                yield f"{image.dtype} {image.shape}"
                yield np.ascontiguousarray(image).tobytes()
        yield from prompts

    return sha256_of_all(parts())[:16]


def seeds_of(count: int) -> list[int]:
    """The seeds of `count` images: image i is generated from seed i."""
    return list(range(count))


def condition_settings(condition: Condition) -> dict[str, Any]:
    """A condition, its default parameters, and how following it is measured."""
    return {
        "name": condition.name,
        "parameters": dict(condition.defaults),
        "content": condition.content,
        "measure": condition.fidelity.name,
        "higher_is_better": condition.fidelity.higher_is_better,
    }


def control_settings(base: Base, control: Control, *, weight: float, mode: str | None) -> dict[str, Any]:
    """A control by its weights, and how it acts: `mode` is the one that applies, the base's own where it is None."""
    settings: dict[str, Any] = {
        "kind": control.kind,
        "condition": control.condition,
        "fingerprint": hash_of_halves(control.weights()),
        "weight": float(weight),
        "mode": ActiveControl.mode_in(mode, base, control),
    }
    if isinstance(companion := control.shared_network, Control):
        settings["companion"] = companion.fingerprint()
    return settings
