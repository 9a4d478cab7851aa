"""SHA-256 of what a request names: images, controls and bases, so that a change behind a path is noticed."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from PIL import Image

from controlkit.bases.load import base_files
from controlkit.controls.control import Control
from controlkit.data.cache import cache_folder
from controlkit.errors import UserError
from controlkit.files import read_json, sha256_of, sha256_of_all, write_json
from controlkit.formats.load import control_files

_LARGE = 2**26
"""Bytes from which a hash is remembered; smaller files take less than a tenth of a second."""
_SETTLED = 2.0
"""Seconds after which a file's time of change tells a further change, also where clocks of file systems are coarse."""


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file, as `sha256sum` has it.

    That of a large file (1 GB takes about a second) is kept in the folder `sha256` of the cache, and holds as long as
    the file's size and time of change stay. The hub's cache names large files by their SHA-256, which is taken as it
    is.

    Raises:
        UserError: it cannot be read.
    """
    real = path.resolve()
    if real.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", real.name):
        return real.name
    try:
        stat = real.stat()
        record = cache_folder() / "sha256" / f"{sha256_of(str(real))[:32]}.json"
        facts = {"path": str(real), "bytes": stat.st_size, "changed": stat.st_mtime_ns, "inode": stat.st_ino}
        if stat.st_size >= _LARGE:
            with suppress(UserError):
                known = read_json(record)
                if isinstance(known, dict) and {**known, "sha256": None} == {**facts, "sha256": None}:
                    return str(known["sha256"])
        with real.open("rb") as stream:
            made = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    if stat.st_size >= _LARGE and time.time() - stat.st_mtime > _SETTLED:
        with suppress(UserError):
            write_json(record, {**facts, "sha256": made})
    return made


def base_sha256(name: str) -> str:
    """Of the file of a base, or of all files that are read of its folder (their names and contents)."""
    return _files_sha256(base_files(name))


def control_sha256(name: str) -> str:
    """Of the file or the folder of a control; of both for `ADAPTER+BASE`."""
    return _files_sha256(control_files(name))


def companion_sha256(control: Control, shared: Mapping[str, Control]) -> str | None:
    """What identifies the companion that a control found by itself; None for controls that need none.

    Args:
        shared: the companions that are loaded, as `load_control` keeps them.
    """
    if control.companion is None:
        return None
    key = next((key for key, network in shared.items() if network is control.shared_network), None)
    return file_sha256(Path(key.removeprefix("file:"))) if key is not None and key.startswith("file:") else key


def pixels_sha256(image: Image.Image) -> str:
    """Of an image's size and pixels in RGB, whatever its file."""
    return sha256_of(f"{image.width} x {image.height}", image.convert("RGB").tobytes())


def _files_sha256(files: list[Path]) -> str:
    if len(files) == 1:
        return file_sha256(files[0])
    home = os.path.commonpath(files)
    return sha256_of_all(part for file in files for part in (os.path.relpath(file, home), file_sha256(file)))
