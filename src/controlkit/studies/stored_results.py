"""Results of studies: stored images and numbers, so that a study resumes, and the settings they depend on."""

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyResult:
    """Tables and files of a finished study."""

    reports: tuple[Report, ...]
    files: dict[str, Path]

    def to_json(self) -> dict[str, Any]:
        """Plain values, and paths of files."""
        return {"reports": [report.to_json() for report in self.reports], "files": self.files}


class StoredResults:
    """Results of a study in its folder, each computed once, in a file named after a hash of its settings.

    Args:
        folder: of the study.
        shared: settings that all results depend on, as plain values.
    """

    def __init__(self, folder: Path, shared: Mapping[str, Any]) -> None:
        self._folder = folder / "kept" / sha256_of(_plain(shared))[:12]
        self._shared = dict(shared)

    def images(
        self, what: str, settings: Mapping[str, Any], sample: Callable[[], list[np.ndarray]]
    ) -> list[np.ndarray]:
        """Stored images `uint8 [H, W, 3]` of one size, or sampled and stored.

        Args:
            what: printed on standard error before sampling.
            settings: what they depend on besides the shared settings, as plain values.
            sample: generates them.
        """
        path = self._path("images", settings, "safetensors")
        if path.is_file():
            try:
                return list(load_file(path)["images"].numpy())
            except (SafetensorError, KeyError):
                print(f"note: {path} is damaged; sampling again", file=sys.stderr)
        print(what, file=sys.stderr, flush=True)
        images = sample()
        metadata = {"settings": _plain({**self._shared, **settings})}
        tensors = {"images": torch.from_numpy(np.stack(images))}
        write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))
        return images

    def numbers(self, what: str, settings: Mapping[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Stored plain values, or measured and stored; arguments as for `images`."""
        path = self._path("numbers", settings, "json")
        if path.is_file():
            try:
                stored: dict[str, Any] = read_json(path)["numbers"]
                return stored
            except (UserError, KeyError, TypeError):
                print(f"note: {path} is damaged; measuring again", file=sys.stderr)
        print(what, file=sys.stderr, flush=True)
        numbers = measure()
        write_json(path, {"numbers": numbers, "settings": {**self._shared, **settings}})
        return numbers

    def _path(self, kind: str, settings: Mapping[str, Any], suffix: str) -> Path:
        return self._folder / f"{kind}-{sha256_of(_plain(settings))[:16]}.{suffix}"


def check_sampling_steps(steps: int) -> None:
    """Check the setting `sampling_steps` of a study.

    Raises:
        UserError: it is not from 1 to 1000.
    """
    if not 1 <= steps <= 1000:
        raise UserError(f"sampling_steps is {steps}; expected 1 to 1000", "out-of-range")


def settings_key(study: Any) -> str:
    """Hash of a study's settings other than `out` and `device`, for names of files."""
    settings = {name: value for name, value in dataclasses.asdict(study).items() if name not in _NOT_IN_RESULTS}
    return sha256_of(_plain(settings))[:8]


def changed_settings(study: Any) -> str:
    """A study's settings that differ from its defaults, as text: `budgets [25, 100], images 8`; empty if none does."""
    values = {
        field.name: getattr(study, field.name)
        for field in dataclasses.fields(study)
        if field.name not in _NOT_IN_RESULTS and getattr(study, field.name) != field.default
    }
    shown = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    return ", ".join(f"{name} {value}" for name, value in shown.items())


def tables_text(study: Any, reports: Sequence[Report]) -> str:
    """The tables of a study in Markdown, with its settings."""
    settings = f"Settings: {changed_settings(study) or 'the defaults'}."
    return "\n\n".join([*(report.to_markdown() for report in reports), settings]) + "\n"


_NOT_IN_RESULTS = ("out", "device")


def study_settings(study: Any, base: Base, *, mode: str, weight: float = 1.0) -> dict[str, Any]:
    """Settings that the numbers of a study depend on, as plain values.

    Args:
        study: settings of the study, a dataclass with `sampling_steps`.
        base: the base.
        mode: of its controls.
        weight: of its controls.
    """
    return {
        "study": dataclasses.asdict(study),
        **base_settings(base),
        **sampling_settings(base, steps=study.sampling_steps),
        "mode": mode,
        "weight": weight,
    }


def with_settings(reports: Sequence[Report], settings: Mapping[str, Any]) -> tuple[Report, ...]:
    """Add settings to `reports`, and a note with mode and sampling."""
    note = f"{in_words(dict(settings))}."
    return tuple(
        dataclasses.replace(report, notes=(*report.notes, note), settings={**settings, **report.settings})
        for report in reports
    )


def _plain(values: Mapping[str, Any]) -> str:
    return json.dumps(values, sort_keys=True, default=str)
