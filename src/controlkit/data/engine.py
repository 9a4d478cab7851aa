"""Making pairs of many images: resumable, the same whatever the order, the number of processes or the engine."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from controlkit.conditions import find
from controlkit.data.input_images import STATE, InputImage
from controlkit.data.jobs import FilesJob, Outcome, ShardJob, make_files, make_shard
from controlkit.data.making import MakeSettings
from controlkit.data.readers.archives import shard_name
from controlkit.data.readers.columns import captions_of
from controlkit.data.readers.recognise import MANIFEST
from controlkit.data.workers import cores, refuse_to_run_again, run_jobs
from controlkit.errors import UserError
from controlkit.files import (
    decode_text,
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
"""Keys that a note names."""

Progress = Callable[[int, int], None]
"""Called with (images done, images in all)."""


@dataclass(frozen=True, kw_only=True)
class MakeReport:
    """What a run did."""

    out: Path
    """The manifest, or the folder of the shards."""
    made: int
    """Pairs that this run made."""
    kept: int
    """Pairs that were there."""
    gone: int
    """Pairs that were there and whose images are not in the input any more; the manifest does not list them now."""
    skipped: dict[str, str]
    """Image -> why there is no pair of it."""
    empty_prompts: int
    """Pairs without a caption."""
    seconds: float
    notes: list[str] = field(default_factory=list)
    """What of the images' files was not used: all frames but the first."""


def make_pairs(
    images: Sequence[InputImage],
    out: str | Path,
    settings: MakeSettings,
    *,
    workers: int | None = None,
    shards: int | None = None,
    engine: str = "local",
    origin: Sequence[str] = (),
    progress: Progress = lambda done, total: None,
) -> MakeReport:
    """Make the pairs of `images` in the folder `out`: files and `pairs.jsonl`, or `shards` tar shards.

    What an earlier run finished is kept if nothing about it changed. The manifest comes last.

    Args:
        workers: processes; None takes one for each core.
        shards: how many tar shards; None makes files.
        engine: `local`, or `ray` (Ray Data; makes shards).
        origin: what the images were listed from, to refuse to mix inputs in one folder.

    Raises:
        UserError: settings contradict what is in `out`, it cannot be written, another run writes to it, its manifest
            was changed so that it cannot be read, no image can be read, or the calling script has no
            `if __name__ == "__main__":` and so would run again in every process.
    """
    refuse_to_run_again()
    started = time.monotonic()
    out, images = Path(out), sorted(images, key=lambda image: image.key)
    if engine not in ENGINES:
        raise UserError(f"engine is {engine!r}; it must be one of {', '.join(ENGINES)}")
    if engine == "ray" and shards is None:
        shards = max(1, min(len(images), 4 * cores()))
    if shards is not None and not 1 <= shards <= len(images):
        raise UserError(f"{shards} shards of {len(images)} images; give a number from 1 to {len(images)}")
    _refuse_what_cannot_be_drawn(images, settings)
    if workers is None:
        learned = any(find(name).requires for name in settings.conditions)
        workers = 1 if learned else cores()
    gone = 0
    (writable_folder(out) / STATE).mkdir(parents=True, exist_ok=True)
    with locked(out / STATE / "lock", f"another run is writing to {out}; wait for it, or give another --out"):
        new = not _settings_file(out).exists()
        settings = _agreed(out, settings, shards, origin)
        try:
            if shards is None:
                outcomes, made, gone = _files(images, out, settings, workers, progress)
            else:
                outcomes, made = _shards(images, out, settings, shards, workers, engine, progress)
            good = [outcome for outcome in outcomes if outcome.entry is not None]
            skipped = {outcome.name: str(outcome.error) for outcome in outcomes if outcome.entry is None}
            if not good:
                why = next(iter(skipped.values()))
                raise UserError(f"none of {len(images)} images can be read; the first: {why}")
        except BaseException:
            if new and not _has_results(out):  # nothing is there that another input or other settings could contradict
                _settings_file(out).unlink(missing_ok=True)
            raise
    return MakeReport(
        out=out / MANIFEST if shards is None else out,
        made=made,
        kept=len(good) - made,
        gone=gone,
        skipped=skipped,
        empty_prompts=sum(not outcome.entry["prompt"] for outcome in good if outcome.entry),
        seconds=time.monotonic() - started,
        notes=[outcome.note for outcome in good if outcome.note],
    )


