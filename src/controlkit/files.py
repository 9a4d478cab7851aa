"""Atomic writes, output folders, locks, hashes, and tolerant reading of JSON and text."""

from __future__ import annotations

import codecs
import contextlib
import glob
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from controlkit.errors import UserError


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Call `write` on a temporary path beside `path`, flush to disk, then rename over `path`.

    Readers see the old file or the new one, never a part, even if the process is killed while writing. A symbolic link
    stays, and its file is replaced; a replaced file keeps its permissions.

    Raises:
        UserError: the folder is not writable or the disk is full; nothing is left behind.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "not a regular file"
        raise UserError(f"cannot write {path}: it is {kind}; choose another name", "write-failed")
    temporary: Path | None = None
    try:
        path = path.resolve() if path.is_symlink() else path
        mode = path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask()
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        with open(temporary, "rb+") as stream:
            os.fsync(stream.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {path}: {reason}; choose a writable folder", "write-failed") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()


def remove_leftovers(path: str | Path) -> None:
    """Remove temporary files of processes that were killed while writing `path`."""
    path = Path(path)
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*{path.suffix}"):
        leftover.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically, with null for NaN and infinity."""
    value = with_null(value)
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    if any(0xD800 <= ord(letter) < 0xE000 for letter in text):  # surrogates of a file name that is not UTF-8
        text = json.dumps(value, indent=2)
    write_atomically(path, lambda temporary: temporary.write_text(text + "\n", encoding="utf-8"))


def with_null(value: Any) -> Any:
    """`value` with null in place of NaN and infinity, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: with_null(inner) for key, inner in value.items()}
    return [with_null(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def read_json(path: str | Path) -> Any:
    """The JSON value in `path`.

    Raises:
        UserError: the file is missing, unreadable or not JSON.
    """
    try:
        return json.loads(decode_text(Path(path).read_bytes()))
    except FileNotFoundError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", "missing-file") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", "unreadable-file") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not a JSON file ({error})", "damaged-file") from error


def decode_text(data: bytes) -> str:
    """Decode UTF-8 with or without a byte order mark, or UTF-16 with one: what common editors save.

    Raises:
        UnicodeDecodeError: (a ValueError) neither encoding fits, or the text has NUL characters, as UTF-16 without a
            byte order mark read as UTF-8 has.
    """
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    encoding = "utf-16" if utf16 else "utf-8-sig"
    text = data.decode(encoding)
    if "\0" in text:
        at = data.index(b"\0")
        raise UnicodeDecodeError(encoding, data, at, at + 1, "NUL characters; UTF-16 needs a byte order mark")
    return text


def valid_text(text: str, what: str) -> str:
    """`text`, checked to be encodable as UTF-8.

    Args:
        what: its name in the error.

    Raises:
        UserError: it has an unpaired surrogate, usually from text cut inside a character.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{what} {text!r} is not valid text ({error.reason}); remove the broken character", "bad-data"
        ) from error
    return text


def one_spelling(path: str | Path) -> Path:
    """`path` relative to the working folder if it is in it, else absolute: the same however it was spelled."""
    absolute = Path(os.path.abspath(path))  # links stay, as `Path.resolve` would not leave them
    folder = Path.cwd()
    return absolute.relative_to(folder) if absolute.is_relative_to(folder) else absolute


def spelled(name: str) -> str:
    """`one_spelling` of the name of a file or folder; other names, such as those of what ships, stay."""
    return str(one_spelling(name)) if Path(name).exists() else name


def files_of(path: str | Path) -> list[Path]:
    """The file itself, or every file below a folder."""
    path = Path(path)
    return [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]


def check_overwrite(
    written: Iterable[Path], read: Iterable[Path], *, force: bool, output: str = "another output"
) -> None:
    """Refuse to overwrite an input file, and any other existing file unless `force`.

    Args:
        written: output files.
        read: input files.
        output: what the error advises to choose.

    Raises:
        UserError: names the file.
    """
    existing = [path for path in written if path.exists()]
    for source in filter(Path.exists, read):
        for path in existing:
            if path.samefile(source):
                raise UserError(f"{path} is an input and would be overwritten; choose {output}", "would-overwrite")
    if existing and not force:
        raise UserError(
            f"{existing[0]} already exists; choose {output}, or pass --force to replace it", "would-overwrite"
        )


def writable_folder(path: str | Path, advice: str = "give --out another folder") -> Path:
    """Create the folder `path` if needed and check that it is writable, before any work is done for it.

    Args:
        advice: what to do, at the end of the error.

    Raises:
        UserError: it cannot be created or written.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path, prefix=".controlkit-"):
            pass
    except OSError as error:
        raise UserError(
            f"cannot write to the folder {path}: {error.strerror or error}; {advice}", "write-failed"
        ) from error
    return path


def numbered_folder(parent: str | Path) -> Path:
    """Create the next numbered folder in `parent`: `001`, or one more than the largest number there.

    Raises:
        UserError: it cannot be created.
    """
    parent = writable_folder(parent)
    number = max((int(path.name) for path in parent.iterdir() if path.name.isdecimal()), default=0)
    while True:
        number += 1
        path = parent / f"{number:03d}"
        try:
            path.mkdir()
        except FileExistsError:  # another process was faster
            continue
        except OSError as error:
            raise UserError(f"cannot create the folder {path}: {error.strerror or error}", "write-failed") from error
        return path


@contextlib.contextmanager
def output_folder(path: str | Path | None, numbered_in: str | Path = ".") -> Iterator[Path]:
    """Context manager for an output folder; on failure, a new folder that is still empty is removed.

    Args:
        path: the folder; None for the next numbered one in `numbered_in`.

    Raises:
        UserError: the folder is not writable; raised before the block begins.
    """
    existed = path is not None and Path(path).exists()
    path = numbered_folder(numbered_in) if path is None else writable_folder(path)
    try:
        yield path
    except BaseException:
        if not existed:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


@contextlib.contextmanager
def locked(path: Path, message: str) -> Iterator[None]:
    """Context manager that holds the lock file `path`; the lock ends with the process.

    Raises:
        UserError: another process holds it; the text is `message`.
    """
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise UserError(message, "in-use") from error
    try:
        yield
    finally:
        lock.release()


def sha256_of(*parts: bytes | str) -> str:
    """Hex SHA-256 of the parts, each prefixed with its length so that boundaries count."""
    return sha256_of_all(parts)


def sha256_of_all(parts: Iterable[bytes | str]) -> str:
    """`sha256_of` for a stream of parts that need not fit into memory together."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def file_state(path: Path) -> tuple[int, int, int] | None:
    """Size in bytes of a file, and the times of the last change of its bytes and of its inode; None if there is none.

    The time of the inode also changes when files are exchanged, or written again under their former modification time.
    """
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
