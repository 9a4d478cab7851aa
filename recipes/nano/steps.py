"""Named steps with inputs and outputs, of which only those run whose inputs have changed.

What was run is kept in one JSON file: for each step the content of its inputs and outputs and its settings. Time stamps
do not count.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from controlkit.errors import UserError, nearest
from controlkit.files import read_json, sha256_of, write_json


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a step."""

    complete: bool = True
    """Whether it is done; a step that is not runs again next time, and its outputs are used meanwhile."""
    note: str = ""
    """What a person should know."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of a plan. A step comes after those whose outputs it reads."""

    name: str
    what: str
    """In a few words, for the plan."""
    outputs: tuple[Path, ...]
    """Files or folders that it writes."""
    run: Callable[[], Outcome]
    inputs: tuple[Path, ...] = ()
    """Files or folders that it reads."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Plain values that decide the outputs besides the inputs."""
    version: int = 1
    """To be raised when the code of the step changes what it writes."""
    minutes: float = 1.0
    """Estimate on two CPU cores."""
    training: bool = False
    """Whether it trains: it is limited by the budget, and an unfinished result is used."""
    starts: bool = False
    """Whether a training starts from a file that was given or that ships, if nothing is here to resume from."""
    intermediate: bool = False
    """Whether its outputs are only read by other steps, so that they may be missing while none of those runs and none
    asks for it by name."""
    data: bool = False
    """Whether outputs that are there without a record are taken as they are. With `intermediate`, a step without a
    record runs only where they are missing and another step needs them."""
    optional_inputs: bool = False
    """Whether it runs without inputs that are missing."""

    @property
    def settings_digest(self) -> str:
        """Hash of settings and version."""
        return sha256_of(json.dumps({"version": self.version, **self.settings}, sort_keys=True, default=str))


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A step, and whether it is going to run."""

    step: Step
    runs: bool
    why: str
    needed: bool = False
    """Whether its outputs have to be there: it was asked for by name, or a step that runs reads them."""


SHIPPED = "shipped"
"""Key of a record that ships: its step was run elsewhere, so nothing is here to resume from."""


class Records:
    """What is known of the steps that were run.

    Args:
        root: paths are recorded relative to it.
        path: the file that is written.
        shipped: a file of records to begin with where there is none at `path`.
    """

    def __init__(self, root: Path, path: Path, shipped: Path | None = None) -> None:
        self.root = root
        self.path = path
        known = path if path.is_file() or shipped is None else shipped
        self.values: dict[str, Any] = read_json(known)["steps"] if known.is_file() else {}
        if known == shipped:
            self.values = {name: {**value, SHIPPED: True} for name, value in self.values.items()}

    def name(self, path: Path) -> str:
        """`path` as it is recorded."""
        return path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else str(path)

    def write(self, step: Step, outcome: Outcome, seconds: float) -> None:
        """Record that a step was run."""
        self.values[step.name] = {
            "inputs": {self.name(path): digest(path) for path in step.inputs},
            "settings": step.settings_digest,
            "outputs": {self.name(path): digest(path) for path in step.outputs},
            "complete": outcome.complete,
            "note": outcome.note,
            "minutes": round(seconds / 60, 2),
        }
        write_json(self.path, {"steps": self.values})

    def is_complete(self, step: Step) -> bool:
        """Whether the last run of a step did all of it."""
        return bool(self.values.get(step.name, {}).get("complete"))

    def note(self, step: Step) -> str:
        """The note of the last run; none of a run elsewhere."""
        known = self.values.get(step.name, {})
        return "" if known.get(SHIPPED) else str(known.get("note", ""))

    def minutes(self, step: Step) -> float:
        """What a step takes: its estimate, or what it took last time if that is longer (a resumed run took less)."""
        return max(float(self.values[step.name]["minutes"]), step.minutes) if self.is_complete(step) else step.minutes

    def contents(self, step: Step) -> dict[str, str | None]:
        """Recorded path => content of a step's outputs when they were last written, or else last read."""
        if step.name in self.values:
            return dict(self.values[step.name]["outputs"])
        names = {self.name(path) for path in step.outputs}
        return {
            name: content
            for known in self.values.values()
            for name, content in known["inputs"].items()
            if name in names
        }


def digest(path: Path) -> str | None:
    """Hash of a file's content, or of the names and contents of a folder's files; None if it is missing.

    The order of a safetensors file's header does not count: the library writes its metadata in any order.
    """
    if path.is_file() and path.suffix == ".safetensors":
        with path.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
            tensors = hashlib.file_digest(stream, "sha256").hexdigest()
        return sha256_of(json.dumps(header, sort_keys=True), tensors)
    if path.is_file():
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    if not path.is_dir():
        return None
    files = sorted(one for one in path.rglob("*") if one.is_file() and not one.name.startswith("."))
    return sha256_of(*(part for one in files for part in (one.relative_to(path).as_posix(), digest(one) or "")))


