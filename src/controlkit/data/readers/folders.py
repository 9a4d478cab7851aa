"""Layouts by folder: images and condition images with the same stems, and MultiGen-20M."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from controlkit.data.multigen import MultiGen
from controlkit.data.readers.listing import Listing, Record
from controlkit.data.sources import CAPTION_SUFFIXES, caption_beside, captions_differ, is_image_name
from controlkit.errors import UserError

IMAGE_FOLDERS = ("target", "targets", "image", "images", "img", "picture", "pictures", "photo", "photos", "train")
"""Names of image folders beside folders of condition images, if no folder has captions."""


def images_in(folder: Path) -> list[Path]:
    """Files with image suffixes directly in a folder, sorted by name.

    Raises:
        UserError: the folder cannot be listed.
    """
    try:
        return sorted(path for path in folder.iterdir() if is_image_name(path.name) and path.is_file())
    except OSError as error:
        raise UserError(f"cannot list {folder}: {error.strerror}", "unreadable-file") from error


def read_twins(folder: Path, condition: str | None = None) -> Listing:
    """Images with caption files (`apple.png`, `apple.txt` or `apple.caption`) and folders of condition images with the
    same stems: the layout of kohya's ControlNet trainers.

    The images are in `folder` itself or in one subfolder; every other subfolder with images is a condition.

    Raises:
        UserError: the image folder is ambiguous, or stems are not unique.
    """
    folders = {path: images_in(path) for path in (folder, *_subfolders(folder))}
    folders = {path: files for path, files in folders.items() if files}
    home = _home(folder, list(folders))
    by_name = {path.name: _by_stem(path, files) for path, files in folders.items() if path != home}
    conditions = {name: stems for name, stems in by_name.items() if stems}
    records, problems, ambiguous = [], [], []
    for stem, image in _by_stem(home, folders[home]).items():
        twins = {name: stems.pop(stem) for name, stems in conditions.items() if stem in stems}
        try:
            prompt = caption_beside(image)
            ambiguous += [image] if captions_differ(image) else []
        except UserError as error:
            problems.append(f"{image.name}: {error}")
            continue
        records.append(Record(where=image.name, image=image, conditions=twins, captions=(prompt,)))
    for name, unmatched in conditions.items():
        problems += [f"{name}/{path.name}: there is no image {stem} in {home.name}" for stem, path in unmatched.items()]
    notes = [two_captions_note(ambiguous)] if ambiguous else []
    return Listing(origin=folder, records=records, problems=problems, notes=notes)


def two_captions_note(images: Sequence[Path]) -> str:
    """A note on images with two different caption files."""
    first, second = CAPTION_SUFFIXES
    return f"{len(images)} images have different captions in {first} and {second}, such as {images[0]}; {first} is used"


def has_twins(folder: Path) -> bool:
    """Whether two of `folder` and its subfolders contain images with the same stem."""
    known: set[str] = set()
    for place in (folder, *_subfolders(folder)):
        stems = {path.stem for path in images_in(place)}
        if stems & known:
            return True
        known |= stems
    return False


def read_multigen(folder: Path, condition: str | None = None) -> Listing:
    """One task of MultiGen-20M: `condition`, or the only one.

    Raises:
        UserError: there are several tasks and `condition` is none of them.
    """
    start, end = "aesthetics_plus_all_group_", "_all.json"
    files = sorted((folder / "json_files").glob(f"{start}*{end}"))
    tasks = [path.name.removeprefix(start).removesuffix(end) for path in files]
    wanted = None if condition == "identity" else condition
    if wanted is None and len(tasks) != 1:
        if not tasks:
            raise UserError(f"{folder / 'json_files'} has no files {start}*{end}", "empty-data")
        raise UserError(f"{folder} has the tasks {', '.join(tasks)}; name one: {folder}/{tasks[0]}", "missing-setting")
    task = tasks[0] if len(tasks) == 1 and wanted not in tasks else str(wanted)
    lines = MultiGen(folder, task)
    records, problems = [], []
    for index in range(len(lines)):
        try:
            source, image, prompt = lines.entry(index)
        except UserError as error:
            problems.append(str(error))
            continue
        records.append(Record(where=f"line {index + 1}", image=image, conditions={task: source}, captions=(prompt,)))
    return Listing(origin=lines.path, records=records, problems=problems, folder=folder)


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _home(folder: Path, folders: list[Path]) -> Path:
    """The folder of images among folders of condition images."""
    if folder in folders:
        return folder
    captioned = [path for path in folders if any(next(path.glob(f"*{suffix}"), None) for suffix in CAPTION_SUFFIXES)]
    named = [path for path in folders if path.name.lower() in IMAGE_FOLDERS]
    for found in (captioned, named):
        if len(found) == 1:
            return found[0]
    names = ", ".join(path.name for path in folders)
    raise UserError(
        f"cannot tell which of {names} in {folder} contains the images; put captions (.txt, .caption) beside them, or"
        " name the folder images",
        "bad-data",
    )


def _by_stem(folder: Path, files: list[Path]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in files:
        if path.stem in found:
            raise UserError(
                f"{folder} has both {found[path.stem].name} and {path.name}; stems must be unique: rename one",
                "bad-data",
            )
        found[path.stem] = path
    return found
