"""Pairs and runs of the page: folders below one, and the product's own commands that work on them."""

from __future__ import annotations

import asyncio
import itertools
import json
import lzma
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from controlkit.data.readers.listing import own_files_only
from controlkit.data.readers.recognise import read_listing
from controlkit.errors import UserError
from controlkit.files import writable_folder
from controlkit.ui.files import checked_name

_UNPACKED = 4 * 10**9
"""Bytes that a ZIP may hold."""
_ENTRIES = 100_000
_ADDED = (".DS_Store", "Thumbs.db", "desktop.ini")
"""Files that file managers add to folders; macOS also adds `__MACOSX` and `._NAME`."""


@dataclass(frozen=True)
class RunState:
    """A run as its folder has it."""

    is_running: bool
    lines: list[dict[str, Any]]
    """Of `log.jsonl`."""
    preview: Path | None
    """The newest."""
    adapter: Path | None
    report: dict[str, Any] | None
    """Of the last training that was completed."""
    error: str | None
    is_complete: bool
    """Whether the last training was completed."""
    is_stopping: bool
    """Whether it still runs, but was told to stop."""


@dataclass
class Workplace:
    """The folder of the page's work. Names come from clients; paths never do."""

    folder: Path
    device: str = "auto"
    offer: Callable[[str, Path], object] = lambda name, path: None
    """Called with the name and the file of an adapter that was trained, from a thread of its own."""
    _starting: threading.Lock = field(default_factory=threading.Lock)
    _processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    _endings: dict[str, threading.Thread] = field(default_factory=dict)
    """Threads that wait for the end of a run, to offer its adapter."""
    _stopping: set[str] = field(default_factory=set)
    """Names of the runs whose process was told to stop: a second signal would end it before its state is saved."""

    @property
    def adapters(self) -> Path:
        """Folder of trained adapters; the server lists those that it finds there at its start."""
        return self.folder / "adapters"

    def pairs(self) -> list[str]:
        """Names of the pairs."""
        return _names(self.folder / "pairs")

    def runs(self) -> list[str]:
        """Names of the runs."""
        return _names(self.folder / "runs")

    def reports(self) -> list[str]:
        """Names of the runs with a report."""
        return [name for name in self.runs() if self.state(name).report is not None]

    def pairs_folder(self, name: str) -> Path:
        """The folder of pairs of this name."""
        return self.folder / "pairs" / checked_name(name)

    def run_folder(self, name: str) -> Path:
        """The folder of the run of this name."""
        return self.folder / "runs" / checked_name(name)

    def add_zip(self, name: str, archive: str | Path) -> Path:
        """Unpack pairs.

        Raises:
            UserError: the name is taken, or the file is no ZIP, too large, has or lists files outside of its folder, or
                has no pairs.
        """
        folder = self._free_pairs(name)
        writable_folder(folder.parent, "give --work another folder")
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as aside:
            top = Path(aside) / "zip"
            top.mkdir()
            _unpack(archive, top)
            while len(inside := list(top.iterdir())) == 1 and inside[0].is_dir():  # a ZIP of one folder
                top = inside[0]
            try:
                # Security: what an upload lists must not be read from elsewhere on this machine.
                with own_files_only():
                    listing = read_listing(top)
                if listing.outside():
                    raise UserError("the ZIP lists files outside of its folder", "bad-data")
            except UserError as error:
                text = str(error).replace(f"{top}{os.sep}", "").replace(str(top), "the ZIP")
                raise UserError(text, error.code) from error
            self._free_pairs(name)
            top.rename(folder)
        return folder

    async def make_pairs(self, name: str, images: Sequence[str], condition: str, size: int | None) -> dict[str, Any]:
        """Make pairs of uploaded images, with captions from uploaded .txt files of the same name.

        Images of the same name get a number.

        Raises:
            UserError: they cannot be made, or several images of the same name have a caption.
        """
        names = _distinct_names(images)
        folder = writable_folder(self._free_pairs(name), "give --work another folder")
        sources = folder.with_name(f".{folder.name}-images")
        try:
            writable_folder(sources, "give --work another folder")
            for path, file in zip(images, names, strict=True):
                shutil.copyfile(path, sources / file)
            square = [] if size is None else ["--size", str(size)]
            return await run_command(
                "pairs",
                str(sources),
                "--out",
                str(folder),
                "--conditions",
                condition,
                "--copy",
                "--workers",
                "1",
                *square,
            )
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            shutil.rmtree(sources, ignore_errors=True)

    async def check(self, name: str) -> dict[str, Any]:
        """The report of `controlkit pairs --check`, with the path of its contact sheet under `sheet`.

        Raises:
            UserError: there are no pairs of this name, or they cannot be read.
        """
        folder = self.pairs_folder(name)
        if not folder.is_dir():
            raise UserError(f"there are no pairs {name!r}", "missing-file")
        sheet = self.folder / "sheets" / f"{folder.name}.png"
        sheet.parent.mkdir(exist_ok=True)
        return await run_command("pairs", "--check", str(folder), "--sheet", str(sheet), accept=("bad-data",))

    def _free_pairs(self, name: str) -> Path:
        folder = self.pairs_folder(name)
        if folder.exists():
            raise UserError(f"there are pairs {folder.name!r} already; choose another name", "would-overwrite")
        return folder

    def start(self, name: str, pairs: str, *, base: str, control: str, steps: int, learning_rate: float | None) -> None:
        """Start a run, or resume it: the same settings again.

        Args:
            base: what `adapt --base` takes.
            control: what `adapt --control` takes: the base control.

        Raises:
            UserError: it runs already, or there are no such pairs.
        """
        with self._starting:
            run = self.run_folder(name)
            if self._runs(run.name):
                raise UserError(f"{run.name} runs already", "in-use")
            data = self.pairs_folder(pairs)
            if not data.is_dir():
                raise UserError(f"there are no pairs {pairs!r}; make or upload some in Pairs", "missing-file")
            if not 1 <= steps <= 100_000:
                raise UserError(f"steps is {steps}; expected 1 to 100000", "out-of-range")
            writable_folder(run.parent, "give --work another folder")
            every = max(1, min(100, steps // 4))
            words = ["adapt", str(data), "--base", base, "--control", control, "--name", "adapter"]
            words += ["--steps", str(steps), "--set", f"preview_every={every}", "--set", "log_every=1"]
            words += ["--device", self.device, "--out", str(run), "--json"]
            if learning_rate:
                words += ["--learning-rate", f"{learning_rate:g}"]
            self._run(run, words)

    def _run(self, run: Path, words: Sequence[str]) -> None:
        out = self._file(run, "out")
        if "report" in _json(out):  # kept until another training is completed
            out.replace(self._file(run, "report"))
        with out.open("wb") as answer, self._file(run, "log").open("ab") as log:
            self._processes[run.name] = subprocess.Popen(
                [sys.executable, "-m", "controlkit", *words],
                stdout=answer,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C in the server's terminal would be a second signal beside `stop_all`'s
            )
        self._stopping.discard(run.name)
        ending = threading.Thread(target=self._end, args=(run.name, self._processes[run.name]), daemon=True)
        self._endings[run.name] = ending
        ending.start()

    def _end(self, name: str, process: subprocess.Popen[bytes]) -> None:
        """Wait for the end of a run, and offer its adapter."""
        if process.wait() != 0:
            return
        if (kept := self._keep(name)) is not None:
            self.offer(name, kept)

    def _keep(self, name: str) -> Path | None:
        """Copy the adapter of a run to the adapters; returns the copy."""
        adapter = self.run_folder(name) / "adapter.safetensors"
        if not adapter.is_file():
            return None
        kept = self.adapters / f"{name}.safetensors"
        self.adapters.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(".part")
        shutil.copyfile(adapter, part)
        part.replace(kept)  # whole, and the worker may have the old one open
        return kept

    def keep_finished(self) -> None:
        """Keep the adapters of runs that were completed after their server had been killed."""
        for name in self.runs():
            adapter, kept = self.run_folder(name) / "adapter.safetensors", self.adapters / f"{name}.safetensors"
            is_new = adapter.is_file() and (not kept.exists() or kept.stat().st_mtime < adapter.stat().st_mtime)
            if is_new and self.state(name).is_complete:
                self._keep(name)

    def stop(self, name: str) -> None:
        """Let a run save its state and end; without effect if it is stopping already.

        Raises:
            UserError: it does not run.
        """
        name = checked_name(name)
        if not self._runs(name):
            raise UserError(f"{name} does not run", "unknown-name")
        if name not in self._stopping:
            self._stopping.add(name)
            self._processes[name].terminate()

    def stop_all(self) -> None:
        """End all runs, as `stop`."""
        for name in self._processes:
            if self._runs(name):
                self.stop(name)
        for process in self._processes.values():
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()

    def state(self, name: str) -> RunState:
        """A run as it is now."""
        run = self.run_folder(name)
        answer = _json(self._file(run, "out"))
        report = answer.get("report")
        error = answer.get("error") if isinstance(answer.get("error"), dict) else None
        previews = sorted((run / "previews").glob("*.png"))
        adapter = run / "adapter.safetensors"
        return RunState(
            is_running=self._runs(run.name),
            lines=_lines(run / "log.jsonl"),
            preview=previews[-1] if previews else None,
            adapter=adapter if adapter.is_file() else None,
            report=report or _json(self._file(run, "report")).get("report"),
            error=None if error is None else self.public(str(error.get("message", ""))),
            is_complete=report is not None,
            is_stopping=run.name in self._stopping and self._runs(run.name),
        )

    def public(self, text: str) -> str:
        """A text without the paths of this machine."""
        return text.replace(f"{self.folder}{os.sep}", "")

    def _file(self, run: Path, what: str) -> Path:
        return run.with_name(f".{run.name}.{what}")

    def _runs(self, name: str) -> bool:
        ending = self._endings.get(name)
        return ending is not None and ending.is_alive()


async def run_command(*words: str, accept: Sequence[str] = ()) -> dict[str, Any]:
    """What a command of controlkit answers with `--json`.

    Args:
        accept: codes of errors beside which the answer is complete.

    Raises:
        UserError: the command's own.
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "controlkit", *words, "--json", "--quiet"),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, said = await process.communicate()
    try:
        answer: dict[str, Any] = json.loads(out)
    except ValueError as error:
        raise RuntimeError(said.decode(errors="replace")[-2000:]) from error
    failed = answer.get("error")
    if isinstance(failed, dict) and failed.get("code") not in accept:
        raise UserError(str(failed.get("message")), failed.get("code") or "bad-data")
    return answer


_UNREADABLE = (zipfile.BadZipFile, OSError, RuntimeError, EOFError, zlib.error, lzma.LZMAError)
"""What damaged archives raise, encrypted ones, and ones of a compression that Python lacks."""


def _unpack(archive: str | Path, folder: Path) -> None:
    """Unpack a ZIP, without the files that file managers add.

    Raises:
        UserError: it cannot be read, is too large, or has entries outside of its folder.
    """
    try:
        with zipfile.ZipFile(archive) as file:
            entries = [each for each in file.infolist() if not each.is_dir()]
            if len(entries) > _ENTRIES or sum(each.file_size for each in entries) > _UNPACKED:
                raise UserError(f"the ZIP is larger than {_UNPACKED / 1e9:g} GB or {_ENTRIES} files", "bad-data")
            for each in entries:
                path = PurePosixPath(each.filename)
                if path.is_absolute() or ".." in path.parts or "\\" in each.filename or ":" in each.filename:
                    raise UserError(f"the ZIP has an entry {each.filename!r} outside of its folder", "bad-data")
                if not path.parts or path.parts[0] == "__MACOSX" or path.name in _ADDED or path.name.startswith("._"):
                    continue
                target = folder / path
                target.parent.mkdir(parents=True, exist_ok=True)
                with file.open(each) as source, target.open("wb") as copy:
                    shutil.copyfileobj(source, copy)
    except _UNREADABLE as error:
        raise UserError(f"the file is no ZIP that can be read ({error})", "unreadable-file") from error


def _names(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a log that may be being written."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    found = []
    for line in text.splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def _distinct_names(files: Sequence[str]) -> list[str]:
    """Names for files from several folders, such that no two images have the same stem, in any case.

    Raises:
        UserError: it cannot be known which of the images a caption belongs to.
    """
    paths = [Path(file) for file in files]
    captions = Counter(path.stem.lower() for path in paths if path.suffix.lower() == ".txt")
    images = Counter(path.stem.lower() for path in paths if path.suffix.lower() != ".txt")
    for stem, count in captions.items():
        if count > 1 or images[stem] > 1:
            raise UserError(
                f"several files are named {stem}, and one is a caption; rename them, each caption as its image",
                "bad-data",
            )
    names, taken = [], set(images) | set(captions)
    used: set[str] = set()
    for path in paths:
        stem = path.stem
        if path.suffix.lower() != ".txt":
            if stem.lower() in used:
                numbered = (f"{path.stem}-{number}" for number in itertools.count(2))
                stem = next(each for each in numbered if each.lower() not in taken)
            used.add(stem.lower())
            taken.add(stem.lower())
        names.append(f"{stem}{path.suffix}")
    return names
