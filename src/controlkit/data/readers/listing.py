"""`Listing`, the result of every reader: records, and problems with other entries."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from controlkit.conditions import find
from controlkit.conditions.condition import known_name
from controlkit.data.pair import SOURCE, TARGET, Pair
from controlkit.data.sources import ComputedCondition, Source
from controlkit.errors import UserError, nearest
from controlkit.files import valid_text

_SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class Record:
    """One image with all its condition images; the files are not checked yet."""

    where: str
    """Where it is listed: `line 7`, or its key."""
    image: Source
    conditions: Mapping[str, Source]
    """Name of the condition -> condition image."""
    captions: tuple[str, ...] = ("",)
    """At least one, possibly empty. Training samples one of them at each step."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Its entry in a manifest of `controlkit pairs`; other layouts have other keys or none."""

    @property
    def prompt(self) -> str:
        """The first caption."""
        return self.captions[0]

    def recorded(self, *keys: str) -> Any:
        """The metadata under nested keys; None if missing (files of other tools have other structures)."""
        value: Any = self.metadata
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    def sha256(self, condition: str | None = None) -> str | None:
        """The recorded hex SHA-256 of the file of the image, or of a condition image; None if there is none."""
        names = [("conditions", condition)] if condition is not None else [("picture",), ("image",)]
        found = (self.recorded("sha256", *keys) for keys in names)
        return next((digest for digest in found if isinstance(digest, str)), None)


@dataclass(frozen=True, kw_only=True)
class Listing:
    """Contents of a file or folder of pairs."""

    origin: Path | str
    """The file or folder that lists them, or the address of a dataset."""
    records: Sequence[Record]
    problems: Sequence[str] = ()
    """Invalid entries, as `where: reason`."""
    computes: bool = False
    """Whether conditions that are not listed can be computed from the images."""
    notes: Sequence[str] = ()
    """Warnings."""
    folder: Path | None = None
    """The folder that should contain the listed files; None where they are not listed by path."""

    def outside(self) -> list[str]:
        """A note on files outside of the folder, by absolute paths or `..`; empty if there are none."""
        if self.folder is None:
            return []
        home = os.path.join(os.path.abspath(self.folder), "")
        files = [file for record in self.records for file in (record.image, *record.conditions.values())]
        listed = dict.fromkeys(file.target if isinstance(file, ComputedCondition) else file for file in files)
        paths = [file for file in listed if isinstance(file, Path)]
        outside = [path for path in paths if not os.path.abspath(path).startswith(home)]
        return [outside_note(self.origin, len(outside), len(paths), outside[0])] if outside else []

    @property
    def conditions(self) -> list[str]:
        """Names of all conditions, in order of first occurrence."""
        return list(dict.fromkeys(name for record in self.records for name in record.conditions))

    @property
    def recorded(self) -> str | None:
        """The known name of the condition that it records; None if it records several, or an unknown one."""
        names = {short_name(name) for name in self.conditions}
        known = {name for name in map(known_name, names) if name is not None}
        return known.pop() if len(names) == len(known) == 1 else None

    def chosen(self, condition: str | None) -> str | None:
        """The name of `condition` in this listing; None if it is not there.

        A listing with a single condition gives that one under any name: files of other tools seldom name it.
        `identity` matches any condition.
        """
        names = self.conditions
        wanted = _wanted(condition)
        for name in names:
            if wanted is not None and wanted in (_plain(name), _plain(short_name(name))):
                return name
        if wanted is not None:
            for name in names:
                if known_name(name) is not None and known_name(name) == known_name(wanted):
                    return name
            if self.computes and known_name(wanted):
                return known_name(wanted)
        return names[0] if len(names) == 1 else None

    def renamed(self, condition: str | None) -> list[str]:
        """A note if the only condition of this listing is a known one and is read as another."""
        name, wanted = self.chosen(condition), _wanted(condition)
        recorded = None if name is None else known_name(short_name(name))
        asked = wanted and known_name(wanted)
        if asked is None or recorded is None or asked == recorded:
            return []
        return [f"the pairs record the condition {recorded}; they are read as {asked}, as asked for"]

    def pairs(self, condition: str | None = None) -> tuple[list[tuple[str, Pair]], list[str]]:
        """`(where, pair)` of every record, and the problems, including records without this condition.

        Raises:
            UserError: there are several conditions, and `condition` is none of them.
        """
        name = self.chosen(condition)
        if name is None and (self.records or not self.problems):
            raise self._ambiguous(condition)
        found, problems = [], list(self.problems)
        requested = _wanted(condition)
        kind = (requested and known_name(requested)) or known_name(short_name(str(name)))
        for record in self.records:
            source = record.conditions.get(str(name))
            if source is None and self.computes and not isinstance(record.image, ComputedCondition):
                source = ComputedCondition(target=record.image, condition=str(name))
            if source is None:
                problems.append(f"{record.where}: there is no condition image {name!r}")
                continue
            try:
                for caption in record.captions:
                    valid_text(caption, "the prompt")
            except UserError as error:
                problems.append(f"{record.where}: {error}")
                continue
            original = record.recorded("original", "sha256")
            pair = Pair(
                source=source,
                target=record.image,
                prompt=record.prompt,
                more_prompts=record.captions[1:],
                condition=kind,
                parameters=_parameters(record, str(name), source, kind),
                sha256={
                    side: digest
                    for side, digest in ((SOURCE, record.sha256(str(name))), (TARGET, record.sha256()))
                    if digest is not None
                },
                original=original if isinstance(original, str) else None,
            )
            found.append((record.where, pair))
        return found, problems

    def _ambiguous(self, condition: str | None) -> UserError:
        names = self.conditions
        if not self.records:
            return UserError(f"{self.origin} lists no pairs", "empty-data")
        if not names:
            return UserError(
                f"{self.origin} has images without condition images; make them with controlkit pairs", "empty-data"
            )
        unknown = ""
        if condition is not None and _wanted(condition) is not None:
            unknown = f" and no {condition!r}{nearest(condition, names)}"
        is_file = isinstance(self.origin, Path) and self.origin.is_file()
        example = f"{Path(self.origin).parent if is_file else self.origin}/{names[0]}"
        return UserError(
            f"{self.origin} has the conditions {', '.join(names)}{unknown}; name one: {example}",
            "unknown-name" if unknown else "missing-setting",
        )