def outdated(step: Step, records: Records, stand_in: Mapping[str, str | None] | None = None) -> str | None:
    """Why a step has to run; None if it does not.

    Args:
        stand_in: recorded path => content, for inputs that are missing because nothing needed them.
    """
    known = records.values.get(step.name)
    there = {records.name(path): digest(path) for path in step.outputs}
    if known is None:
        return None if step.data and (step.intermediate or None not in there.values()) else "never run"
    if known["settings"] != step.settings_digest:
        return "its settings changed"
    for path in step.inputs:
        name = records.name(path)
        now = digest(path)
        if now is None and stand_in is not None:
            now = stand_in.get(name)
        if now != known["inputs"].get(name):
            return f"{name} {'is missing' if now is None else 'changed'}"
    if not known["complete"]:
        if known.get(SHIPPED):
            return "unfinished; starts from the one that ships" if step.starts else "unfinished; starts anew"
        return known["note"] or "unfinished"
    for name, now in there.items():
        if now is None and not step.intermediate:
            return f"{name} is missing"
        if now is not None and now != known["outputs"].get(name):
            return f"{name} was changed"
    return None


def plan(
    steps: Sequence[Step], records: Records, *, only: Iterable[str] = (), leave: Iterable[str] = ()
) -> list[Planned]:
    """Which steps run, and why, in order.

    Args:
        only: names of the steps that may run; none for all.
        leave: names of steps that do not.

    Raises:
        UserError: a name is of no step.
    """
    only, leave = set(only), set(leave)
    names = [step.name for step in steps]
    for name in sorted(only | leave):
        if name not in names:
            raise UserError(f"there is no step called {name!r}{nearest(name, names)}", "unknown-name")
    why: dict[str, str] = {}
    makers = {path: step for step in steps for path in step.outputs}
    stand_in: dict[str, str | None] = {}
    for step in steps:
        if step.name in leave or (only and step.name not in only):
            continue
        makers_of_it = (makers.get(path) for path in step.inputs)
        before = next((maker.name for maker in makers_of_it if maker is not None and maker.name in why), None)
        reason = f"after {before}" if before else outdated(step, records, stand_in)
        lost = next((path for path in step.outputs if not path.exists()), None)
        if reason is None and lost is not None and step.name in only:
            reason = f"{lost.name} is missing"
        if reason is not None:
            why[step.name] = reason
        elif step.intermediate:
            stand_in |= records.contents(step)
    needed = {name for name in only if name in why}
    for step in reversed(steps):  # what a step reads has to be there when it runs
        for path in step.inputs if step.name in why and not step.optional_inputs else ():
            maker = makers.get(path)
            if maker is not None and not path.exists() and maker.name not in leave:
                why.setdefault(maker.name, f"{step.name} needs it")
                needed.add(maker.name)
    return [
        Planned(
            step=step,
            runs=step.name in why,
            why=why.get(step.name) or _why_not(step, only, leave),
            needed=step.name in needed,
        )
        for step in steps
    ]


def _why_not(step: Step, only: set[str], leave: set[str]) -> str:
    if step.name in leave:
        return "left as it is"
    return "not asked for" if only and step.name not in only else "up to date"


def run_plan(planned: Sequence[Planned], records: Records, say: Callable[[str], None]) -> None:
    """Run the steps of a plan in order; one whose inputs turn out as they were is skipped after all.

    Raises:
        UserError: an input is missing, a step fails, or it does not write an output.
    """
    for one in planned:
        step = one.step
        if not one.runs:
            continue
        there = all(path.exists() for path in step.outputs)
        if one.why.startswith("after ") and outdated(step, records) is None and (there or not one.needed):
            say(f"{step.name}: up to date")
            continue
        missing = [records.name(path) for path in step.inputs if not path.exists()]
        if missing and not step.optional_inputs:
            raise UserError(f"{step.name} needs {', '.join(missing)}; run the steps before it too", "missing-file")
        say(f"{step.name}: {step.what} ({one.why})")
        started = time.monotonic()
        outcome = step.run()
        missing = [records.name(path) for path in step.outputs if not path.exists()]
        if missing and outcome.complete:
            raise UserError(f"{step.name} did not write {', '.join(missing)}", "missing-file")
        records.write(step, outcome, time.monotonic() - started)
        if outcome.note:
            say(f"{step.name}: {outcome.note}")


def plan_table(planned: Sequence[Planned], records: Records) -> tuple[list[tuple[str, str, str, str]], float]:
    """Rows (step, whether it runs and why, minutes, what it does), and the minutes of all that run."""
    rows = []
    for one in planned:
        minutes = f"{records.minutes(one.step):.0f} min" if one.runs else ""
        rows.append((one.step.name, f"{'runs' if one.runs else 'skipped'}: {one.why}", minutes, one.step.what))
    return rows, sum(records.minutes(one.step) for one in planned if one.runs)
