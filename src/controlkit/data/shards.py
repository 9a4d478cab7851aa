"""Tar shards whose bytes depend on their contents alone."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

from controlkit.data.sources import inside_name
from controlkit.files import write_atomically


def write_tar(path: str | Path, files: Iterable[tuple[str, bytes]]) -> None:
    """Write `(name, bytes)` in the order given, atomically; no time, owner or machine gets into the file, and no name
    that leads out of the folder where it is unpacked."""

    def write(temporary: Path) -> None:
        with tarfile.open(temporary, mode="w", format=tarfile.PAX_FORMAT) as archive:
            for name, data in files:
                member = tarfile.TarInfo(inside_name(name))
                member.size, member.mtime, member.mode = len(data), 0, 0o644
                archive.addfile(member, io.BytesIO(data))

    write_atomically(path, write)


def shard_name(index: int, count: int) -> str:
    """`pairs-00003-of-00016.tar`."""
    return f"pairs-{index:05d}-of-{count:05d}.tar"
