"""Where the bytes of an image lie: a file, or a piece of a tar archive; and images from bytes."""

from __future__ import annotations

import errno
import io
import os
import re
import tarfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from controlkit.conditions import find
from controlkit.conditions.condition import background_of
from controlkit.errors import UserError
from controlkit.files import decode_text, sha256_of
from controlkit.images import MAX_PIXELS, decode_image, decode_rgb, keeps_colours, read_image, to_rgb

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
"""How names of images end, in lower case."""

_ORIENTATION = 0x0112
_MARKER = re.compile(rb"\xff[^\x00]")
"""A marker inside a JPEG file's scan, where the value 255 is written as 255, 0."""


@dataclass(frozen=True, kw_only=True)
class TarMember:
    """A run of bytes inside a file: a member of a tar archive, read without unpacking it."""

    path: Path
    start: int
    length: int
    name: str
    """What it is called inside."""

    def read_bytes(self) -> bytes:
        """The bytes.

        Raises:
            UserError: the archive is shorter than when it was listed, or gone.
        """
        try:
            with self.path.open("rb") as stream:
                stream.seek(self.start)
                data = stream.read(self.length)
        except OSError as error:
            raise UserError(f"cannot read {self}: {error.strerror}") from error
        if len(data) != self.length:
            raise UserError(f"{self} is torn: {len(data)} of {self.length} bytes")
        return data

    def __str__(self) -> str:
        return f"{self.path}:{self.name}"


@dataclass(frozen=True, kw_only=True)
class ComputedCondition:
    """A condition image that is computed from its image whenever it is read."""

    target: Path | TarMember
    condition: str
    parameters: tuple[tuple[str, object], ...] = ()

    def image(self) -> Image.Image:
        """The condition image, as large as the image."""
        target = np.asarray(open_image(self.target))
        return Image.fromarray(find(self.condition)(target, **dict(self.parameters)))

    def read_bytes(self) -> bytes:
        """What the image follows from, hashed; not an image's bytes."""
        return sha256_of(self.target.read_bytes(), find(self.condition).content, repr(self.parameters)).encode()

    def __str__(self) -> str:
        return f"{self.condition} of {self.target}"


Source = Path | TarMember | ComputedCondition
"""What an image or a condition image is read from; all have `read_bytes()`."""


