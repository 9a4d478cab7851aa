"""Layouts by folder: images and condition images with the same stems, and MultiGen-20M."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from controlkit.data.multigen import MultiGen
from controlkit.data.readers.listing import Listing, Record
from controlkit.data.sources import (
    CAPTION_SUFFIXES,
    caption_beside,
    captions_differ,
    is_image_name,
    is_unread_image,
    unread_note,
    walk,
)
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

    The images are in `folder` itself or in one subfolder; every other subfolder with images is a condition. Subfolders
    may have folders inside, the same in each.

    Raises:
        UserError: the image folder is ambiguous, or stems are not unique.
    """
    below = _folders(folder)
    folders = {path: files for path, files in below.items() if any(is_image_name(file.name) for file in files)}
    home = _home(folder, folders)
    by_name = {path.name: _by_stem(path, files) for path, files in folders.items() if path != home}
    conditions = {name: stems for name, stems in by_name.items() if stems}
    records, problems, ambiguous = [], [], []
    for stem, image in _by_stem(home, folders[home]).items():
        twins = {name: stems.pop(stem) for name, stems in conditions.items() if stem in stems}
        where = image.relative_to(home).as_posix()
        try:
            prompt = caption_beside(image)
            ambiguous += [image] if captions_differ(image) else []
        except UserError as error:
            problems.append(f"{where}: {error}")
            continue
        records.append(Record(where=where, image=image, conditions=twins, captions=(prompt,)))
    for stem, path in (item for unmatched in conditions.values() for item in unmatched.items()):
        problems.append(f"{path.relative_to(folder).as_posix()}: there is no image {stem} in {home.name}")
    notes = [two_captions_note(ambiguous)] if ambiguous else []
    notes += unread_note(folder, [path for files in below.values() for path in files if is_unread_image(path.name)])
    return Listing(origin=folder, records=records, problems=problems, notes=notes)


def two_captions_note(images: Sequence[Path]) -> str:
    """A note on images with two different caption files."""
    first, second = CAPTION_SUFFIXES
    return f"{len(images)} images have different captions in {first} and {second}, such as {images[0]}; {first} is used"


def has_twins(folder: Path) -> bool:
    """Whether two of `folder` and its subfolders contain images with the same stem."""
    known: set[str] = set()
    for place, files in _folders(folder).items():
        stems = {_stem(place, path) for path in files if is_image_name(path.name)}
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


def _folders(folder: Path) -> dict[Path, list[Path]]:
    """`folder` with the files in it, and its subfolders with all files below them."""
    found: dict[Path, list[Path]] = {folder: []}
    for path in walk(folder):
        inside = path.relative_to(folder).parts
        found.setdefault(folder if len(inside) == 1 else folder / inside[0], []).append(path)
    return dict(sorted(found.items()))


def _home(folder: Path, folders: Mapping[Path, list[Path]]) -> Path:
    """The folder of images among folders of condition images."""
    if folder in folders:
        return folder
    captioned = [
        path for path, files in folders.items() if any(file.suffix.lower() in CAPTION_SUFFIXES for file in files)
    ]
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


def _by_stem(folder: Path, files: Sequence[Path]) -> dict[str, Path]:
    """The images among files below a folder, by their path in it without the suffix."""
    found: dict[str, Path] = {}
    for path in filter(lambda path: is_image_name(path.name), files):
        stem = _stem(folder, path)
        if stem in found:
            raise UserError(
                f"{folder} has both {found[stem].name} and {path.name}; stems must be unique: rename one",
                "bad-data",
            )
        found[stem] = path
    return found


def _stem(folder: Path, path: Path) -> str:
    return path.relative_to(folder).with_suffix("").as_posix()
