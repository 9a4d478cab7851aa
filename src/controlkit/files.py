"""Writing files so that they are whole or absent, and reading what people bring."""

from __future__ import annotations

import codecs
import contextlib
import glob
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from controlkit.errors import UserError


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Call `write` on a temporary path beside `path`, flush it to disk, and rename it over `path`.

    A reader, or a run that is killed in the middle, sees the old file or the new one, never a part.

    Raises:
        UserError: the folder cannot be written or the disk is full; nothing is left behind.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise UserError(f"cannot write {path}: {'it is a folder' if path.is_dir() else 'it is no ordinary file'}")
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        with open(temporary, "rb+") as stream:
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {path}: {reason}; choose a folder that can be written") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()


def remove_leftovers(path: str | Path) -> None:
    """Remove the temporary files of processes that were killed while they wrote `path`."""
    path = Path(path)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*{path.suffix}"):
        left.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    if any(0xD800 <= ord(letter) < 0xE000 for letter in text):  # of a file's name that is not text
        text = json.dumps(value, indent=2)
    write_atomically(path, lambda temporary: temporary.write_text(text + "\n", encoding="utf-8"))


def read_json(path: str | Path) -> Any:
    """The JSON value in `path`.

    Raises:
        UserError: the file is missing or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not a JSON file ({error})") from error


def decode_text(data: bytes) -> str:
    """Text as people's editors save it: UTF-8 with or without a byte order mark, or UTF-16 with one.

    Raises:
        UnicodeDecodeError: (a ValueError) it is neither.
    """
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return data.decode("utf-16" if utf16 else "utf-8-sig")


def valid_text(text: str, what: str) -> str:
    """`text`, if it can be written.

    Args:
        what: what the error calls it.

    Raises:
        UserError: it holds half a character, as cut text does.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{what} {text!r} is not whole text ({error.reason}); remove what was cut") from error
    return text


def files_of(path: str | Path) -> list[Path]:
    """The file itself, or every file of a folder."""
    path = Path(path)
    return [one for one in path.rglob("*") if one.is_file()] if path.is_dir() else [path]


def check_overwrite(written: Iterable[Path], read: Iterable[Path], *, force: bool) -> None:
    """Refuse to write over a file that is read for it, and over any other unless `force`.

    Args:
        written: files that are going to be written.
        read: files that what is written is made from.

    Raises:
        UserError: names the file.
    """
    there = [path for path in written if path.exists()]
    for given in filter(Path.exists, read):
        for path in there:
            if path.samefile(given):
                raise UserError(f"{path} would be written over, and it is read for this; write somewhere else")
    if there and not force:
        raise UserError(f"{there[0]} is there already; write somewhere else, or give --force to replace it")


def writable_folder(path: str | Path, advice: str = "give --out another folder") -> Path:
    """`path` as a folder that exists and takes files.

    Args:
        advice: what the error tells to do.

    Raises:
        UserError: it cannot be made or written, said before any work is done for it.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path, prefix=".controlkit-"):
            pass
    except OSError as error:
        raise UserError(f"cannot write to the folder {path}: {error.strerror or error}; {advice}") from error
    return path


def numbered_folder(parent: str | Path) -> Path:
    """Make a folder in `parent` that is called by the number after the largest one there, from `001` on.

    Raises:
        UserError: it cannot be made.
    """
    parent = writable_folder(parent)
    number = max((int(path.name) for path in parent.iterdir() if path.name.isdecimal()), default=0)
    while True:
        number += 1
        path = parent / f"{number:03d}"
        try:
            path.mkdir()
        except FileExistsError:  # of a process that began at the same moment
            continue
        except OSError as error:
            raise UserError(f"cannot make the folder {path}: {error.strerror or error}") from error
        return path


@contextlib.contextmanager
def output_folder(path: str | Path | None, numbered_in: str | Path = ".") -> Iterator[Path]:
    """A block that writes into the folder `path`; if it fails, a folder that it made and left empty is removed.

    Args:
        path: the folder; None for a new one in `numbered_in`, called by the next number.

    Raises:
        UserError: the folder cannot be written, said before the block begins.
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
def locked(lock: Path, refusal: str) -> Iterator[None]:
    """A block in which this process alone holds the file `lock`; a process that is killed lets it go.

    Raises:
        UserError: another process holds it; says `refusal`.
    """
    holding = FileLock(lock, timeout=0)
    try:
        holding.acquire()
    except Timeout as error:
        raise UserError(refusal) from error
    try:
        yield
    finally:
        holding.release()


def sha256_of(*parts: bytes | str) -> str:
    """Hex SHA-256 of the parts, each preceded by its length so that boundaries count."""
    return sha256_of_all(parts)


def sha256_of_all(parts: Iterable[bytes | str]) -> str:
    """`sha256_of`, taking one part after another, so that they need not fit into memory together."""
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
