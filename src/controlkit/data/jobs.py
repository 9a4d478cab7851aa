"""The units of work of making pairs: some images into a folder, or into one tar shard.

Both are functions of plain values, so that any engine can run them anywhere and again after a failure.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from controlkit.data.input_images import STATE, InputImage
from controlkit.data.making import EncodedPair, MakeSettings, make_pair
from controlkit.data.readers.archives import write_tar
from controlkit.data.workers import sign_of_life
from controlkit.errors import UserError
from controlkit.files import read_json, sha256_of, write_json

_VERSION = "1"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one image."""

    key: str
    name: str
    stamp: str
    """The image's, when it was read."""
    entry: dict[str, Any] | None = None
    """Its line in the manifest; None if it was skipped."""
    files: dict[str, int] = field(default_factory=dict)
    """Path below the folder -> bytes."""
    error: str | None = None
    """Why it was skipped."""
    note: str | None = None
    """What of its file was not used."""


@dataclass(frozen=True, kw_only=True)
class FilesJob:
    """Some images whose pairs become files in a folder."""

    images: Sequence[InputImage]
    settings: MakeSettings
    out: Path

    def __str__(self) -> str:
        return _from_to(self.images)


@dataclass(frozen=True, kw_only=True)
class ShardJob:
    """Some images, ordered by key, whose pairs become one tar shard."""

    images: Sequence[InputImage]
    settings: MakeSettings
    path: Path

    def __str__(self) -> str:
        return _from_to(self.images)

    @property
    def key(self) -> str:
        """Changes with everything that the shard's bytes follow from."""
        content = (f"{image.key} {image.stamp()}" for image in self.images)
        return sha256_of(_VERSION, repr(self.settings), *content)

    @property
    def record(self) -> Path:
        """The file that says that the shard is finished, written after it."""
        return self.path.parent / STATE / f"{self.path.stem}.json"

    def finished(self) -> list[Outcome] | None:
        """What became of its images, if the shard on disk is this job's."""
        try:
            record = read_json(self.record)
            if record["key"] == self.key and self.path.stat().st_size == record["bytes"]:
                return [Outcome(**outcome) for outcome in record["outcomes"]]
        except (UserError, OSError, KeyError, TypeError):
            return None
        return None

    def to_json(self) -> str:
        """For another machine."""
        images = [image.to_json() for image in self.images]
        return json.dumps({"pictures": images, "settings": asdict(self.settings), "path": str(self.path)})

    @classmethod
    def from_json(cls, text: str) -> ShardJob:
        """What `to_json` gave."""
        values = json.loads(text)
        settings = MakeSettings(**{**values["settings"], "conditions": tuple(values["settings"]["conditions"])})
        images = [InputImage.from_json(image) for image in values["pictures"]]
        return cls(images=images, settings=settings, path=Path(values["path"]))


def make_files(job: FilesJob) -> list[Outcome]:
    """Make the pairs of a job as files; a file of the final name is always whole.

    Raises:
        UserError: the folder cannot be written. (Images that cannot be read are skipped, and said so.)
    """
    outcomes = []
    home = os.path.realpath(job.out)
    for image in job.images:
        made = _made(image, job.settings)
        if isinstance(made, Outcome):
            outcomes.append(made)
            continue
        entry, files = _placed(made, image, job.out, home)
        for name, data in files.items():
            _write(job.out, name, data)
        sizes = {name: len(data) for name, data in files.items()}
        outcome = Outcome(key=image.key, name=image.name, stamp=image.stamp(), entry=entry, files=sizes)
        outcomes.append(replace(outcome, note=made.note))
    return outcomes


def make_shard(job: ShardJob) -> list[Outcome]:
    """Make the pairs of a job as one tar shard, unless it is there already.

    The shard appears whole or not at all, and its bytes follow from the job: run twice, or killed and run again, it
    leaves what one run leaves.

    Raises:
        UserError: the folder cannot be written.
    """
    before = job.finished()
    if before is not None:
        return before
    outcomes: list[Outcome] = []
    settings = replace(job.settings, copy=True)

    def members() -> Iterator[tuple[str, bytes]]:
        for image in job.images:
            made = _made(image, settings)
            if isinstance(made, Outcome):
                outcomes.append(made)
                continue
            assert made.image is not None
            yield f"{image.key}.{made.suffix}", made.image
            for name, data in sorted(made.conditions.items()):
                yield f"{image.key}.{name}.png", data
            yield f"{image.key}.txt", made.entry["prompt"].encode()
            yield f"{image.key}.json", json.dumps(made.entry, ensure_ascii=False, sort_keys=True).encode()
            outcome = Outcome(key=image.key, name=image.name, stamp=image.stamp(), entry=made.entry)
            outcomes.append(replace(outcome, note=made.note))

    write_tar(job.path, members())
    size = job.path.stat().st_size
    write_json(job.record, {"key": job.key, "bytes": size, "outcomes": [vars(outcome) for outcome in outcomes]})
    return outcomes


def _made(image: InputImage, settings: MakeSettings) -> EncodedPair | Outcome:
    try:
        return make_pair(image, settings)
    except UserError as error:
        return Outcome(key=image.key, name=image.name, stamp=image.stamp(), error=str(error))
    finally:
        sign_of_life()


def _from_to(images: Sequence[InputImage]) -> str:
    names = [images[0].name] if len(images) == 1 else [images[0].name, images[-1].name]
    return " to ".join(names)


def _placed(pair: EncodedPair, image: InputImage, out: Path, home: str) -> tuple[dict[str, Any], Mapping[str, bytes]]:
    """The manifest's entry of a pair in the folder `out`, truly at `home`, and its files by their path below `out`."""
    places = {name: f"{name}/{image.key}.png" for name in pair.conditions}
    files = {places[name]: data for name, data in pair.conditions.items()}
    if pair.image is None:
        assert isinstance(image.source, Path)
        real = os.path.realpath(image.source)
        try:
            where = os.path.relpath(real, home)
        except ValueError:  # on another drive of Windows
            where = real
        where = where.replace(os.sep, "/")
    else:
        where = f"pictures/{image.key}.{pair.suffix}"
        files[where] = pair.image
    return {"key": image.key, "picture": where, "conditions": places, **pair.entry}, files


def _write(out: Path, name: str, data: bytes) -> None:
    """Write a file so that its name never stands for a part of it. Not flushed to the disk one by one, which would take
    most of the time; hashes in the manifest tell what a power cut left."""
    path = os.path.join(out, name)
    aside = os.path.join(out, STATE, "aside", f"{os.getpid()}-{sha256_of(name)[:16]}")
    try:
        try:
            _write_and_rename(aside, path, data)
        except FileNotFoundError:  # folders are there but for the first time, so they are not asked for each time
            for folder in (os.path.dirname(path), os.path.dirname(aside)):
                os.makedirs(folder, exist_ok=True)
            _write_and_rename(aside, path, data)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; choose a folder that can be written"
        ) from error


def _write_and_rename(aside: str, path: str, data: bytes) -> None:
    with open(aside, "wb", buffering=0) as stream:
        left = memoryview(data)
        while left:
            left = left[stream.write(left) :]
    os.replace(aside, path)
