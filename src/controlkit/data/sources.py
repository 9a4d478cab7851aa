"""Sources of images: files, members of tar archives, computed condition images; and decoding."""

from __future__ import annotations

import errno
import io
import os
import re
import tarfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, features

from controlkit.conditions import find
from controlkit.conditions.condition import background_of
from controlkit.data.turned import compute_upright, orientation, turn_of
from controlkit.errors import UserError
from controlkit.files import decode_text, sha256_of
from controlkit.images import MAX_PIXELS, decode_image, decode_rgb, keeps_colours, read_bytes, scale_down, to_rgb

SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"),
    *((".avif",) if features.check("avif") else ()),
)
"""Suffixes of image files, in lower case. Pillow reads AVIF from version 11.3, if it was built with it."""
_OTHER_SUFFIXES = (
    *(".avif", ".heic", ".heif", ".jp2", ".j2k", ".jxl", ".ppm", ".pgm", ".pnm", ".tga", ".dds", ".exr", ".hdr"),
    *(".psd", ".svg", ".ico", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2"),
)
"""Suffixes of images that are not read."""
_ARCHIVE_SUFFIXES = (".zip", ".tgz", ".tar.gz", ".tar.xz", ".tar.bz2", ".7z", ".rar")
"""Suffixes of archives that are not read."""

_MARKER = re.compile(rb"\xff[^\x00]")
"""A marker inside a JPEG scan, where the value 255 is stored as 255, 0."""


@dataclass(frozen=True, kw_only=True)
class TarMember:
    """A member of a tar archive, read in place."""

    path: Path
    start: int
    length: int
    name: str
    """Its name in the archive."""

    def read_bytes(self) -> bytes:
        """Read the bytes.

        Raises:
            UserError: the archive has been truncated or removed since it was listed.
        """
        try:
            with self.path.open("rb") as stream:
                stream.seek(self.start)
                data = stream.read(self.length)
        except OSError as error:
            raise UserError(f"cannot read {self}: {error.strerror}", "unreadable-file") from error
        if len(data) != self.length:
            raise UserError(f"{self} is truncated: {len(data)} of {self.length} bytes", "damaged-file")
        return data

    def __str__(self) -> str:
        return f"{self.path}:{self.name}"


@dataclass(frozen=True, kw_only=True)
class ComputedCondition:
    """A condition image that is computed from its image on every read."""

    target: Path | TarMember
    condition: str
    parameters: tuple[tuple[str, object], ...] = ()

    def compute(self) -> Image.Image:
        """The condition image at the size of the image.

        Raises:
            UserError: the image cannot be read, or its annotations are for an image of another shape.
        """
        data = read_file(self.target)
        target = np.asarray(decode_rgb(data, str(self.target)))
        return Image.fromarray(compute_upright(find(self.condition), target, data, dict(self.parameters)))

    def check(self, size: tuple[int, int], data: bytes) -> None:
        """Check that annotations are for an image of the shape of this one.

        Args:
            size: width and height of the upright image.
            data: the bytes of its file.

        Raises:
            UserError: they are not.
        """
        turn_of(dict(self.parameters), size, data)

    def read_bytes(self) -> bytes:
        """Hash of everything the condition image depends on; not the bytes of an image file."""
        return sha256_of(self.target.read_bytes(), find(self.condition).content, repr(self.parameters)).encode()

    def __str__(self) -> str:
        return f"{self.condition} of {self.target}"


Source = Path | TarMember | ComputedCondition
"""Source of an image or a condition image; all have `read_bytes()`."""


def open_image(source: Source, background: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """Read an image as `images.read_image` does: upright sRGB, transparent pixels over `background`.

    Raises:
        UserError: it is missing, empty, truncated, not an image, or too large.
    """
    if isinstance(source, ComputedCondition):
        return source.compute()
    return decode_rgb(read_file(source), str(source), background)


def read_file(source: Path | TarMember) -> bytes:
    """The bytes of an image file.

    Raises:
        UserError: it is missing, or cannot be read.
    """
    return source.read_bytes() if isinstance(source, TarMember) else read_bytes(source)


def read_condition_image(source: Source, condition: str | None) -> Image.Image:
    """Read a condition image as `open_image` does, transparent pixels over the background of its condition.

    Args:
        condition: its name; None or an unknown one has a white background.

    Raises:
        UserError: it is missing, empty, truncated, not an image, or too large.
    """
    return open_image(source, background_of(condition))


def decode_pixels(data: bytes, name: str) -> tuple[np.ndarray, bool]:
    """Decode an image file to read-only `uint8 [H, W, 3]` RGB as `open_image` does, and whether it is plain.

    Plain images look the same in every tool: without EXIF rotation or transparency, 8-bit RGB or grey, sRGB. Plain JPEG
    files, the usual case, are decoded by OpenCV straight into the array, with the same pixels as Pillow (tested).

    Args:
        name: its name in errors.

    Raises:
        UserError: the bytes are empty, truncated, not an image, or too large, see `images.decode_image`.
    """
    if _is_plain_jpeg(data):
        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
        if pixels is not None:
            pixels.flags.writeable = False  # like Pillow's: a condition must not modify the input of the next one
            return pixels, True
    image = decode_image(data, name)
    upright = image.mode in ("RGB", "L") and "transparency" not in image.info and orientation(image) == 1
    plain = upright and keeps_colours(image)
    return np.asarray(image if plain and image.mode == "RGB" else to_rgb(image, name=name)), plain


def _is_plain_jpeg(data: bytes) -> bool:
    """Whether the bytes are a complete single-scan JPEG file, upright, in sRGB or grey.

    OpenCV fills up truncated and damaged files that Pillow rejects. So anything but one scan of entropy-coded data up
    to the end-of-image marker, without other markers (such as those of progressive files), is left to Pillow.
    """
    if not (data.startswith(b"\xff\xd8\xff") and data.endswith(b"\xff\xd9")):
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            stream = io.BytesIO(data)
            image = Image.open(stream)  # reads the header only, up to the scan
            scan = stream.tell()
    except Exception:  # decode_image reports it
        return False
    if _MARKER.search(data, scan, len(data) - 2):
        return False
    width, height = image.size
    plain = image.format == "JPEG" and image.mode in ("RGB", "L") and keeps_colours(image)
    return plain and width * height <= MAX_PIXELS and orientation(image) == 1


def upright_size(source: Path | TarMember) -> tuple[int, int] | None:
    """Width and height of an image as `open_image` returns it, from its header; None if it cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            stream = source.open("rb") if isinstance(source, Path) else io.BytesIO(source.read_bytes())
            with stream, Image.open(stream) as image:
                scale_down(image)
                width, height = image.size
                turned = orientation(image) >= 5
    except Exception:  # decode_image reports it
        return None
    return (height, width) if turned else (width, height)


def members(path: Path) -> Iterator[TarMember]:
    """The files in a tar archive, in order, with sanitised names (`inside_name`); only headers are read.

    Raises:
        UserError: it is missing, not an uncompressed tar archive, or truncated.
    """
    try:
        with path.open("rb") as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            end = 0
            for member in archive:
                if member.isfile():
                    name = inside_name(member.name)
                    yield TarMember(path=path, start=member.offset_data, length=member.size, name=name)
                end = member.offset_data + (-(-member.size // 512) * 512 if member.isfile() else 0)
            # tarfile accepts truncated archives; a complete one ends with empty blocks.
            stream.seek(end)
            if stream.read(512) != bytes(512):
                raise UserError(f"{path} is truncated: no end-of-archive block", "damaged-file")
    except tarfile.ReadError as error:
        compressed = " (it looks compressed; unpack it with gunzip first)" if path.suffix in (".gz", ".tgz") else ""
        raise UserError(f"{path} is not a tar archive, or truncated{compressed}: {error}", "damaged-file") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}", "unreadable-file") from error


def inside_name(name: str) -> str:
    """The name of an archive member without root, drive, `.` and `..`, so that it stays inside its folder."""
    parts = re.sub(r"^[A-Za-z]:(?=[\\/])", "", name).replace("\\", "/").split("/")
    return "/".join(part for part in parts if part not in ("", ".", ".."))


def samples(path: Path, problems: list[str] | None = None) -> dict[str, dict[str, TarMember]]:
    """The members of a tar archive by webdataset's rule: key -> extension (in lower case) -> member.

    The key ends at the first dot of the base name; the extension follows it.

    Args:
        problems: list to append duplicate names to.

    Raises:
        UserError: as `members`; also for duplicate names, without `problems`.
    """
    found: dict[str, dict[str, TarMember]] = {}
    for member in members(path):
        folder, slash, name = member.name.rpartition("/")
        stem, _, extension = name.partition(".")
        if not stem:  # .DS_Store and the like have no key
            continue
        parts = found.setdefault(f"{folder}{slash}{stem}", {})
        if parts.setdefault(extension.lower(), member) is not member:
            problem = f"{path.name}:{member.name}: the name occurs twice; rename one of them"
            if problems is None:
                raise UserError(problem, "bad-data")
            problems.append(problem)
    return found


def is_image_name(name: str) -> bool:
    """Whether a file name has an image suffix and is not hidden."""
    return name.lower().endswith(SUFFIXES) and not _is_hidden(name)


def _is_hidden(name: str) -> bool:
    return name.rpartition("/")[2].startswith(".")


def is_unread_image(name: str) -> bool:
    """Whether a file name has the suffix of an image in a format that is not read, or of an archive that is not, and is
    not hidden."""
    return (
        name.lower().endswith((*_OTHER_SUFFIXES, *_ARCHIVE_SUFFIXES))
        and not name.lower().endswith(SUFFIXES)
        and not _is_hidden(name)
    )


def unread_note(folder: Path, unread: Sequence[Path]) -> list[str]:
    """A note on files with `is_unread_image`, if there are any."""
    archives = [path for path in unread if path.name.lower().endswith(_ARCHIVE_SUFFIXES)]
    images = [path for path in unread if path not in archives]
    notes = []
    if images:
        kinds = ", ".join(sorted({path.suffix.lower() for path in images}))
        notes.append(
            f"{len(images)} files in {folder} with other image suffixes are not read: {kinds}; convert them to PNG"
        )
    if archives:
        notes.append(f"{len(archives)} archives in {folder} are not read, such as {archives[0].name}; unpack them")
    return notes


def walk(folder: Path, leave_out: Callable[[str], bool] = lambda real: False) -> Iterator[Path]:
    """Files below a folder, sorted within theirs; linked folders are followed once, hidden ones are skipped.

    Args:
        leave_out: whether to skip the folder at a real path.
    """
    visited = {os.path.realpath(folder)}
    for parent, folders, names in os.walk(folder, followlinks=True):
        inner = {name: os.path.realpath(os.path.join(parent, name)) for name in sorted(folders)}
        folders[:] = [
            name
            for name, real in inner.items()
            if not name.startswith(".") and real not in visited and not leave_out(real)
        ]
        visited |= {inner[name] for name in folders}
        yield from (Path(parent, name) for name in sorted(names))


CAPTION_SUFFIXES = (".txt", ".caption")
"""Suffixes of caption files beside images, in lower case; `.caption` is the default of kohya's trainers."""


def caption_files(image: Path, suffix: str) -> list[Path]:
    """Possible caption files beside an image with a suffix in lower or upper case; they need not exist."""
    return [image.with_suffix(suffix), image.with_suffix(suffix.upper())]


def caption_beside(image: Path) -> str:
    """The caption beside an image: the first non-empty file of `CAPTION_SUFFIXES`; empty if there is none.

    Raises:
        UserError: a file is not UTF-8 (or UTF-16) text.
    """
    files = (file for suffix in CAPTION_SUFFIXES for file in caption_files(image, suffix))
    return next(filter(None, map(read_caption, files)), "")


def captions_differ(image: Path) -> bool:
    """Whether two caption files beside an image differ, so that one is ignored.

    Raises:
        UserError: a file is not UTF-8 (or UTF-16) text.
    """
    files = [file for suffix in CAPTION_SUFFIXES for file in caption_files(image, suffix)]
    return len(set(filter(None, map(read_caption, filter(os.path.isfile, files))))) > 1


def read_caption(path: Path) -> str:
    """The text of a caption file; empty if it does not exist.

    Raises:
        UserError: it cannot be read, or is not UTF-8 (or UTF-16) text.
    """
    try:
        return decode_text(path.read_bytes()).strip()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
            return ""
        raise UserError(f"cannot read its caption {path.name}: {error.strerror or error}", "unreadable-file") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"its caption {path.name} is not UTF-8 text ({error}); save it as UTF-8", "damaged-file"
        ) from error
