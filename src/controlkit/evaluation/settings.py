"""Settings that the numbers of a report depend on, as plain values for JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from controlkit.bases.base import Base
from controlkit.bases.identity import hash_of_halves
from controlkit.conditions import Condition
from controlkit.controls.control import Control
from controlkit.evaluation.sets import EvaluationSet, Example
from controlkit.files import sha256_of, sha256_of_all
from controlkit.sampling.plan import ActiveControl


def set_settings(
    name: str,
    images: Sequence[np.ndarray],
    prompts: Sequence[str],
    *,
    condition_images: Sequence[np.ndarray] = (),
    references: Sequence[np.ndarray] = (),
    parameters: Sequence[Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Name, size and content hash of a set of images `uint8 [H, W, 3]`.

    Args:
        name: of the set.
        images: the targets.
        prompts: one per image.
        condition_images: one per image.
        references: of the scores, one per image, if they are not the condition images.
        parameters: condition parameters of each condition image; None if all were computed with the defaults.
    """
    content = content_of(images, prompts, [*condition_images, *references])
    settings: dict[str, Any] = {"name": name, "images": len(images), "content": content}
    if parameters is not None:
        settings["condition_parameters"] = [dict(values) for values in parameters]
    return settings


def examples_settings(examples: EvaluationSet[Example]) -> dict[str, Any]:
    """`set_settings` of a set without condition images."""
    return set_settings(examples.name, examples.images, examples.captions)


def content_of(
    images: Sequence[np.ndarray], prompts: Sequence[str], condition_images: Sequence[np.ndarray] = ()
) -> str:
    """Hash of images, prompts and condition images."""

    def parts() -> Iterator[bytes | str]:
        for group in (images, condition_images):
            yield str(len(group))
            for image in group:
                yield f"{image.dtype} {image.shape}"
                yield np.ascontiguousarray(image).tobytes()
        yield from prompts

    return sha256_of_all(parts())[:16]


def seeds_of(count: int, first: int = 0) -> list[int]:
    """The seeds of `count` images: image i has seed `first` + i."""
    return list(range(first, first + count))


def condition_settings(condition: Condition) -> dict[str, Any]:
    """A condition, its default parameters and its fidelity measure."""
    return {
        "name": condition.name,
        "parameters": dict(condition.defaults),
        "content": condition.content,
        "measure": condition.fidelity.name,
        "higher_is_better": condition.fidelity.higher_is_better,
    }


def control_settings(base: Base, control: Control, *, weight: float, mode: str | None) -> dict[str, Any]:
    """A control by the fingerprint of its weights, with weight and mode; None is the mode of the base."""
    settings: dict[str, Any] = {
        "kind": control.kind,
        "condition": control.condition,
        "fingerprint": hash_of_halves(control.weights()),
        "settings": _settings_key(control),
        "weight": float(weight),
        "mode": ActiveControl.mode_in(mode, base, control),
    }
    if isinstance(companion := control.shared_network, Control):
        settings["companion"] = companion.fingerprint()
    return settings


def _settings_key(control: Control) -> str:
    """Hash of what a control's results depend on besides its weights."""
    plain = json.dumps(control.config(), sort_keys=True, default=str)
    buffers = hash_of_halves(control.buffers())
    return sha256_of(plain, repr(control.hint_settings()), repr(control.state()), buffers)[:16]
