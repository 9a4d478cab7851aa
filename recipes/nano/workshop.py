"""Where nano is made: a copy of the package whose assets are replaced one by one, and the commands that run on it.

The commands are those of the pages. They run with `runs/nano/staged/src` first on the path, so that `nano`, `canny` and
`nano/palette` mean the files that are being made.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pages import pages, without_figures
from steps import Outcome, digest

from controlkit.errors import UserError
from controlkit.files import read_json, sha256_of, write_json

if TYPE_CHECKING:
    from controlkit.bases.base import Base

PACKAGE = Path("src/controlkit")
ASSETS = PACKAGE / "assets"
RESULTS = Path("benchmarks/results/nano")
IMAGES = Path("docs/images")

NETWORKS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler", "model_index.json")
"""What a base's folder consists of; its model card is not among them."""

_TRIAL = 0.1
"""Part of a new training's budget for the steps in which their time is measured."""
_OF_BUDGET = 0.9
"""Part of what is left of the budget that the steps are to take."""
_PATIENCE = 120
"""Seconds in which a command that was interrupted saves its state."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A command that has ended."""

    printed: str
    """Its standard output."""
    interrupted: bool
    """Whether its time was over."""


class Workshop:
    """The folders and commands.

    Args:
        root: of the repository.
        budget: minutes for each training and study; None for no limit.
        device: of trainings, evaluations and studies; None for their own choice.
        given: a folder of controls to start from.
        say: tells a person something.
    """

    def __init__(
        self,
        root: Path,
        *,
        budget: float | None = None,
        device: str | None = None,
        given: Path | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self.root = root
        self.budget = budget
        self.device = device
        self.given = given
        self.say = say
        self.work = root / "runs" / "nano"
        self.staged = self.work / "staged"
        self.made = self.work / "make"
        self.assets = self.staged / ASSETS
        self.results = self.staged / RESULTS
        self.images = self.staged / IMAGES

    def prepare(self, *, keep_base: bool) -> None:
        """Bring the staged copy up to date with the code; what was made in it stays.

        Args:
            keep_base: whether the staged base is one that is being made; else it is the one that ships.
        """
        package = self.staged / PACKAGE
        for old in package.iterdir() if package.is_dir() else ():
            if old.name != "assets":
                shutil.rmtree(old) if old.is_dir() else old.unlink()
        ignored = shutil.ignore_patterns("__pycache__", "assets")
        shutil.copytree(self.root / PACKAGE, package, ignore=ignored, dirs_exist_ok=True)
        for source in (self.root / ASSETS).iterdir():
            is_made = source.name == "controls" or (source.name == "nano" and keep_base)
            if not is_made or not (self.assets / source.name).exists():
                _replace(source, self.assets / source.name)
        for folder in (ASSETS / "controls", ASSETS / "nano"):
            for source in _files_in(self.root / folder):
                self._stage(source)
        for folder in (RESULTS, IMAGES):
            (self.staged / folder).mkdir(parents=True, exist_ok=True)
            for source in _files_in(self.root / folder):
                self._stage(source)
        for page in pages(self.root):
            self._stage(page)
        write_json(self._copied, {"copied": self.copied})

    def _stage(self, source: Path) -> None:
        """Copy a file into the stage, unless a step has made it anew there.

        A page is copied, too, if the text around its figures was edited; results and images, if they are newer than
        what the step made.
        """
        path = source.relative_to(self.root)
        copy, name = self.staged / path, path.as_posix()
        now, staged, before = digest(source), digest(copy), self.copied.get(name)
        stays = staged not in (None, before)
        if stays and path.suffix == ".md":
            stays = _text_of(copy) == _text_of(source)
        elif stays and now != before and not path.is_relative_to(ASSETS):
            stays = copy.stat().st_mtime >= source.stat().st_mtime
        if not stays and staged != now:
            _replace(source, copy)
        if not stays or staged == now or before is None:
            self.copied[name] = now

    @cached_property
    def copied(self) -> dict[str, str | None]:
        """File relative to the root => its content when it was last copied into the stage.

        It tells what a step has made from what was edited in place since.
        """
        known: dict[str, str | None] = read_json(self._copied)["copied"] if self._copied.is_file() else {}
        return known

    @property
    def _copied(self) -> Path:
        return self.work / "copied.json"

    def is_made(self, path: Path) -> bool:
        """Whether the staged file, relative to the root, was made by a step: it is neither the one in place nor the one
        that was copied."""
        staged = digest(self.staged / path)
        return staged != digest(self.root / path) and staged != self.copied.get(path.as_posix())

    def is_edited(self, path: Path) -> bool:
        """Whether the file in place, relative to the root, has changed since it was copied into the stage."""
        return digest(self.root / path) != self.copied.get(path.as_posix())

    @property
    def base(self) -> tuple[Path, ...]:
        """The staged base's files, as inputs of a step."""
        return tuple(self.assets / "nano" / name for name in NETWORKS)

    def control(self, name: str) -> Path:
        """The staged file of a control that ships: `canny`, `nano/base`, ..."""
        return self.assets / "controls" / f"{name}.safetensors"

    @cached_property
    def icons(self) -> Path:
        """The rendered icons."""
        return self.root / "data" / "nano" / "icons.npz"

    # Commands

    @property
    def environment(self) -> dict[str, str]:
        """Variables with which the staged package is imported."""
        found = {name: value for name, value in os.environ.items() if name != "CONTROLKIT_NANO"}
        path = [str(self.staged / "src"), *filter(None, [found.get("PYTHONPATH")])]
        return {**found, "PYTHONPATH": os.pathsep.join(path)}

    def run(
        self, arguments: Sequence[str], *, minutes: float | None = None, until: Callable[[], bool] = lambda: False
    ) -> Run:
        """Run `controlkit` on the staged package.

        Ctrl-C, the end of `minutes`, and `until` when it is true interrupt it as a person would.

        Raises:
            UserError: it fails.
        """
        interrupted = False
        with tempfile.TemporaryFile("w+", encoding="utf-8") as printed:
            process = subprocess.Popen(
                [sys.executable, "-m", "controlkit", *arguments],
                cwd=self.root,
                env=self.environment,
                stdout=printed,
                start_new_session=True,  # Ctrl-C comes from here alone: a second one would end it without its state
            )
            end = None if minutes is None else time.monotonic() + 60 * minutes
            try:
                while not interrupted:
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(1)
                        break
                    interrupted = until() or (end is not None and time.monotonic() >= end)
                if interrupted:
                    _interrupt(process)
            except BaseException:
                _interrupt(process)
                raise
            printed.seek(0)
            text = printed.read()
        if process.returncode and not interrupted:
            raise UserError(f"controlkit {' '.join(arguments)} failed (exit code {process.returncode})", "unsupported")
        return Run(printed=text, interrupted=interrupted and process.returncode != 0)

    @property
    def _on_device(self) -> list[str]:
        return [] if self.device is None else ["--device", self.device]

    def report(self, file: str, commands: Mapping[str, Sequence[str]], **more: Mapping[str, Any]) -> Outcome:
        """Run commands that report and write what they print as one JSON file of results.

        Args:
            commands: label => command.
            more: entries for each label besides the reports.
        """
        runs: dict[str, Any] = {}
        for label, command in commands.items():
            self.say(f"  {self.shown(command)}")
            made = json.loads(self.run([*command, *self._on_device, "--json"]).printed)
            own = {name: values[label] for name, values in more.items() if label in values}
            runs[label] = {"command": self.shown(command), **own, "reports": shortened(made["reports"])}
        write_json(self.results / f"{file}.json", {"runs": runs})
        return Outcome()

    def shown(self, command: Sequence[str]) -> str:
        """A command as results name it, without where its sheet or folder is."""
        words = list(command)
        for option in ("--sheet", "--out"):
            if option in words:
                at = words.index(option)
                del words[at : at + 2]
        return " ".join(["controlkit", *(word.removeprefix(f"{self.root}/") for word in words)])

    def study(
        self,
        file: str,
        name: str,
        arguments: Sequence[str],
        reads: Sequence[Path],
        images: Mapping[str, str],
        label: str = "default",
    ) -> Outcome:
        """Run a study into a folder of its own for this base and these controls.

        Args:
            reads: what its numbers depend on.
            images: what the study calls a file => its name among the images of the pages.
        """
        key = sha256_of(name, *arguments, *(digest(path) or "" for path in reads))[:12]
        out = self.made / "studies" / f"{file}-{key}"
        command = ["study", name, *arguments, "--out", str(out.relative_to(self.root)), *self._on_device, "--json"]
        made = self.run(command, minutes=self.budget)
        if made.interrupted:
            return Outcome(complete=False, note="stopped by the budget; it resumes")
        told = json.loads(made.printed)
        for called, image in images.items():
            shutil.copyfile(self.root / told["files"][called], self.images / image)
        entry: dict[str, Any] = {"command": self.shown(["study", name, *arguments])}
        entry["reports"] = shortened(told["reports"])
        if "cells" in told:
            entry["cells"] = told["cells"]
        write_json(self.results / f"{file}.json", {"runs": {label: entry}})
        return Outcome()

    # Training

    def train(
        self,
        name: str,
        recipe: Path,
        reads: Sequence[Path],
        results: Mapping[str, Path],
        settings: Sequence[str] = (),
        start: str | None = None,
        places: Sequence[str] = (),
    ) -> Outcome:
        """Train by a recipe, or as much of it as the budget allows, and copy its results.

        Where the budget does not suffice for all steps, the learning rate falls over those that fit.

        The run's folder belongs to the recipe and what it reads, so another base begins another run.

        Args:
            reads: files and folders that the training depends on.
            results: file or folder of the run => where it is copied.
            settings: of the recipe, `key=value`.
            start: the control to start from, if the recipe takes one.
            places: folders of the given controls, and of those that ship, in which files are looked for.
        """
        from controlkit.training.log import total_seconds
        from controlkit.training.recipes import read_recipe
        from controlkit.training.run_folder import fingerprint

        whole = read_recipe(recipe, [*settings, "out=out"])
        key = sha256_of(fingerprint(whole), *(digest(path) or "" for path in reads))[:12]
        out = self.made / "runs" / f"{name}-{key}"
        steps = max(whole.steps, _steps_done(out))
        if self.budget == 0 and not _steps_done(out):
            return self._taken(name, results, places)
        given, told = self._start(out, start, places, results)
        # Relative to the root, in which commands run: files tell what they were made from.
        overrides = [*settings, f"out={out.relative_to(self.root)}"]
        overrides += [] if given is None else [f"start={given.relative_to(self.root)}"]
        overrides += [] if self.device is None else [f"device={self.device}"]
        command = ["train", str(recipe.relative_to(self.root))]
        for override in overrides:
            command += ["--set", override]
        finished, minutes, aim = False, self.budget, steps
        if minutes and not _steps_done(out):  # to learn how many steps fit
            began, trial = time.monotonic(), 60 * _TRIAL * minutes
            whole_run = [*command, "--set", f"steps={steps}"]
            finished = not self.run(whole_run, minutes=minutes, until=lambda: total_seconds(out) >= trial).interrupted
            minutes = max(0.0, minutes - (time.monotonic() - began) / 60)
        if minutes and (done := _steps_done(out)):
            each = total_seconds(out) / done / 60
            aim = min(steps, done + max(1, int(_OF_BUDGET * minutes / each)))
        if minutes != 0 and not finished:
            finished = not self.run([*command, "--set", f"steps={aim}"], minutes=minutes).interrupted
        done = _steps_done(out)
        if done == 0:
            raise UserError(f"{name}: no step was done within {self.budget:g} minutes; give it more", "interrupted")
        if not finished:  # the state is there, the finished files are not
            self.run([*command, "--set", f"steps={done}"])
        for result, destination in results.items():
            _replace(out / result, destination)
        unfinished = "" if done >= steps else f"{done:,} of {steps:,} steps are done; it resumes"
        return Outcome(complete=done >= steps, note="; ".join(filter(None, (unfinished, told))))

    def _start(
        self, out: Path, start: str | None, places: Sequence[str], results: Collection[str]
    ) -> tuple[Path | None, str]:
        """The control that a run starts from, and what to say about it.

        It is kept beside the run, with those of the run's results that are there: adapters go on with their base
        control.
        """
        if _steps_done(out):  # a run resumes with the start that it records
            recorded = read_json(out / "recipe.json").get("start")
            return None if recorded is None else self.root / recorded, ""
        folder = out.with_name(f"{out.name}-start")
        kept = folder / f"{start}.safetensors"
        if kept.exists():
            return kept, ""
        if start is None:
            return None, ""
        shipped = self.root / ASSETS / "controls"
        for source in filter(None, (self.given, shipped)):
            for path in (source / place / kept.name for place in places):
                fits, same = self.fit(path) if path.is_file() else (False, False)
                if fits:
                    for name in {kept.name, *results} - {kept.name}:
                        if (path.parent / name).is_file():
                            _replace(path.parent / name, folder / name)
                    _replace(path, kept)
                    which = "the one that ships" if source == shipped else "the one that was given"
                    return kept, f"started from {which}, of {'this' if same else 'another'} base"
        return None, ""

    def _taken(self, name: str, results: Mapping[str, Path], places: Sequence[str]) -> Outcome:
        """Take the results from the files that were given, without training."""
        for result, destination in results.items():
            found = [] if self.given is None else [self.given / place / result for place in places]
            mine = next((path for path in found if path.is_file() and self.fit(path)[1]), None)
            if mine is None:
                raise UserError(
                    f"{name}: nothing is trained yet, and no {result} of this base is given; give a --budget above 0",
                    "missing-file",
                )
            _replace(mine, destination)
        return Outcome(complete=False, note="taken as given, not trained further")

    def fit(self, path: Path) -> tuple[bool, bool]:
        """Whether the control at `path` fits the staged base, and whether it was trained on it."""
        from controlkit.bases.load import load_base
        from controlkit.formats.load import load_control
        from controlkit.formats.metadata import read_metadata

        base = load_base(self.assets / "nano")
        metadata = read_metadata(path)
        same = metadata.get("control.base_fingerprint") == base.fingerprint
        if metadata.get("control.base_control_fingerprint"):  # an adapter fits where its base control does
            return same, same
        try:
            load_control(path, base)
        except UserError:
            return False, same
        return True, same


def parts_of(given: Path) -> list[Path]:
    """The parts of a base in a folder; a file is one itself if it is called as such."""
    if given.is_file():
        return [given] if given.name in _SINGLE else []
    return [given / name for name in (*NETWORKS, *_SINGLE) if (given / name).exists()]


def assemble_base(given: Path, shipped: Path, out: Path) -> None:
    """Write a base's folder from given parts, the rest as it ships, in fp16.

    Args:
        given: a diffusers folder, a folder of some of its parts (`unet` may be `unet.safetensors`), or one such file.
        shipped: folder of the base that ships.
        out: the folder that is written; a model card in it stays.

    Raises:
        UserError: there are no parts, or they do not fit each other.
    """
    from controlkit.bases.load import load_base
    from controlkit.nano.base_objective import save_base

    with tempfile.TemporaryDirectory(dir=_folder(out.parent), prefix=".base-") as folder:
        parts = Path(folder) / "parts"
        shutil.copytree(shipped, parts, ignore=shutil.ignore_patterns("README.md"))
        found = parts_of(given)
        if not found:
            raise UserError(
                f"{given} has no part of a base; expected {', '.join(NETWORKS)} or {', '.join(_SINGLE)}", "missing-file"
            )
        for path in found:
            if path.name in _SINGLE:
                shutil.copyfile(path, parts / _SINGLE[path.name])
            else:
                _replace(path, parts / path.name)
        made = Path(folder) / "made"
        base = load_base(parts)
        _check_parts(base)
        save_base(base, made)
        given_networks = {path.name.removesuffix(".safetensors") for path in found} - _AS_THEY_ARE
        for name in NETWORKS:
            _replace((made if name in given_networks else parts) / name, out / name)


def _check_parts(base: Base) -> None:
    """Call the networks of a base together once.

    Raises:
        UserError: their shapes do not fit.
    """
    import torch

    side = base.size // base.factor
    latent = torch.zeros(1, base.latent_channels, side, side)
    try:
        with torch.no_grad():
            base.decode(base.predict(latent, torch.tensor([500]), base.encode_text([""])))
    except RuntimeError as error:
        raise UserError(f"the parts of the base do not fit each other: {error}", "incompatible") from error


_AS_THEY_ARE = {"tokenizer", "scheduler", "model_index.json"}
"""Parts of a base that are copied; networks are written anew, in fp16."""

_SINGLE = {
    "unet.safetensors": "unet/diffusion_pytorch_model.safetensors",
    "vae.safetensors": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder.safetensors": "text_encoder/model.safetensors",
}
"""A file of one network's weights => its place in a base's folder, under the configuration that is there."""


def shortened(value: Any) -> Any:
    """Plain values with lists of numbers that follow each other as words (`0 to 95`)."""
    if isinstance(value, Mapping):
        return {key: shortened(inner) for key, inner in value.items()}
    if isinstance(value, list):
        if len(value) > 3 and all(type(one) is int for one in value) and value == [*range(value[0], value[-1] + 1)]:
            return f"{value[0]} to {value[-1]}"
        return [shortened(one) for one in value]
    return value


def made_of_files(files: Mapping[str, Path]) -> dict[str, Any]:
    """Name => how the control in its file was made."""
    from controlkit.formats.metadata import provenance_of, read_metadata

    return {name: provenance_of(read_metadata(path)) for name, path in files.items()}


def _steps_done(out: Path) -> int:
    """Steps of the run in a folder; 0 where none is."""
    from controlkit.training.state import step_of

    path = out / "state.safetensors"
    return step_of(path) if path.is_file() else 0


def _interrupt(process: subprocess.Popen[bytes]) -> None:
    """Ask a command to save its state and end, and wait for it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        process.send_signal(number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_PATIENCE)
            return
    process.wait()


def _files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))


def _text_of(page: Path) -> str:
    return without_figures(page.read_text(encoding="utf-8"))


def _replace(source: Path, destination: Path) -> None:
    """Copy a file or folder over another; the old one stays until the copy is whole."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=".copy-") as folder:
        copy = Path(folder) / "copy"
        if source.is_dir():
            shutil.copytree(source, copy)
            if destination.exists():
                destination.rename(Path(folder) / "old")
        else:
            shutil.copyfile(source, copy)
        copy.replace(destination)


def _folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path