def open_image(source: Source, background: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """The image as `images.read_image` gives it: sRGB, upright, transparent parts over `background`.

    Raises:
        UserError: it is missing, empty, torn, not an image, or too large.
    """
    if isinstance(source, ComputedCondition):
        return source.image()
    if isinstance(source, TarMember):
        return decode_rgb(source.read_bytes(), str(source), background)
    return read_image(source, background)


def read_condition_image(source: Source, condition: str | None) -> Image.Image:
    """A condition image as `open_image` gives it, transparent parts over the background of its condition.

    Args:
        condition: its name; None, or one that is not known here, has a white background.

    Raises:
        UserError: it is missing, empty, torn, not an image, or too large.
    """
    return open_image(source, background_of(condition))


def decode_pixels(data: bytes, name: str) -> tuple[np.ndarray, bool]:
    """The image in the bytes of a file, read-only `uint8 [H, W, 3]` RGB as `open_image` shows it, and whether every
    other tool shows it so too: False for what is turned by EXIF, transparent, not 8 bits of RGB or grey, or not sRGB.

    Plain JPEG files, the most there are, are decoded by OpenCV, straight into the array; a test holds that Pillow gives
    the same pixels.

    Args:
        name: what errors call it.

    Raises:
        UserError: the bytes are none, torn, not an image, or of one larger than `images.MAX_PIXELS`.
    """
    if _is_plain_jpeg(data):
        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
        if pixels is not None:
            pixels.flags.writeable = False  # as Pillow's are: no condition may paint on what the next one sees
            return pixels, True
    image = decode_image(data, name)
    upright = image.mode in ("RGB", "L") and "transparency" not in image.info and _orientation(image) == 1
    plain = upright and keeps_colours(image)
    return np.asarray(image if plain and image.mode == "RGB" else to_rgb(image, name=name)), plain


def _is_plain_jpeg(data: bytes) -> bool:
    """Whether the bytes are a JPEG file of one whole scan, upright and in grey or RGB that is sRGB.

    Pillow refuses torn and many damaged files and OpenCV fills them up, so what is not one scan of entropy-coded data
    up to the end-of-image marker, without another marker (such as those of progressive files), is left to Pillow.
    """
    if not (data.startswith(b"\xff\xd8\xff") and data.endswith(b"\xff\xd9")):
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            stream = io.BytesIO(data)
            image = Image.open(stream)  # reads the header only, up to the scan
            scan = stream.tell()
    except Exception:  # whatever it is, decode_image says it
        return False
    if _MARKER.search(data, scan, len(data) - 2):
        return False
    width, height = image.size
    plain = image.format == "JPEG" and image.mode in ("RGB", "L") and keeps_colours(image)
    return plain and width * height <= MAX_PIXELS and _orientation(image) == 1


def _orientation(image: Image.Image) -> int:
    """How EXIF says that the image is turned; 1 is upright, as which a damaged block counts."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged blocks, too
            return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # Pillow's parsers raise whatever a damaged block makes them stumble over
        return 1


def members(path: Path) -> Iterator[TarMember]:
    """The files in a tar archive, in their order, by names without absolute or parent parts; only headers are read.

    Raises:
        UserError: it is missing, not a plain tar archive, or torn.
    """
    try:
        with path.open("rb") as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            end = 0
            for member in archive:
                if member.isfile():
                    name = inside_name(member.name)
                    yield TarMember(path=path, start=member.offset_data, length=member.size, name=name)
                end = member.offset_data + (-(-member.size // 512) * 512 if member.isfile() else 0)
            # tarfile takes a cut archive for a finished one; a finished one ends with empty blocks.
            stream.seek(end)
            if stream.read(512) != bytes(512):
                raise UserError(f"{path} is torn: it has no end")
    except tarfile.ReadError as error:
        packed = " (it looks compressed; unpack it with gunzip first)" if path.suffix in (".gz", ".tgz") else ""
        raise UserError(f"{path} is not a tar archive, or a torn one{packed}: {error}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def inside_name(name: str) -> str:
    """The name of an archive's member without what leads out of a folder: a root, a drive, `.` and `..`."""
    parts = re.sub(r"^[A-Za-z]:(?=[\\/])", "", name).replace("\\", "/").split("/")
    return "/".join(part for part in parts if part not in ("", ".", ".."))


def samples(path: Path, problems: list[str] | None = None) -> dict[str, dict[str, TarMember]]:
    """The members of a tar archive by webdataset's rule: key -> extension (in lower case) -> member.

    The key goes up to the first dot of the name's last part; the extension is what follows that dot.

    Args:
        problems: takes what is wrong with the rest: members of one name.

    Raises:
        UserError: as `members`; also for two members of one name, if `problems` is not given.
    """
    found: dict[str, dict[str, TarMember]] = {}
    for piece in members(path):
        folder, slash, name = piece.name.rpartition("/")
        stem, _, extension = name.partition(".")
        if not stem:  # names such as .DS_Store have no key
            continue
        parts = found.setdefault(f"{folder}{slash}{stem}", {})
        if parts.setdefault(extension.lower(), piece) is not piece:
            problem = f"{path.name}:{piece.name}: the name occurs twice; rename one of them"
            if problems is None:
                raise UserError(problem)
            problems.append(problem)
    return found


def is_image_name(name: str) -> bool:
    """Whether a file's name ends as those of images do."""
    return name.lower().endswith(SUFFIXES) and not name.rpartition("/")[2].startswith(".")


CAPTION_SUFFIXES = (".txt", ".caption")
"""Of the files beside images that hold their captions; `.caption` is what kohya's trainers look for by default."""


def caption_beside(image: Path) -> str:
    """The caption in the file beside an image: the first of `CAPTION_SUFFIXES` that has text; empty if none has.

    Raises:
        UserError: a file is no UTF-8 (or UTF-16) text.
    """
    texts = (read_caption(image.with_suffix(suffix)) for suffix in CAPTION_SUFFIXES)
    return next(filter(None, texts), "")


def captions_differ(image: Path) -> bool:
    """Whether two files beside an image hold different captions, so that one of them is not read.

    Raises:
        UserError: a file is no UTF-8 (or UTF-16) text.
    """
    files = [image.with_suffix(suffix) for suffix in CAPTION_SUFFIXES]
    return all(map(os.path.isfile, files)) and len(set(filter(None, map(read_caption, files)))) > 1


def read_caption(path: Path) -> str:
    """The text of a caption's file, empty if there is none.

    Raises:
        UserError: it cannot be read, or is no UTF-8 (or UTF-16) text.
    """
    try:
        return decode_text(path.read_bytes()).strip()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
            return ""
        raise UserError(f"its caption {path.name} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"its caption {path.name} is not UTF-8 text ({error}); save it as UTF-8") from error
