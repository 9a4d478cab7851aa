"""Stored settings, as far as this server can use them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from controlkit import conditions
from controlkit.errors import UserError
from controlkit.sampling.embeddings import embedding_file
from controlkit.sampling.request import GenerateRequest
from controlkit.server.catalogue import TASK, Catalogue
from controlkit.server.parameters import parameters_of
from controlkit.ui.control_rows import computed, condition_of, known_task, offered

_WITHOUT_FIELDS = {
    each.name: each.default
    for each in dataclasses.fields(GenerateRequest)
    if each.name in ("prompt_mode", "captioner", "prompt_syntax", "vary", "xy", "tiled")
}
"""Fields of `GenerateRequest` that change images and that the page has not -> their defaults."""


@dataclass(frozen=True)
class Restored:
    """Settings of a file, with the models that the server lists."""

    fields: Mapping[str, Any]
    """Of `GenerateRequest`, as plain values."""
    base: str | None
    """Name of the base; None if it is not listed."""
    vae: str | None
    """Name of the autoencoder; None for the base's own, or if it is not listed."""
    loras: Mapping[str, float]
    """Name -> weight of those that are listed."""
    controls: tuple[Mapping[str, Any], ...]
    """Fields of `ControlUse` of those that are offered."""
    notes: tuple[str, ...]
    """What is missing, in sentences."""

    @classmethod
    def of(cls, fields: Mapping[str, Any], catalogue: Catalogue, most: int) -> Restored:
        """Find the models of stored settings in a catalogue.

        Args:
            most: number of controls that the page has room for.
        """
        notes: list[str] = []

        def find(kind: str, name: str, what: str) -> str | None:
            for each in (name, Path(name).name):  # of the command line, a path
                try:
                    return catalogue.find(kind, each)
                except UserError:
                    continue
            notes.append(f"there is no {what} {Path(name).name} here")
            return None

        base = find("bases", fields["base"], "base")
        vae = None if fields["vae"] is None else find("vaes", fields["vae"], "VAE")
        loras = {}
        for use in fields["loras"]:
            if (name := find("loras", use["file"], "LoRA")) is not None:
                loras[name] = use["weight"]
        for word in (embedding_file(entry)[0] for entry in fields["embeddings"]):
            if not catalogue.embeddings_in(word):
                notes.append(f"there is no embedding {word} here")
        ignored = [name for name, default in _WITHOUT_FIELDS.items() if fields[name] != default]
        here = offered(catalogue)
        controls: list[Mapping[str, Any]] = []
        for use in fields["controls"]:
            name = _offered_as(use["control"], catalogue, here)
            if name is not None and len(controls) < most:
                use = {**use, "control": name}
                controls.append(use)
                ignored += [f"{each} of {name}" for each in _ignored(use, catalogue)]
            else:
                notes.append(f"control {Path(use['control']).name} is not offered here")
        if ignored:
            notes.append(f"the page has no fields for {', '.join(ignored)}: images will differ")
        return cls(fields, base, vae, loras, tuple(controls), tuple(notes))

    @property
    def seeds(self) -> str:
        """The seeds as the page's field has them."""
        return ",".join(str(seed) for seed in self.fields["seeds"])


def _offered_as(name: str, catalogue: Catalogue, here: Sequence[str]) -> str | None:
    """The offered control of a name of the command line: a path, or an adapter of nano without `nano/`."""
    for each in (name, Path(name).name, f"nano/{name}"):
        with suppress(UserError):
            found = catalogue.find("controls", each)
            if found in here:
                return found
    return None


def _ignored(use: Mapping[str, Any], catalogue: Catalogue) -> list[str]:
    """Fields and parameters of a `ControlUse` that the page cannot restore."""
    inputs = use["inputs"] or {}
    task = known_task(catalogue, use["control"], inputs.get(TASK))
    condition = computed(condition_of(catalogue, use["control"], task))
    known = [] if condition is None else [each.name for each in parameters_of(conditions.find(condition))]
    found = [name for name in ("layers", "mask") if use[name] is not None]
    found += [f"input {name}" for name in inputs if name not in ("image", TASK)]
    if task is None and TASK in inputs:
        found.append(f"task {inputs[TASK]}")
    return [*found, *(name for name in use["parameters"] or {} if name not in known)]
