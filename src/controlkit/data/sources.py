"""Where the bytes of a picture lie: a file, or a piece of a tar archive; and pictures from bytes."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from controlkit.conditions import find
from controlkit.errors import UserError
from controlkit.files import sha256_of
from controlkit.images import decode_image, read_image, to_rgb

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
"""How names of pictures end, in lower case."""


@dataclass(frozen=True, kw_only=True)
class Piece:
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
class Drawn:
    """A condition image that is computed from its picture whenever it is read."""

    picture: Path | Piece
    condition: str
    parameters: tuple[tuple[str, object], ...] = ()

    def image(self) -> Image.Image:
        """The condition image, as large as the picture."""
        picture = np.asarray(read_picture(self.picture))
        return Image.fromarray(find(self.condition)(picture, **dict(self.parameters)))

    def read_bytes(self) -> bytes:
        """What the image follows from, hashed; not a picture's bytes."""
        return sha256_of(self.picture.read_bytes(), self.condition, repr(self.parameters)).encode()

    def __str__(self) -> str:
        return f"{self.condition} of {self.picture}"


Source = Path | Piece | Drawn
"""What a picture or a condition image is read from; all have `read_bytes()`."""


def read_picture(source: Source) -> Image.Image:
    """The picture as `images.read_image` gives it: RGB, upright.

    Raises:
        UserError: it is missing, empty, torn, not a picture, or too large.
    """
    if isinstance(source, Drawn):
        return source.image()
    if isinstance(source, Piece):
        return to_rgb(decode_image(source.read_bytes(), str(source)))
    return read_image(source)


def members(path: Path) -> Iterator[Piece]:
    """The files in a tar archive, in their order; only headers are read.

    Raises:
        UserError: it is missing, not a plain tar archive, or torn.
    """
    try:
        with path.open("rb") as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            end = 0
            for member in archive:
                if member.isfile():
                    yield Piece(path=path, start=member.offset_data, length=member.size, name=member.name)
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


def samples(path: Path) -> dict[str, dict[str, Piece]]:
    """The members of a tar archive by webdataset's rule: key -> extension (in lower case) -> member.

    The key goes up to the first dot of the name's last part; the extension is what follows that dot.
    """
    found: dict[str, dict[str, Piece]] = {}
    for piece in members(path):
        folder, slash, name = piece.name.rpartition("/")
        stem, _, extension = name.partition(".")
        if stem:  # names such as .DS_Store have no key
            found.setdefault(f"{folder}{slash}{stem}", {})[extension.lower()] = piece
    return found


def is_picture_name(name: str) -> bool:
    """Whether a file's name ends as those of pictures do."""
    return name.lower().endswith(SUFFIXES) and not name.rpartition("/")[2].startswith(".")
