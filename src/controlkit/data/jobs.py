"""Units of work for making pairs: some images into a folder, or into one tar shard.

Jobs are plain values and idempotent, so any engine can run them anywhere and again after a failure.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from controlkit.conditions import find
from controlkit.data.input_images import STATE, InputImage
from controlkit.data.making import EncodedPair, MakeSettings, make_pair, sha256
from controlkit.data.readers.archives import write_tar
from controlkit.data.workers import sign_of_life
from controlkit.errors import UserError, is_out_of_memory
from controlkit.files import read_json, sha256_of, write_json

_VERSION = "1"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Result for one image."""

    key: str
    name: str
    stamp: str
    """`InputImage.stamp` when the image was read."""
    entry: dict[str, Any] | None = None
    """Its line in the manifest; None if it was skipped."""
    files: dict[str, int] = field(default_factory=dict)
    """Path below the folder -> size in bytes."""
    error: str | None = None
    """Why it was skipped."""
    note: str | None = None
    """As `EncodedPair.note`."""
    subject: str | None = None
    """`InputImage.content` without a default prompt, to which edits of the prompt belong; None as `content`."""
    edited: bool = False
    """Whether the prompt of `entry` was edited in the manifest."""
    content: str | None = None
    """`InputImage.content` when the image was read; None if it was skipped, and in records of earlier versions."""
    code: str | None = None
    """Code of `error`; None for an unexpected one, and in records of earlier versions."""
    conditions: dict[str, str] = field(default_factory=dict)
    """Condition -> its `revision`; empty in records of earlier versions, whose condition images are kept."""

    @property
    def outdated(self) -> list[str]:
        """Its conditions whose code, defaults or weights changed since."""
        return [name for name, revision in self.conditions.items() if find(name).revision != revision]

    def if_current(self, image: InputImage) -> Outcome | None:
        """This outcome with the present stamp of `image`; None if the image or its caption changed since.

        If only the stamp differs (files were copied, or their permissions changed), the image is read and compared.
        """
        stamp = image.stamp()
        if stamp == self.stamp:
            return self
        if self.entry is None:
            return None
        try:
            digest = sha256(image.source.read_bytes())
            content = image.content(digest, image.caption())
        except (OSError, UserError):  # making the pair reports it
            return None
        if self.content is None:
            same = digest == self.entry["original"]["sha256"] and self.stamp == image.former_stamp()
        else:
            same = content == self.content
        return replace(self, stamp=stamp, content=content) if same else None


@dataclass(frozen=True, kw_only=True)
class FilesJob:
    """Images whose pairs are written as files."""

    images: Sequence[InputImage]
    settings: MakeSettings
    out: Path

    def __str__(self) -> str:
        return _from_to(self.images)


@dataclass(frozen=True, kw_only=True)
class ShardJob:
    """Images, ordered by key, whose pairs are written as one tar shard."""

    images: Sequence[InputImage]
    settings: MakeSettings
    path: Path

    def __str__(self) -> str:
        return _from_to(self.images)

    @property
    def record(self) -> Path:
        """Completion record of the shard, written after it."""
        return self.path.parent / STATE / f"{self.path.stem}.json"

    def finished(self) -> list[Outcome] | None:
        """Results for its images, if the shard on disk is the result of this job."""
        try:
            record = read_json(self.record)
            outcomes = [Outcome(**outcome) for outcome in record["outcomes"]]
            if record["key"] != self._key(outcomes) or self.path.stat().st_size != record["bytes"]:
                return None
        except (UserError, OSError, KeyError, TypeError):
            return None
        if [outcome.key for outcome in outcomes] != [image.key for image in self.images]:
            return None
        current: list[Outcome] = []
        for outcome, image in zip(outcomes, self.images, strict=True):
            same = outcome.if_current(image)
            # An unchanged file that is no image stays one; other reasons, such as permissions, may be gone.
            if same is None or same.outdated or (same.error is not None and same.code != "bad-image"):
                return None
            current.append(same)
        if current != outcomes:
            self.write_record(current)
        return current

    def write_record(self, outcomes: Sequence[Outcome]) -> None:
        """Record that the shard on disk is complete.

        Raises:
            UserError: the folder is not writable.
        """
        values = [vars(outcome) for outcome in outcomes]
        size = self.path.stat().st_size
        write_json(self.record, {"key": self._key(outcomes), "bytes": size, "outcomes": values})

    def _key(self, outcomes: Iterable[Outcome]) -> str:
        """Hash of everything that determines the shard's bytes."""
        content = (f"{outcome.key} {outcome.stamp}" for outcome in outcomes)
        return sha256_of(_VERSION, repr(self.settings), *content)

    def to_json(self) -> str:
        """Serialise for another machine."""
        images = [image.to_json() for image in self.images]
        return json.dumps({"pictures": images, "settings": asdict(self.settings), "path": str(self.path)})

    @classmethod
    def from_json(cls, text: str) -> ShardJob:
        """Inverse of `to_json`."""
        values = json.loads(text)
        settings = MakeSettings(**{**values["settings"], "conditions": tuple(values["settings"]["conditions"])})
        images = [InputImage.from_json(image) for image in values["pictures"]]
        return cls(images=images, settings=settings, path=Path(values["path"]))


