"""The last step of making nano: check what is staged, and move it into place, all of it or nothing."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pages import changed_figures, render
from results import Missing, Results
from workshop import ASSETS, IMAGES, RESULTS, Workshop

from controlkit.errors import UserError

MOST_BYTES = 36_000_000
"""What the assets may take together."""


def changes(workshop: Workshop) -> list[Path]:
    """The staged files that steps have made and that differ from those in place, relative to the root."""
    staged = (one for one in workshop.staged.rglob("*") if one.is_file() and not one.name.startswith("."))
    found = sorted(one.relative_to(workshop.staged) for one in staged)
    mine = (ASSETS / "nano", ASSETS / "controls", RESULTS, IMAGES)
    return [
        path
        for path in found
        if (path.suffix == ".md" or any(path.is_relative_to(folder) for folder in mine)) and workshop.is_made(path)
    ]


def scores(results: Results) -> dict[str, float]:
    """The scores by which one nano is held against another, by name; higher is better."""
    found: dict[str, float] = {}
    try:
        reports = results.run("base")["reports"]
        facts = {name: value for report in reports for name, value in report["facts"].items()}
        found["background colour"] = facts["colour_accuracy"]
        found["right concept among five"] = facts["retrieval_top5"]
        found["paired distance closed, trained concepts"] = 1 - reports[3]["facts"]["paired_share_left"]
    except Missing:
        pass
    for file in ("canny", "adapters"):
        try:
            facts = results.report(file, "control")["facts"]
        except Missing:
            continue
        for name, sets in facts.items() if file == "adapters" else [("canny", facts)]:
            for images, values in sets.items():
                found[f"{name}, {images}: gap closed"] = values["gap_closed"]
    return found


def lower_scores(before: dict[str, float], now: dict[str, float]) -> list[str]:
    """`name: before -> now` of the scores that fall or are gone, as the pages round them."""
    return [
        f"{name}: {value:.2f} -> {'missing' if name not in now else f'{now[name]:.2f}'}"
        for name, value in before.items()
        if name not in now or round(now[name], 2) < round(value, 2)
    ]


def problems(workshop: Workshop) -> list[str]:
    """What forbids to ship the staged assets."""
    from controlkit.formats.metadata import read_metadata

    found = []
    size = sum(path.stat().st_size for path in workshop.assets.rglob("*") if path.is_file())
    if size > MOST_BYTES:
        found.append(f"the assets take {size / 1e6:.1f} MB, more than {MOST_BYTES / 1e6:g}")
    controls = workshop.assets / "controls"
    base_control = controls / "nano" / "base.safetensors"
    shared = read_metadata(base_control).get("control.fingerprint") if base_control.is_file() else None
    for path in sorted(controls.rglob("*.safetensors")):
        name = path.relative_to(controls).with_suffix("").as_posix()
        if not workshop.fit(path)[1]:
            found.append(f"the control {name} was trained on another base")
        elif read_metadata(path).get("control.base_control_fingerprint", shared) != shared:
            found.append(f"the adapter {name} was trained on another base control")
    return found


def adopt(workshop: Workshop, unfinished: Sequence[str], *, accept_lower: bool) -> list[str]:
    """Check what is staged and move it into place; returns what changed, a line each.

    Args:
        unfinished: steps without whose results no weights are moved.
        accept_lower: move lower scores, too.

    Raises:
        UserError: a check fails; nothing was moved.
    """
    moved = changes(workshop)
    if not moved:
        return []
    failed: list[str] = []
    for path in filter(workshop.is_edited, moved):
        if path.suffix == ".md" and (workshop.root / path).is_file():
            _write_figures(workshop, path)
        else:
            failed.append(_both_changed(workshop, path))
    before, now = (scores(Results(root / RESULTS)) for root in (workshop.root, workshop.staged))
    lower = lower_scores(before, now)
    # Figures of the weights that are in place may come one by one; new weights come with all that follows from them.
    if any(path.is_relative_to(ASSETS) and path.suffix != ".md" for path in moved):
        failed += problems(workshop)
        failed += [f"{name} is not finished (run again, or --leave {name})" for name in unfinished]
    if lower and not accept_lower:
        failed += [f"{one} (--accept-lower takes it)" for one in lower]
    if failed:
        raise UserError("nothing was moved into place:\n" + "\n".join(f"  {one}" for one in failed), "would-overwrite")
    told = [f"{name}: {before[name]:.3f} -> {value:.3f}" for name, value in now.items() if name in before]
    for path in moved:
        old, new = workshop.root / path, workshop.staged / path
        if path.suffix == ".md" and old.is_file():
            figures = changed_figures(old.read_text(encoding="utf-8"), new.read_text(encoding="utf-8"))
            told += [f"{path}: {figure}" for figure in figures]
        else:
            told.append(f"{path}: {'new' if not old.exists() else 'replaced'}, {new.stat().st_size:,} bytes")
    _move(workshop, moved)
    return told


def _write_figures(workshop: Workshop, path: Path) -> None:
    """Stage the page in place, which was edited since its copy was made, with the figures of the staged results."""
    results = Results(workshop.results, (workshop.root / RESULTS).parent)
    text, _ = render((workshop.root / path).read_text(encoding="utf-8"), results, str(path))
    (workshop.staged / path).write_text(text, encoding="utf-8")


def _both_changed(workshop: Workshop, path: Path) -> str:
    staged = (workshop.staged / path).relative_to(workshop.root)
    return f"{path} was edited, and made anew in {staged}; copy the one to keep over the other, and run again"


def _move(workshop: Workshop, paths: Sequence[Path]) -> None:
    """Replace files; if one cannot be, those before it are put back."""
    with tempfile.TemporaryDirectory(dir=workshop.work, prefix=".adopting-") as folder:
        copies = Path(folder) / "new"
        for path in paths:  # first all that can fail for want of space
            (copies / path).parent.mkdir(parents=True, exist_ok=True)
            (workshop.root / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(workshop.staged / path, copies / path)
        kept: list[tuple[Path, Path | None]] = []
        try:
            for path in paths:
                place, old = workshop.root / path, Path(folder) / "old" / path
                if place.exists():
                    old.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(place, old)
                kept.append((place, old if place.exists() else None))
                os.replace(copies / path, place)
        except BaseException:
            for place, before in kept:
                if before is None:
                    place.unlink(missing_ok=True)
                else:
                    os.replace(before, place)
            raise
