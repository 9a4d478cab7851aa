"""MultiGen-20M from disk, with the condition images that are listed beside its images."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from controlkit.bases.base import Base
from controlkit.controls.control import Control
from controlkit.data.multigen import MultiGen
from controlkit.data.prompts import PromptLimit, count_note, empty_note
from controlkit.errors import UserError
from controlkit.images import to_tensor
from controlkit.training.recipe import ControlRecipe
from controlkit.training.sources.registry import source
from controlkit.training.sources.source import Batch, HeldOut, Source, Step

_MOST_TORN = 100
_READERS = 8
_LOOKED_AT = 1000


@dataclass(frozen=True, kw_only=True)
class MultiGenSettings(ControlRecipe):
    """Settings of training on MultiGen-20M."""

    multigen: str
    """Folder of MultiGen-20M (`json_files`, `images`, `conditions`), whose tasks are the conditions."""
    variants: int = 4
    """Unused; earlier recipes have it, and it is a part of what their runs are known by."""


@source
class MultiGenSource(Source):
    """Images are encoded as they come, since no cache would hold millions of latents.

    Torn and missing files are passed over for the next line and counted on standard error. The first lines of every
    task are held out.
    """

    name = "multigen"
    Settings = MultiGenSettings

    def __init__(self, recipe: MultiGenSettings) -> None:
        self.prompt_drop = recipe.prompt_drop
        self.kept = recipe.score_pictures
        self.tasks = {task: MultiGen(recipe.multigen, task) for task in recipe.condition_names}
        for lines in self.tasks.values():
            if len(lines) <= self.kept:
                raise UserError(f"{lines.path} has {len(lines)} lines; {self.kept} are held out, so more are needed")
        self.torn = 0
        self._readers = ThreadPoolExecutor(_READERS)

    def notes(self, base: Base) -> list[str]:
        """Empty prompts of every task, and how many of some lines' prompts are longer than the base reads."""
        limit = PromptLimit(reader="this base", tokens=base.prompt_tokens, cut_from=base.cut_from)
        told = []
        for task, lines in self.tasks.items():
            some = np.linspace(0, len(lines) - 1, min(_LOOKED_AT, len(lines))).astype(int)
            prompts = [("", text) for index in some if (text := _prompt(lines, int(index))) is not None]
            sample = "" if len(prompts) == len(lines) else f", of {len(prompts)} lines that were looked at"
            notes = empty_note(lines.empty_prompts(), len(lines))
            notes += [f"{note}{sample}" for note in count_note(prompts, limit)]
            told += [f"{task}: {note}" for note in notes]
        return told

    def prepare(self, base: Base, control: Control) -> None:
        self.base = base

    def batch(self, condition: str, step: Step) -> Batch:
        lines, rng, count, mine = self.tasks[condition], step.rng(), step.global_batch, step.local_slice
        chosen = rng.integers(self.kept, len(lines), size=count)[mine]
        seeds = rng.integers(2**63, size=count)[mine]
        dropped = rng.random(count)[mine] < self.prompt_drop
        jobs = zip([condition] * len(chosen), chosen.tolist(), seeds.tolist(), strict=True)
        read = list(self._readers.map(lambda job: self._read(*job), jobs))
        x = to_tensor([target for _, target, _ in read]).to(self.base.device) * 2 - 1
        return Batch(
            latents=self.base.encode_image(x).float(),
            text=["" if drop else prompt for (_, _, prompt), drop in zip(read, dropped, strict=True)],
            condition_images=to_tensor([image for image, _, _ in read]).to(self.base.device),
        )

    def samples(self, condition: str, step: Step) -> list[str]:
        lines = self.tasks[condition]
        chosen = step.rng().integers(self.kept, len(lines), size=step.global_batch)
        return [f"{lines.path}, line {index + 1}: {lines.entry(int(index))[1]}" for index in chosen]

    def held_out(self, condition: str) -> HeldOut:
        images, targets, prompts = zip(*(self._read(condition, index, None) for index in range(self.kept)), strict=True)
        return HeldOut(condition_images=images, targets=targets, prompts=prompts)

    def _read(self, condition: str, index: int, seed: int | None) -> tuple[np.ndarray, np.ndarray, str]:
        lines = self.tasks[condition]
        first, end = (0, self.kept) if seed is None else (self.kept, len(lines))
        reason: UserError | None = None
        for step in range(min(_MOST_TORN, end - first)):
            rng = None if seed is None else np.random.default_rng(seed)
            try:
                return lines.pair(first + (index - first + step) % (end - first), self.base.size, rng)
            except UserError as error:
                reason = error
                self.torn += 1
                print(f"passed over ({self.torn} so far): {error}", file=sys.stderr, flush=True)
        raise UserError(f"{_MOST_TORN} pairs of {condition} in a row cannot be read; the last: {reason}") from reason


def _prompt(lines: MultiGen, index: int) -> str | None:
    """The prompt of a line; None where it cannot be read, which training says when it comes to it."""
    try:
        return lines.entry(index)[2]
    except UserError:
        return None
