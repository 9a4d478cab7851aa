"""The units of work of making pairs: some pictures into a folder, or into one tar shard.

Both are functions of plain values, so that any engine can run them anywhere and again after a failure.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from controlkit.data.making import MadePair, MakeSettings, make_pair
from controlkit.data.pictures import STATE, Picture
from controlkit.data.shards import write_tar
from controlkit.data.workers import sign_of_life
from controlkit.errors import UserError
from controlkit.files import read_json, sha256_of, write_json

_VERSION = "1"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one picture."""

    key: str
    name: str
    stamp: str
    """The picture's, when it was read."""
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
    """Some pictures whose pairs become files in a folder."""

    pictures: Sequence[Picture]
    settings: MakeSettings
    out: Path

    def __str__(self) -> str:
        return _from_to(self.pictures)


@dataclass(frozen=True, kw_only=True)
class ShardJob:
    """Some pictures, ordered by key, whose pairs become one tar shard."""

    pictures: Sequence[Picture]
    settings: MakeSettings
    path: Path

    def __str__(self) -> str:
        return _from_to(self.pictures)

    @property
    def key(self) -> str:
        """Changes with everything that the shard's bytes follow from."""
        content = (f"{picture.key} {picture.stamp()}" for picture in self.pictures)
        return sha256_of(_VERSION, repr(self.settings), *content)

    @property
    def record(self) -> Path:
        """The file that says that the shard is finished, written after it."""
        return self.path.parent / STATE / f"{self.path.stem}.json"

    def finished(self) -> list[Outcome] | None:
        """What became of its pictures, if the shard on disk is this job's."""
        try:
            record = read_json(self.record)
            if record["key"] == self.key and self.path.stat().st_size == record["bytes"]:
                return [Outcome(**outcome) for outcome in record["outcomes"]]
        except (UserError, OSError, KeyError, TypeError):
            return None
        return None

    def to_json(self) -> str:
        """For another machine."""
        pictures = [picture.to_json() for picture in self.pictures]
        return json.dumps({"pictures": pictures, "settings": asdict(self.settings), "path": str(self.path)})

    @classmethod
    def from_json(cls, text: str) -> ShardJob:
        """What `to_json` gave."""
        values = json.loads(text)
        settings = MakeSettings(**{**values["settings"], "conditions": tuple(values["settings"]["conditions"])})
        pictures = [Picture.from_json(picture) for picture in values["pictures"]]
        return cls(pictures=pictures, settings=settings, path=Path(values["path"]))


def make_files(job: FilesJob) -> list[Outcome]:
    """Make the pairs of a job as files; a file of the final name is always whole.

    Raises:
        UserError: the folder cannot be written. (Pictures that cannot be read are skipped, and said so.)
    """
    outcomes = []
    home = os.path.realpath(job.out)
    for picture in job.pictures:
        made = _made(picture, job.settings)
        if isinstance(made, Outcome):
            outcomes.append(made)
            continue
        entry, files = _placed(made, picture, job.out, home)
        for name, data in files.items():
            _write(job.out, name, data)
        sizes = {name: len(data) for name, data in files.items()}
        outcome = Outcome(key=picture.key, name=picture.name, stamp=picture.stamp(), entry=entry, files=sizes)
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
        for picture in job.pictures:
            made = _made(picture, settings)
            if isinstance(made, Outcome):
                outcomes.append(made)
                continue
            assert made.picture is not None
            yield f"{picture.key}.{made.suffix}", made.picture
            for name, data in sorted(made.conditions.items()):
                yield f"{picture.key}.{name}.png", data
            yield f"{picture.key}.txt", made.entry["prompt"].encode()
            yield f"{picture.key}.json", json.dumps(made.entry, ensure_ascii=False, sort_keys=True).encode()
            outcome = Outcome(key=picture.key, name=picture.name, stamp=picture.stamp(), entry=made.entry)
            outcomes.append(replace(outcome, note=made.note))

    write_tar(job.path, members())
    size = job.path.stat().st_size
    write_json(job.record, {"key": job.key, "bytes": size, "outcomes": [vars(outcome) for outcome in outcomes]})
    return outcomes


def _made(picture: Picture, settings: MakeSettings) -> MadePair | Outcome:
    try:
        return make_pair(picture, settings)
    except UserError as error:
        return Outcome(key=picture.key, name=picture.name, stamp=picture.stamp(), error=str(error))
    finally:
        sign_of_life()


def _from_to(pictures: Sequence[Picture]) -> str:
    names = [pictures[0].name] if len(pictures) == 1 else [pictures[0].name, pictures[-1].name]
    return " to ".join(names)


def _placed(pair: MadePair, picture: Picture, out: Path, home: str) -> tuple[dict[str, Any], Mapping[str, bytes]]:
    """The manifest's entry of a pair in the folder `out`, truly at `home`, and its files by their path below `out`."""
    places = {name: f"{name}/{picture.key}.png" for name in pair.conditions}
    files = {places[name]: data for name, data in pair.conditions.items()}
    if pair.picture is None:
        assert isinstance(picture.source, Path)
        real = os.path.realpath(picture.source)
        try:
            where = os.path.relpath(real, home)
        except ValueError:  # on another drive of Windows
            where = real
        where = where.replace(os.sep, "/")
    else:
        where = f"pictures/{picture.key}.{pair.suffix}"
        files[where] = pair.picture
    return {"key": picture.key, "picture": where, "conditions": places, **pair.entry}, files


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