def _refuse_what_cannot_be_drawn(images: Sequence[InputImage], settings: MakeSettings) -> None:
    """Say before any work what would fail for every image."""
    for name in settings.conditions:
        condition = find(name)
        if name in ("bbox", "segments") and not any((image.objects or {}).get(name) for image in images):
            raise UserError(f"{name} draws annotated objects; give COCO's instances file (instances_*.json) too")
        if condition.requires is not None:
            condition(np.zeros((64, 64, 3), np.uint8))


def _agreed(out: Path, settings: MakeSettings, shards: int | None, origin: Sequence[str]) -> MakeSettings:
    """The settings of this run with the conditions of earlier ones, which stay; recorded in `out`."""
    path = _settings_file(out)
    state: dict[str, Any] = {"settings": asdict(settings), "shards": shards, "origin": list(origin)}
    if path.is_file():
        before = read_json(path)
        earlier = MakeSettings(**{**before["settings"], "conditions": tuple(before["settings"]["conditions"])})
        different = earlier.differences(settings)
        if before["shards"] != shards:
            different.append(f"shards: {before['shards'] or 'none'} here, {shards or 'none'} now")
        if before["origin"] != list(origin):
            different.append(f"made from {', '.join(before['origin'])} here, {', '.join(origin)} now")
        if shards is not None and earlier.conditions != settings.conditions:
            different.append(f"conditions: {', '.join(earlier.conditions)} here, {', '.join(settings.conditions)} now")
        if different:
            raise UserError(
                f"{out} was made otherwise ({'; '.join(different)}); give another --out, or the same settings"
            )
        settings = replace(settings, conditions=tuple(dict.fromkeys((*earlier.conditions, *settings.conditions))))
        state["settings"] = asdict(settings)
        if json.loads(json.dumps(state)) == before:
            return settings
    elif (out / MANIFEST).exists():
        raise UserError(f"{out} has a {MANIFEST} that was not made here; give another --out")
    write_json(path, state)
    return settings


def _settings_file(out: Path) -> Path:
    return out / STATE / "settings.json"


def _has_results(out: Path) -> bool:
    """Whether a run has finished a pair or a shard here."""
    journal = out / STATE / "journal.jsonl"
    finished = journal.is_file() and journal.stat().st_size > 0
    return finished or any(path.name != "settings.json" for path in (out / STATE).glob("*.json"))