def problems_error(origin: object, problems: Sequence[str], advice: str = "fix or remove these entries") -> UserError:
    """The error that lists the first of `problems`."""
    more = f"\n... and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    listed = "\n".join(problems[:_SHOWN])
    return UserError(f"{len(problems)} problems in {origin}; {advice}:\n{listed}{more}", "bad-data")


_OWN_ONLY: ContextVar[bool] = ContextVar("own_only", default=False)


@contextmanager
def own_files_only() -> Iterator[None]:
    """A context in which tables of images refuse paths outside of their folder before they read them."""
    token = _OWN_ONLY.set(True)
    try:
        yield
    finally:
        _OWN_ONLY.reset(token)


def check_own(inside: bool) -> None:
    """Check a listed file within `own_files_only`.

    Raises:
        UserError: it is not inside of its folder.
    """
    if _OWN_ONLY.get() and not inside:
        raise UserError("the table lists files outside of its folder", "bad-data")


def outside_note(origin: object, count: int, total: int, first: object) -> str:
    """A note on listed files outside of the folder."""
    return f"{count} of the {total} files in {origin} are outside of its folder, such as {first}"


def short_name(column: str) -> str:
    """`canny` for `canny_file_name`, `conditioning_canny`, `canny_image`."""
    name = re.sub(r"_(file_name|path|image|images)$", "", column)
    return re.sub(r"^(control|conditioning|condition)_(?=.)", "", name)


def _parameters(record: Record, name: str, source: Source, kind: str | None) -> Mapping[str, Any]:
    """The recorded parameters of the condition `kind`; empty if unknown."""
    if isinstance(source, ComputedCondition):
        return {**find(source.condition).defaults, **dict(source.parameters)}
    recorded = record.recorded("parameters", name)
    if kind is None or not isinstance(recorded, Mapping):
        return {}
    return {key: value for key, value in recorded.items() if key in find(kind).defaults}


def _wanted(condition: str | None) -> str | None:
    """The normalised name of a requested condition; None if any will do."""
    return None if condition is None or _plain(condition) == "identity" else _plain(condition)


def _plain(name: str) -> str:
    return name.strip().lower().replace("-", "_")
