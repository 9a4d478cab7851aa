"""Support matrix: what every system of the registry can do, as a table for docs.

`python -m controlkit.formats.matrix` prints it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from controlkit.bases.base import Base
from controlkit.bases.families import KNOWN_BASES
from controlkit.bases.folders import NANO
from controlkit.bases.meta import meta_base
from controlkit.controls.control import Acts, Control
from controlkit.controls.inputs import Input
from controlkit.controls.registry import companion_role, find, registry, trainings_of
from controlkit.formats.describe import can_be_made
from controlkit.formats.native import formats_of

_COLUMNS = (
    "system",
    "in recipes",
    "input",
    "mechanism",
    "per-layer weights, masks",
    "file formats",
    "on other bases",
    "bases",
)


@dataclass(frozen=True, kw_only=True)
class Support:
    """What one system can do."""

    system: str
    trainings: tuple[str, ...]
    """Its systems in recipes."""
    inputs: tuple[Input, ...]
    acts: Acts
    read: tuple[str, ...]
    """Names of the file formats that are read."""
    written: tuple[str, ...]
    """Names of the file formats that are written."""
    companion: str | None
    """Short name of the control that it depends on."""
    offset: bool
    """Whether `transfer` moves it, or its companion, to another base; unchanged it runs on every base that fits."""
    bases: tuple[str, ...]
    """`nano` and well-known bases for which it can be made."""

    @property
    def weighted_by_site(self) -> bool:
        """Whether masks, layers and the modes that weight injection sites apply."""
        return self.acts == Acts.RESIDUALS

    def cells(self) -> tuple[str, ...]:
        """Its row of the table."""
        read_only = [f"{_code(name)} (read)" for name in self.read if name not in self.written]
        formats = [_code(name) for name in self.written if name in self.read] + read_only
        formats += [f"{_code(name)} (written)" for name in self.written if name not in self.read]
        beside = "" if self.companion is None else f" of its {self.companion}"
        return (
            _code(self.system),
            ", ".join(map(_code, self.trainings)),
            _words_of(self.inputs),
            ", ".join(flag.name.lower() for flag in self.acts if flag.name),
            "yes" if self.weighted_by_site else "no",
            ", ".join(formats),
            f"unchanged, or by `transfer`{beside}" if self.offset else "unchanged",
            ", ".join(self.bases) or "none",
        )


def support_matrix() -> list[Support]:
    """Every system of the registry; each is built for each base on the meta device."""
    bases = {name: meta_base(name) for name in (NANO, *KNOWN_BASES)}
    return [_support(kind, bases) for _, kind in sorted(registry().items())]


def matrix_table() -> str:
    """The support matrix in Markdown."""
    rows = [_COLUMNS, ("---",) * len(_COLUMNS), *(each.cells() for each in support_matrix())]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows).replace("| --- |", "|---|").replace(" --- |", "---|")


def _support(kind: type[Control], bases: Mapping[str, Base]) -> Support:
    formats = formats_of(kind)
    copying = kind if kind.companion is None else find(kind.companion)
    return Support(
        system=kind.kind,
        trainings=tuple(training.system for training in trainings_of(kind)),
        inputs=kind.inputs,
        acts=kind.acts,
        read=tuple(name for name, each in formats.items() if each.read is not None),
        written=tuple(name for name, each in formats.items() if each.write is not None),
        companion=None if kind.companion is None else companion_role(kind),
        offset=copying.copied_network is not Control.copied_network,
        bases=tuple(name for name, base in bases.items() if can_be_made(kind, base)),
    )


def _words_of(inputs: tuple[Input, ...]) -> str:
    images = [entry for entry in inputs if entry.kind == "image"]
    values = [f"{entry.name}{'' if entry.required else ' (optional)'}" for entry in inputs if entry.kind == "value"]
    optional = sum(not entry.required for entry in images)
    if 0 < optional < len(images):
        return ", ".join([*("an image" for _ in images[optional:]), *values, f"{optional} more images (optional)"])
    if len(images) > 1:
        return ", ".join([f"{'any of ' if optional else ''}{len(images)} images", *values])
    return ", ".join([*("an image" for _ in images), *values])


def _code(name: str) -> str:
    return f"`{name}`"


if __name__ == "__main__":
    print(matrix_table())
