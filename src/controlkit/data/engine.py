"""Make pairs from many images: resumable, with results independent of order, number of processes and engine."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from controlkit.conditions import find
from controlkit.data.edits import Edits
from controlkit.data.input_images import STATE, InputImage
from controlkit.data.jobs import PICTURES, FilesJob, Outcome, ShardJob, make_files, make_shard
from controlkit.data.making import MakeSettings
from controlkit.data.readers.archives import shard_name
from controlkit.data.readers.recognise import MANIFEST
from controlkit.data.workers import cores, refuse_to_run_again, run_jobs
from controlkit.errors import UserError
from controlkit.files import (
    locked,
    read_json,
    remove_leftovers,
    writable_folder,
    write_atomically,
    write_json,
)

ENGINES = ("local", "ray")
_MOST_IN_A_JOB = 32
_NAMED = 4
"""Keys named in a note."""
_ANNOTATED = ("bbox", "segments")
"""Conditions that draw annotated objects."""

Progress = Callable[[int, int], None]
"""Called with (images done, images in total)."""


@dataclass(frozen=True, kw_only=True)
class MakeReport:
    """Result of a run."""

    out: Path
    """The manifest, or the folder of the shards."""
    made: int
    """New pairs."""
    kept: int
    """Pairs of earlier runs."""
    gone: int
    """Pairs of earlier runs whose images are no longer in the input, and which the manifest no longer lists."""
    skipped: dict[str, str]
    """Image -> why it has no pair."""
    empty_prompts: int
    """Pairs without a caption."""
    seconds: float
    notes: list[str] = field(default_factory=list)
    """Of its pairs: parts of image files that were not used, and images that were much enlarged."""
    skipped_list: Path | None = None
    """A file that lists `skipped`; None if nothing was."""


def make_pairs(
    images: Sequence[InputImage],
    out: str | Path,
    settings: MakeSettings,
    *,
    workers: int | None = None,
    shards: int | None = None,
    engine: str = "local",
    origin: Sequence[str] = (),
    prompts: Mapping[str, str | None] | None = None,
    progress: Progress = lambda done, total: None,
) -> MakeReport:
    """Make the pairs of `images` in the folder `out`: files and `pairs.jsonl`, or `shards` tar shards.

    Unchanged pairs of earlier runs are kept. The manifest is written last.

    Args:
        workers: processes; None is one per core.
        shards: number of tar shards; None writes files.
        engine: `local`, or `ray` (Ray Data; writes shards).
        origin: the inputs that the images were listed from; one folder takes one set of inputs.
        prompts: how the prompts of `images` were made, recorded for `recorded_prompts`; None leaves the record.
        progress: called as images are finished.

    Raises:
        UserError: `out` was made with other settings, is not writable or in use by another run, its manifest was edited
            and cannot be parsed, no image can be read, or the calling script lacks `if __name__ == "__main__":`, so
            that every process would run it again.
    """
    refuse_to_run_again()
    started = time.monotonic()
    out, images = Path(out), sorted(images, key=lambda image: image.key)
    if engine not in ENGINES:
        raise UserError(f"engine is {engine!r}; expected one of {', '.join(ENGINES)}", "unknown-name")
    if engine == "ray" and shards is None:
        shards = max(1, min(len(images), 4 * cores()))
    if shards is not None and not 1 <= shards <= len(images):
        raise UserError(
            f"{shards} shards for {len(images)} images; choose a number from 1 to {len(images)}", "out-of-range"
        )
    _check_conditions(images, settings)
    if workers is None:
        has_detector = any(find(name).requires for name in settings.conditions)
        workers = 1 if has_detector else cores()
    gone = 0
    (writable_folder(out) / STATE).mkdir(parents=True, exist_ok=True)
    with locked(out / STATE / "lock", f"another run is writing to {out}; wait for it, or choose another --out"):
        new = not _settings_file(out).exists()
        settings = _merge_settings(out, settings, shards, origin, prompts)
        try:
            if shards is None:
                outcomes, made, gone = _files(images, out, settings, workers, progress)
            else:
                outcomes, made = _shards(images, out, settings, shards, workers, engine, progress)
            good = [outcome for outcome in outcomes if outcome.entry is not None]
            skipped = {outcome.name: str(outcome.error) for outcome in outcomes if outcome.entry is None}
            if not good:
                first = outcomes[0]
                raise UserError(
                    f"none of {len(images)} images gave a pair; the first: {first.error}",
                    "plugin-failed" if first.code == "plugin-failed" else "bad-image",
                )
        except BaseException:
            if new and not _has_results(out):  # leave the folder free for other inputs and settings
                for folder in _folders(out, settings, shards):  # empty before this run
                    shutil.rmtree(folder, ignore_errors=True)
                _settings_file(out).unlink(missing_ok=True)
            raise
    listed = _list_skipped(out, skipped)
    return MakeReport(
        out=out / MANIFEST if shards is None else out,
        made=made,
        kept=len(good) - made,
        gone=gone,
        skipped=skipped,
        empty_prompts=sum(not outcome.entry["prompt"] for outcome in good if outcome.entry),
        seconds=time.monotonic() - started,
        notes=[outcome.note for outcome in good if outcome.note],
        skipped_list=listed,
    )


def _list_skipped(out: Path, skipped: Mapping[str, str]) -> Path | None:
    path = out / STATE / "skipped.txt"
    if not skipped:
        path.unlink(missing_ok=True)
        return None
    text = "".join(f"{name}: {' '.join(reason.split())}\n" for name, reason in skipped.items())
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return path


def _check_conditions(images: Sequence[InputImage], settings: MakeSettings) -> None:
    """Raise early what would fail for every image."""
    for name in settings.conditions:
        condition = find(name)
        if condition.provided and name not in _ANNOTATED:
            raise UserError(
                f"{name} is for finished condition images, which are not computed: here they would be the images"
                " themselves; train from the finished pairs",
                "contradiction",
            )
        if settings.tiles and name in _ANNOTATED:
            raise UserError(f"{name} draws objects of whole images, which tiles do not have", "contradiction")
        if name in _ANNOTATED and not any((image.objects or {}).get(name) for image in images):
            raise UserError(
                f"{name} draws annotated objects; pass COCO's instances file (instances_*.json) too",
                "missing-companion",
            )
        if condition.requires is not None:
            condition(np.zeros((64, 64, 3), np.uint8))


def recorded_prompts(out: str | Path) -> dict[str, str | None]:
    """How the prompts of the pairs in a folder were made; empty if it records none."""
    path = _settings_file(Path(out))
    return dict(read_json(path).get("prompts") or {}) if path.is_file() else {}


def _merge_settings(
    out: Path,
    settings: MakeSettings,
    shards: int | None,
    origin: Sequence[str],
    prompts: Mapping[str, str | None] | None,
) -> MakeSettings:
    """The settings of this run plus the conditions of earlier ones, recorded in `out`.

    Raises:
        UserError: anything but the conditions differs, or the manifest has no settings beside it.
    """
    path = _settings_file(out)
    state: dict[str, Any] = {"settings": asdict(settings), "shards": shards, "origin": list(origin)}
    if recorded := recorded_prompts(out) if prompts is None else dict(prompts):
        state["prompts"] = recorded
    if path.is_file():
        before = read_json(path)
        earlier = MakeSettings(**{**before["settings"], "conditions": tuple(before["settings"]["conditions"])})
        different = earlier.differences(settings)
        if before["shards"] != shards:
            different.append(f"shards: {before['shards'] or 'none'} here, {shards or 'none'} now")
        if before["origin"] != list(origin):
            different.append(f"inputs: {', '.join(before['origin'])} here, {', '.join(origin)} now")
        if shards is not None and earlier.conditions != settings.conditions:
            different.append(f"conditions: {', '.join(earlier.conditions)} here, {', '.join(settings.conditions)} now")
        if different:
            raise UserError(
                f"{out} was made with other settings ({'; '.join(different)}); use the same, or choose another --out",
                "resume-mismatch",
            )
        added = [out / name for name in settings.conditions if name not in earlier.conditions and shards is None]
        if filled := [path for path in added if path.is_dir() and any(path.iterdir())]:
            raise UserError(f"{filled[0]} was not made by this command; choose another --out", "would-overwrite")
        settings = replace(settings, conditions=tuple(dict.fromkeys((*earlier.conditions, *settings.conditions))))
        state["settings"] = asdict(settings)
        if json.loads(json.dumps(state)) == before:
            return settings
    elif (found := _in_the_way(out, settings, shards)) is not None:
        raise UserError(f"{found} was not made by this command; choose another --out", "would-overwrite")
    write_json(path, state)
    return settings


def _folders(out: Path, settings: MakeSettings, shards: int | None) -> list[Path]:
    """The folders that a run writes images into; none for shards."""
    return [out / name for name in (*settings.conditions, PICTURES)] if shards is None else []


def _in_the_way(out: Path, settings: MakeSettings, shards: int | None) -> Path | None:
    """What is in a folder without settings and would be overwritten, or mixed with pairs."""
    files = [out / MANIFEST, *(out / shard_name(index, shards or 0) for index in range(shards or 0))]
    filled = (path for path in _folders(out, settings, shards) if path.is_dir() and any(path.iterdir()))
    return next((path for path in files if path.exists()), None) or next(filled, None)


def _settings_file(out: Path) -> Path:
    return out / STATE / "settings.json"


def _has_results(out: Path) -> bool:
    """Whether a run has finished a pair or a shard in `out`."""
    journal = out / STATE / "journal.jsonl"
    finished = journal.is_file() and journal.stat().st_size > 0
    return finished or any(path.name != "settings.json" for path in (out / STATE).glob("*.json"))


def _files(
    images: Sequence[InputImage], out: Path, settings: MakeSettings, workers: int, progress: Progress
) -> tuple[list[Outcome], int, int]:
    """Outcomes of all images in order, number of new pairs, and number of earlier pairs without an image."""
    shutil.rmtree(out / STATE / "aside", ignore_errors=True)
    journal = out / STATE / "journal.jsonl"
    before = {outcome.key: outcome for outcome in _read_journal(journal)}
    edits = Edits(out, list(before.values()))
    unchanged = {
        image.key: outcome
        for image in images
        if image.key in before and (outcome := before[image.key].if_current(image)) is not None
    }
    done = {key: edits.applied(outcome) for key, outcome in unchanged.items() if _is_complete(outcome, settings, out)}
    todo = [image for image in images if image.key not in done]
    progress(len(done), len(images))
    count = max(1, min(_MOST_IN_A_JOB, len(todo) // (4 * workers)))
    groups = [todo[first : first + count] for first in range(0, len(todo), count)]
    jobs = [FilesJob(images=group, settings=settings, out=out) for group in groups]
    kept = len(done)
    if jobs:
        with journal.open("a", encoding="utf-8") as stream:
            _end_truncated_line(journal, stream)
            for outcomes in run_jobs(make_files, jobs, workers):
                for outcome in map(edits.applied, outcomes):
                    done[outcome.key] = outcome
                    if outcome.entry is not None:
                        stream.write(json.dumps(vars(outcome), ensure_ascii=False) + "\n")
                stream.flush()
                progress(len(done), len(images))
    ordered = [done[image.key] for image in images]
    _note(
        edits.set_aside(ordered),
        f"prompts edited in {MANIFEST} are set aside, as their images or captions changed or are missing; they return"
        " when these do",
    )
    good = [outcome for outcome in ordered if outcome.entry is not None]
    stamped_anew = any(outcome.stamp != before[key].stamp for key, outcome in unchanged.items())
    complete = {outcome.key for outcome in good} == set(before) == edits.listed.keys()
    if edits.listed:
        _note(
            [key for key in before if key in done and done[key].entry is not None and key not in edits.listed],
            f"pairs that {MANIFEST} did not list are listed again; to leave pairs out, take their images out of the"
            " input",
        )
    if good and (len(good) > kept or stamped_anew or not complete):
        _write_lines(out / MANIFEST, (outcome.entry for outcome in good))
        _write_lines(journal, (vars(outcome) for outcome in good))
    return ordered, len(good) - kept, len(set(before) - {image.key for image in images})


def _note(keys: Sequence[str], what: str) -> None:
    """A note on standard error on the pairs with these keys, if there are any."""
    if keys:
        named = ", ".join(keys[:_NAMED]) + (f" and {len(keys) - _NAMED} more" if len(keys) > _NAMED else "")
        print(f"note: {len(keys)} {what}: {named}", file=sys.stderr, flush=True)


def _shards(
    images: Sequence[InputImage],
    out: Path,
    settings: MakeSettings,
    shards: int,
    workers: int,
    engine: str,
    progress: Progress,
) -> tuple[list[Outcome], int]:
    home = Path(os.path.abspath(out))  # Ray workers have another working directory
    ends = [round(index * len(images) / shards) for index in range(shards + 1)]
    jobs = [
        ShardJob(images=images[ends[index] : ends[index + 1]], settings=settings, path=home / shard_name(index, shards))
        for index in range(shards)
    ]
    finished = [job.finished() for job in jobs]
    outcomes = [outcome for shard in finished if shard is not None for outcome in shard]
    kept = sum(outcome.entry is not None for outcome in outcomes)
    todo = [job for job, shard in zip(jobs, finished, strict=True) if shard is None]
    progress(len(outcomes), len(images))
    for job in todo:
        remove_leftovers(job.path)
    for shard_outcomes in _run(todo, workers, engine):
        outcomes += shard_outcomes
        progress(len(outcomes), len(images))
    outcomes.sort(key=lambda outcome: outcome.key)
    return outcomes, sum(outcome.entry is not None for outcome in outcomes) - kept


def _run(jobs: Sequence[ShardJob], workers: int, engine: str) -> Iterator[list[Outcome]]:
    if engine == "ray" and jobs:
        from controlkit.data.ray_engine import run_with_ray

        return run_with_ray(make_shard, jobs, workers)
    return run_jobs(make_shard, jobs, workers)


def _is_complete(outcome: Outcome, settings: MakeSettings, out: Path) -> bool:
    """Whether an earlier outcome has all conditions of `settings` as they are now, and its files are there."""
    if outcome.entry is None or not set(settings.conditions) <= set(outcome.entry["conditions"]) or outcome.outdated:
        return False
    try:
        return all((out / name).stat().st_size == size for name, size in outcome.files.items())
    except OSError:
        return False


def _read_journal(path: Path) -> Iterator[Outcome]:
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            yield Outcome(**json.loads(line))
        except (json.JSONDecodeError, TypeError):
            continue  # the truncated last line of a killed run


def _end_truncated_line(path: Path, stream: TextIO) -> None:
    if path.stat().st_size:
        stream.write("\n")


def _write_lines(path: Path, values: Iterable[Any]) -> None:
    text = "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
