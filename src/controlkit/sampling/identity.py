"""SHA-256 of the images, controls and bases of a request, to detect files that changed."""

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
from controlkit.bases.vae import vae_files
from controlkit.controls.control import Control
from controlkit.data.cache import cache_folder
from controlkit.errors import UserError
from controlkit.files import read_json, sha256_of, sha256_of_all, write_json
from controlkit.formats.load import control_files

_LARGE = 2**26
"""Bytes from which hashes are cached; smaller files hash in less than a tenth of a second."""
_SETTLED = 2.0
"""Seconds after which a further change alters the modification time, also on file systems with coarse clocks."""


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file, as of `sha256sum`.

    Hashes of large files (1 GB takes about a second) are cached in the folder `sha256` of the cache; they hold while
    size and modification time stay the same. The cache of the hub names large files by their SHA-256, which is used
    as is.

    Raises:
        UserError: the file cannot be read.
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
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}", "unreadable-file") from error
    if stat.st_size >= _LARGE and time.time() - stat.st_mtime > _SETTLED:
        with suppress(UserError):
            write_json(record, {**facts, "sha256": digest})
    return digest


def base_sha256(name: str) -> str:
    """SHA-256 of a base's file, or of the names and contents of the files read from its folder."""
    return _files_sha256(base_files(name))


def vae_sha256(name: str) -> str:
    """SHA-256 of the weight files of an autoencoder in place of the base's own."""
    return _files_sha256(list(vae_files(name)))


def control_sha256(name: str) -> str:
    """SHA-256 of a control's file or folder; of both files for `ADAPTER+BASE`."""
    return _files_sha256(control_files(name))


def companion_sha256(control: Control, shared: Mapping[str, Control]) -> str | None:
    """SHA-256 (or name) of the companion that `load_control` found; None for controls without one.

    Args:
        control: the loaded control.
        shared: the loaded companions, as `load_control` keeps them.
    """
    if control.companion is None:
        return None
    key = next((key for key, network in shared.items() if network is control.shared_network), None)
    return file_sha256(Path(key.removeprefix("file:"))) if key is not None and key.startswith("file:") else key


def pixels_sha256(image: Image.Image) -> str:
    """SHA-256 of an image's size and RGB pixels, independent of its file format."""
    return sha256_of(f"{image.width} x {image.height}", image.convert("RGB").tobytes())


def _files_sha256(files: list[Path]) -> str:
    if len(files) == 1:
        return file_sha256(files[0])
    home = os.path.commonpath([os.path.abspath(file) for file in files])  # one may be relative, another not
    return sha256_of_all(part for file in files for part in (os.path.relpath(file, home), file_sha256(file)))
