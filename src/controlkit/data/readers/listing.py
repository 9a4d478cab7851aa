"""What every reader gives: records, and what is wrong with the rest."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from controlkit.conditions import find
from controlkit.data.pair import Pair
from controlkit.data.sources import ComputedCondition, Source
from controlkit.errors import UserError, nearest
from controlkit.files import valid_text

_SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class Record:
    """One image with all its condition images, not looked at yet."""

    where: str
    """Where it is listed: `line 7`, or its key."""
    image: Source
    conditions: Mapping[str, Source]
    """Name of the condition -> condition image."""
    captions: tuple[str, ...] = ("",)
    """One at least, which is empty where there is none. Training computes one of them in each step."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """What a manifest of ours tells about how it came to be; empty in other layouts."""

    @property
    def prompt(self) -> str:
        """The first caption, which is the one wherever there has to be one."""
        return self.captions[0]

    def recorded(self, *keys: str) -> Any:
        """What the manifest says under these keys; None if it says nothing (files of other tools hold other things)."""
        value: Any = self.metadata
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value


@dataclass(frozen=True, kw_only=True)
class Listing:
    """All that a file or folder of pairs holds."""

    origin: Path
    """The file or folder that lists them."""
    records: Sequence[Record]
    problems: Sequence[str] = ()
    """Entries that cannot be understood, in words."""
    computes: bool = False
    """Whether conditions that are not listed can be computed from the images."""
    notes: Sequence[str] = ()
    """What is no problem, but should not pass in silence."""
    folder: Path | None = None
    """Where the listed files should lie; None where they are not listed by their paths."""

    def outside(self) -> list[str]:
        """A note on files that are listed outside of their folder, by absolute paths or `..`; empty if none are."""
        if self.folder is None:
            return []
        home = os.path.join(os.path.abspath(self.folder), "")
        files = [file for record in self.records for file in (record.image, *record.conditions.values())]
        listed = dict.fromkeys(file.target if isinstance(file, ComputedCondition) else file for file in files)
        paths = [file for file in listed if isinstance(file, Path)]
        away = [path for path in paths if not os.path.abspath(path).startswith(home)]
        return [outside_note(self.origin, len(away), len(paths), away[0])] if away else []

    @property
    def conditions(self) -> list[str]:
        """Names of all conditions, in the order in which they first occur."""
        return list(dict.fromkeys(name for record in self.records for name in record.conditions))

    def chosen(self, condition: str | None) -> str | None:
        """The name, in this listing, of what `condition` asks for; None where it is none of them.

        A listing with one condition gives that one, whatever it is called: files of other tools seldom name it.
        `identity` asks for nothing in particular.
        """
        names = self.conditions
        wanted = _wanted(condition)
        for name in names:
            if wanted is not None and wanted in (_plain(name), _plain(short_name(name))):
                return name
        if wanted is not None:
            for name in names:
                if _registered(name) is not None and _registered(name) == _registered(wanted):
                    return name
            if self.computes and _registered(wanted):
                return _registered(wanted)
        return names[0] if len(names) == 1 else None

    def pairs(self, condition: str | None = None) -> tuple[list[tuple[str, Pair]], list[str]]:
        """`(where, pair)` of every record, and the problems, those of records without this condition among them.

        Raises:
            UserError: there are several conditions, and `condition` is none of them.
        """
        name = self.chosen(condition)
        if name is None and (self.records or not self.problems):
            raise self._ambiguous(condition)
        found, problems = [], list(self.problems)
        asked = _wanted(condition)
        kind = (asked and _registered(asked)) or _registered(short_name(str(name)))
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
            pair = Pair(
                source=source,
                target=record.image,
                prompt=record.prompt,
                more_prompts=record.captions[1:],
                condition=kind,
                parameters=_made_with(record, str(name), source, kind),
            )
            found.append((record.where, pair))
        return found, problems

    def _ambiguous(self, condition: str | None) -> UserError:
        names = self.conditions
        if not self.records:
            return UserError(f"{self.origin} lists no pairs")
        if not names:
            return UserError(f"{self.origin} has images without condition images; make them with controlkit pairs")
        asked = ""
        if condition is not None and _wanted(condition) is not None:
            asked = f" and none is called {condition!r}{nearest(condition, names)}"
        choose = f"name one: {self.origin.parent if self.origin.is_file() else self.origin}/{names[0]}"
        return UserError(f"{self.origin} has the conditions {', '.join(names)}{asked}; {choose}")


def refuse(origin: object, problems: Sequence[str], advice: str = "mend or remove these entries") -> UserError:
    """The error that lists `problems`, the first of them at least."""
    more = f"\n... and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    listed = "\n".join(problems[:_SHOWN])
    return UserError(f"{len(problems)} problems in {origin}; {advice}:\n{listed}{more}")


def outside_note(origin: object, count: int, total: int, first: object) -> str:
    """What to say of files that a list finds outside of its folder."""
    return f"{count} of the {total} files that {origin} lists lie outside of its folder, such as {first}"


def short_name(column: str) -> str:
    """`canny` of `canny_file_name`, `conditioning_canny`, `canny_image`."""
    name = re.sub(r"_(file_name|path|image|images)$", "", column)
    return re.sub(r"^(control|conditioning|condition)_(?=.)", "", name)


def _made_with(record: Record, name: str, source: Source, kind: str | None) -> Mapping[str, Any]:
    """The parameters of the condition `kind` that its image was made with, as far as that is told."""
    if isinstance(source, ComputedCondition):
        return {**find(source.condition).defaults, **dict(source.parameters)}
    told = record.recorded("parameters", name)
    if kind is None or not isinstance(told, Mapping):
        return {}
    return {key: value for key, value in told.items() if key in find(kind).defaults}


def _wanted(condition: str | None) -> str | None:
    """What is asked for, in plain letters; None where it is nothing in particular."""
    return None if condition is None or _plain(condition) == "identity" else _plain(condition)


def _plain(name: str) -> str:
    return name.strip().lower().replace("-", "_")


def _registered(name: str) -> str | None:
    try:
        return find(name).name
    except UserError:
        return None