def _files(
    images: Sequence[InputImage], out: Path, settings: MakeSettings, workers: int, progress: Progress
) -> tuple[list[Outcome], int, int]:
    """Outcomes of all images in their order, how many pairs were made now, and how many have lost their image."""
    edited = _edited_prompts(out / MANIFEST)
    shutil.rmtree(out / STATE / "aside", ignore_errors=True)
    journal = out / STATE / "journal.jsonl"
    before = {outcome.key: outcome for outcome in _read_journal(journal)}

    def mended(outcome: Outcome) -> Outcome:
        """The outcome with the prompt that stands in the manifest, if neither image nor caption changed since."""
        known = before.get(outcome.key)
        if outcome.entry is None or outcome.key not in edited or known is None or known.stamp != outcome.stamp:
            return outcome
        return replace(outcome, entry={**outcome.entry, "prompt": edited[outcome.key]})

    fresh = {p.key: before[p.key] for p in images if p.key in before and _is_fresh(before[p.key], p, settings, out)}
    found = {key: mended(outcome) for key, outcome in fresh.items()}
    todo = [image for image in images if image.key not in found]
    progress(len(found), len(images))
    count = max(1, min(_MOST_IN_A_JOB, len(todo) // (4 * workers)))
    groups = [todo[first : first + count] for first in range(0, len(todo), count)]
    jobs = [FilesJob(images=group, settings=settings, out=out) for group in groups]
    kept = len(found)
    if jobs:
        with journal.open("a", encoding="utf-8") as stream:
            _end_torn_line(journal, stream)
            for outcomes in run_jobs(make_files, jobs, workers):
                for outcome in map(mended, outcomes):
                    found[outcome.key] = outcome
                    if outcome.entry is not None:
                        stream.write(json.dumps(vars(outcome), ensure_ascii=False) + "\n")
                stream.flush()
                progress(len(found), len(images))
    _tell_of_lost_edits(edited, before, found)
    ordered = [found[image.key] for image in images]
    good = [outcome for outcome in ordered if outcome.entry is not None]
    if good and (
        len(good) > kept or {outcome.key for outcome in good} != set(before) or not (out / MANIFEST).is_file()
    ):
        _write_lines(out / MANIFEST, (outcome.entry for outcome in good))
        _write_lines(journal, (vars(outcome) for outcome in good))
    return ordered, len(good) - kept, len(set(before) - {image.key for image in images})


def _tell_of_lost_edits(
    edited: dict[str, str | list[str]], before: dict[str, Outcome], found: dict[str, Outcome]
) -> None:
    """Say which prompts of the manifest give way to captions, since the image or its caption changed as well."""
    lost = []
    for key, outcome in found.items():
        entries = [each.entry for each in (before.get(key), outcome) if each is not None and each.entry is not None]
        if key in edited and entries and edited[key] not in [entry["prompt"] or "" for entry in entries]:
            lost.append(key)
    if lost:
        named = ", ".join(lost[:_NAMED]) + (f" and {len(lost) - _NAMED} more" if len(lost) > _NAMED else "")
        print(
            f"note: {len(lost)} prompts that were edited in {MANIFEST} are replaced, since their images or captions"
            f" changed, too: {named}",
            file=sys.stderr,
            flush=True,
        )


def _shards(
    images: Sequence[InputImage],
    out: Path,
    settings: MakeSettings,
    shards: int,
    workers: int,
    engine: str,
    progress: Progress,
) -> tuple[list[Outcome], int]:
    home = Path(os.path.abspath(out))  # workers of another engine may stand in another folder
    ends = [round(index * len(images) / shards) for index in range(shards + 1)]
    jobs = [
        ShardJob(images=images[ends[index] : ends[index + 1]], settings=settings, path=home / shard_name(index, shards))
        for index in range(shards)
    ]
    finished = [job.finished() for job in jobs]
    outcomes = [outcome for done in finished if done is not None for outcome in done]
    kept = sum(outcome.entry is not None for outcome in outcomes)
    todo = [job for job, done in zip(jobs, finished, strict=True) if done is None]
    progress(len(outcomes), len(images))
    for job in todo:
        remove_leftovers(job.path)
    for made in _run(todo, workers, engine):
        outcomes += made
        progress(len(outcomes), len(images))
    outcomes.sort(key=lambda outcome: outcome.key)
    return outcomes, sum(outcome.entry is not None for outcome in outcomes) - kept


def _run(jobs: Sequence[ShardJob], workers: int, engine: str) -> Iterator[list[Outcome]]:
    if engine == "ray" and jobs:
        from controlkit.data.ray_engine import run_with_ray

        return run_with_ray(make_shard, jobs, workers)
    return run_jobs(make_shard, jobs, workers)


def _is_fresh(outcome: Outcome, image: InputImage, settings: MakeSettings, out: Path) -> bool:
    if outcome.entry is None or outcome.stamp != image.stamp():
        return False
    if not set(settings.conditions) <= set(outcome.entry["conditions"]):
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
            continue  # the torn last line of a killed run


def _end_torn_line(path: Path, stream: TextIO) -> None:
    if path.stat().st_size:
        stream.write("\n")


def _edited_prompts(manifest: Path) -> dict[str, str | list[str]]:
    """Key -> the prompt (or the list of them) that stands in the manifest: somebody may have mended it there.

    Raises:
        UserError: a line cannot be read. It is not written over.
    """
    if not manifest.is_file():
        return {}
    prompts: dict[str, str | list[str]] = {}
    try:
        lines = decode_text(manifest.read_bytes()).split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{manifest} is not UTF-8 text any more ({error}); save it as UTF-8") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            captions = captions_of(entry["prompt"])
            prompts[str(entry["key"])] = captions[0] if len(captions) == 1 else list(captions)
        except (json.JSONDecodeError, KeyError, TypeError, UserError) as error:
            raise UserError(
                f"line {number} of {manifest} cannot be read ({error!r}); mend it, or remove it to have it made again"
            ) from error
    return prompts


def _write_lines(path: Path, values: Iterable[Any]) -> None:
    text = "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
