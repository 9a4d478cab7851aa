"""MultiGen-20M from disk, with its own condition images."""

from __future__ import annotations

import multiprocessing
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from controlkit.bases.base import Base
from controlkit.controls.control import Control
from controlkit.data.multigen import MultiGen
from controlkit.data.prompts import PromptLimit, count_note, empty_note
from controlkit.errors import UserError
from controlkit.images import stacked
from controlkit.training.ahead import in_data_worker
from controlkit.training.recipe import ControlRecipe
from controlkit.training.sources.registry import source
from controlkit.training.sources.source import Batch, HeldOut, Source, Step

_MAX_SKIPPED = 100
_READERS = 8
_SAMPLED_LINES = 1000


@dataclass(frozen=True, kw_only=True)
class MultiGenSettings(ControlRecipe):
    """Settings of training on MultiGen-20M."""

    multigen: str
    """Folder of MultiGen-20M (`json_files`, `images`, `conditions`); its tasks are the conditions."""
    variants: int = 4
    """Unused, but part of the fingerprint of earlier runs."""


@source
class MultiGenSource(Source):
    """MultiGen-20M, encoded in the step, because every use of an image is another crop of it. `PairSource` reads the
    same folder with a few fixed crops, whose latents are cached.

    Unreadable files are skipped for the next line and counted on standard error. The first lines of every task are held
    out.
    """

    name = "multigen"
    Settings = MultiGenSettings
    prepares_ahead = True

    def __init__(self, recipe: MultiGenSettings) -> None:
        self.prompt_drop = recipe.prompt_drop
        self.held_out_count = recipe.score_pictures
        self.tasks = {task: MultiGen(recipe.multigen, task) for task in recipe.condition_names}
        for lines in self.tasks.values():
            if len(lines) <= self.held_out_count:
                raise UserError(
                    f"{lines.path} has {len(lines)} lines, and {self.held_out_count} are held out; more are needed",
                    "empty-data",
                )
        self._skipped = multiprocessing.Value("q", 0)  # of all data workers
        self._readers = ThreadPoolExecutor(_READERS)

    def notes(self, base: Base) -> list[str]:
        """Empty prompts of every task, and prompts longer than the base reads in a sample of lines."""
        limit = PromptLimit(reader="this base", tokens=base.prompt_tokens, cut_from=base.cut_from)
        notes = []
        for task, lines in self.tasks.items():
            indices = np.linspace(0, len(lines) - 1, min(_SAMPLED_LINES, len(lines))).astype(int)
            prompts = [("", text) for index in indices if (text := _prompt(lines, int(index))) is not None]
            sample = "" if len(prompts) == len(lines) else f", in a sample of {len(prompts)} lines"
            of_task = empty_note(lines.empty_prompts(), len(lines))
            of_task += [f"{note}{sample}" for note in count_note(prompts, limit)]
            notes += [f"{task}: {note}" for note in of_task]
        return notes

    def prepare(self, base: Base, control: Control) -> None:
        self.base = base

    def batch(self, condition: str, step: Step) -> Batch:
        lines, rng, count, local = self.tasks[condition], step.rng(), step.global_batch, step.local_slice
        chosen = rng.integers(self.held_out_count, len(lines), size=count)[local]
        seeds = rng.integers(2**63, size=count)[local]
        dropped = rng.random(count)[local] < self.prompt_drop
        jobs = zip([condition] * len(chosen), chosen.tolist(), seeds.tolist(), strict=True)
        # A data worker has no threads of its parent, and others work beside it.
        run = map if in_data_worker() else self._readers.map
        samples = list(run(lambda job: self._read(*job), jobs))
        return Batch(
            images=stacked([target for _, target, _ in samples]),
            text=["" if drop else prompt for (_, _, prompt), drop in zip(samples, dropped, strict=True)],
            condition_images=stacked([image for image, _, _ in samples]),
        )

    def samples(self, condition: str, step: Step) -> list[str]:
        lines = self.tasks[condition]
        chosen = step.rng().integers(self.held_out_count, len(lines), size=step.global_batch)
        return [f"{lines.path}, line {index + 1}: {lines.entry(int(index))[1]}" for index in chosen]

    def held_out(self, condition: str) -> HeldOut:
        images, targets, prompts = zip(
            *(self._read(condition, index, None) for index in range(self.held_out_count)), strict=True
        )
        return HeldOut(condition_images=images, targets=targets, prompts=prompts)

    def _read(self, condition: str, index: int, seed: int | None) -> tuple[np.ndarray, np.ndarray, str]:
        lines = self.tasks[condition]
        first, end = (0, self.held_out_count) if seed is None else (self.held_out_count, len(lines))
        reason: UserError | None = None
        for step in range(min(_MAX_SKIPPED, end - first)):
            rng = None if seed is None else np.random.default_rng(seed)
            try:
                return lines.pair(first + (index - first + step) % (end - first), self.base.size, rng)
            except UserError as error:
                reason = error
                with self._skipped.get_lock():
                    self._skipped.value += 1
                    print(f"skipped ({self._skipped.value} so far): {error}", file=sys.stderr, flush=True)
        raise UserError(
            f"{_MAX_SKIPPED} consecutive pairs of {condition} cannot be read; the last: {reason}", "bad-data"
        ) from reason


def _prompt(lines: MultiGen, index: int) -> str | None:
    """The prompt of a line; None if it cannot be read, which training reports when it reads the line."""
    try:
        return lines.entry(index)[2]
    except UserError:
        return None
