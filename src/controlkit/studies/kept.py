"""What a study keeps so that running it again resumes: images, numbers, and the settings that they depend on."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from controlkit.bases.base import Base
from controlkit.errors import UserError
from controlkit.evaluation.report import Report
from controlkit.files import read_json, sha256_of, write_atomically, write_json
from controlkit.sampling.settings import base_settings, in_words, sampling_settings


class Kept:
    """Results of a study in its folder, each made once; another study, base or setting has files of its own.

    Args:
        folder: of the study.
        shared: what all results depend on, as plain values.
    """

    def __init__(self, folder: Path, shared: Mapping[str, Any]) -> None:
        self._folder = folder / "kept" / sha256_of(_plain(shared))[:12]
        self._shared = dict(shared)

    def images(self, what: str, own: Mapping[str, Any], sample: Callable[[], list[np.ndarray]]) -> list[np.ndarray]:
        """Images `uint8 [H, W, 3]` of one size, sampled where there are none of this kind.

        Args:
            what: said on standard error before they are sampled.
            own: what they depend on besides what is shared, as plain values.
        """
        path = self._path("images", own, "safetensors")
        try:
            return list(load_file(path)["images"].numpy()) if path.is_file() else self._sampled(path, what, own, sample)
        except (SafetensorError, KeyError):  # damaged: they are sampled again
            return self._sampled(path, what, own, sample)

    def numbers(self, what: str, own: Mapping[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Plain values, measured where there are none; arguments as for `images`."""
        path = self._path("numbers", own, "json")
        if path.is_file():
            try:
                kept: dict[str, Any] = read_json(path)["numbers"]
                return kept
            except (UserError, KeyError, TypeError):
                pass  # damaged: they are measured again
        print(what, file=sys.stderr, flush=True)
        made = measure()
        write_json(path, {"numbers": made, "settings": {**self._shared, **own}})
        return made

    def _sampled(
        self, path: Path, what: str, own: Mapping[str, Any], sample: Callable[[], list[np.ndarray]]
    ) -> list[np.ndarray]:
        print(what, file=sys.stderr, flush=True)
        made = sample()
        told = {"settings": _plain({**self._shared, **own})}
        tensors = {"images": torch.from_numpy(np.stack(made))}
        write_atomically(path, lambda temporary: save_file(tensors, temporary, told))
        return made

    def _path(self, kind: str, own: Mapping[str, Any], suffix: str) -> Path:
        return self._folder / f"{kind}-{sha256_of(_plain(own))[:16]}.{suffix}"


def study_settings(study: Any, base: Base, *, mode: str, weight: float = 1.0) -> dict[str, Any]:
    """What the numbers of a study depend on, as plain values.

    Args:
        study: its settings, a dataclass with `sampling_steps`.
        mode: in which its controls act.
    """
    return {
        "study": dataclasses.asdict(study),
        **base_settings(base),
        **sampling_settings(base, steps=study.sampling_steps),
        "mode": mode,
        "weight": weight,
    }


def with_settings(reports: Sequence[Report], settings: Mapping[str, Any]) -> tuple[Report, ...]:
    """`reports` with their settings, and mode and sampling under each table."""
    told = f"{in_words(dict(settings))}."
    return tuple(
        dataclasses.replace(report, notes=(*report.notes, told), settings={**settings, **report.settings})
        for report in reports
    )


def _plain(values: Mapping[str, Any]) -> str:
    return json.dumps(values, sort_keys=True, default=str)