PICTURES = "pictures"
"""Folder of images that are copied, or differ from the original."""


def make_files(job: FilesJob) -> list[Outcome]:
    """Write the pairs of a job as files; a file under its final name is always complete.

    Raises:
        UserError: the folder is not writable. (Unreadable images are skipped; the outcome has the reason.)
    """
    outcomes = []
    home = os.path.realpath(job.out)
    for image in job.images:
        outcome, pair = _make_or_skip(image, job.settings)
        if pair is not None:
            entry, files = _entry_and_files(pair, image, job.out, home)
            for name, data in files.items():
                _write(job.out, name, data)
            outcome = replace(outcome, entry=entry, files={name: len(data) for name, data in files.items()})
        outcomes.append(outcome)
    return outcomes


def make_shard(job: ShardJob) -> list[Outcome]:
    """Write the pairs of a job as one tar shard, unless it is finished already.

    The shard is written atomically and its bytes depend on the job alone: running a job twice, or again after a kill,
    gives the same file.

    Raises:
        UserError: the folder is not writable.
    """
    before = job.finished()
    if before is not None:
        return before
    outcomes: list[Outcome] = []
    settings = replace(job.settings, copy=True)

    def members() -> Iterator[tuple[str, bytes]]:
        for image in job.images:
            outcome, pair = _make_or_skip(image, settings)
            outcomes.append(outcome)
            if pair is None:
                continue
            assert pair.image is not None
            yield f"{image.key}.{pair.suffix}", pair.image
            for name, data in sorted(pair.conditions.items()):
                yield f"{image.key}.{name}.png", data
            yield f"{image.key}.txt", pair.entry["prompt"].encode()
            yield f"{image.key}.json", json.dumps(pair.entry, ensure_ascii=False, sort_keys=True).encode()

    write_tar(job.path, members())
    job.write_record(outcomes)
    return outcomes


def _make_or_skip(image: InputImage, settings: MakeSettings) -> tuple[Outcome, EncodedPair | None]:
    """The pair of an image and its outcome, without files; None instead of the pair if the image is skipped."""
    outcome = Outcome(key=image.key, name=image.name, stamp=image.stamp())
    try:
        pair = make_pair(image, settings)
    except UserError as error:
        return replace(outcome, error=str(error), code=error.code), None
    except Exception as error:
        if is_out_of_memory(error):  # not a matter of this image alone
            raise
        return replace(outcome, error=f"{type(error).__name__}: {error}"), None
    finally:
        sign_of_life()
    digest, prompt = pair.entry["original"]["sha256"], pair.entry["prompt"]
    content, subject = image.content(digest, prompt), image.content(digest, "" if image.has_default_prompt else prompt)
    revisions = {name: find(name).revision for name in settings.conditions}
    return replace(
        outcome, entry=pair.entry, note=pair.note, content=content, subject=subject, conditions=revisions
    ), pair


def _from_to(images: Sequence[InputImage]) -> str:
    names = [images[0].name] if len(images) == 1 else [images[0].name, images[-1].name]
    return " to ".join(names)


def _entry_and_files(
    pair: EncodedPair, image: InputImage, out: Path, home: str
) -> tuple[dict[str, Any], Mapping[str, bytes]]:
    """The manifest entry of a pair in the folder `out` (resolved: `home`), and path below `out` -> bytes."""
    paths = {name: f"{name}/{image.key}.png" for name in pair.conditions}
    files = {paths[name]: data for name, data in pair.conditions.items()}
    if pair.image is None:
        assert isinstance(image.source, Path)
        real = os.path.realpath(image.source)
        try:
            location = os.path.relpath(real, home)
        except ValueError:  # on another drive (Windows)
            location = real
        location = location.replace(os.sep, "/")
    else:
        location = f"{PICTURES}/{image.key}.{pair.suffix}"
        files[location] = pair.image
    return {"key": image.key, "picture": location, "conditions": paths, **pair.entry}, files


def _write(out: Path, name: str, data: bytes) -> None:
    """Write a file through a rename, so that it is never partial. No fsync per file, which would dominate the run time;
    after a power cut the hashes in the manifest show what is damaged."""
    path = os.path.join(out, name)
    aside = os.path.join(out, STATE, "aside", f"{os.getpid()}-{sha256_of(name)[:16]}")
    try:
        try:
            _write_and_rename(aside, path, data)
        except FileNotFoundError:  # folders exist after the first file, so they are created on demand
            for folder in (os.path.dirname(path), os.path.dirname(aside)):
                os.makedirs(folder, exist_ok=True)
            _write_and_rename(aside, path, data)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; choose a writable folder", "write-failed"
        ) from error


def _write_and_rename(aside: str, path: str, data: bytes) -> None:
    with open(aside, "wb", buffering=0) as stream:
        left = memoryview(data)
        while left:
            left = left[stream.write(left) :]
    os.replace(aside, path)
