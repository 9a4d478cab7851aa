"""Where the pictures, prompts and condition images of a step come from."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from controlkit import conditions
from controlkit.bases.base import Base, network_key
from controlkit.data.multigen import MultiGen
from controlkit.data.prompts import PromptLimit, count_note, empty_note
from controlkit.errors import UserError
from controlkit.images import to_tensor
from controlkit.nano.drawings import Drawings
from controlkit.nano.icons import TRAINED_STYLES, IconSets, draw

_MOST_TORN = 100
_READERS = 8
_LOOKED_AT = 1000
_ALL = slice(None)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one step sees."""

    latents: Tensor
    """Scaled latents of the pictures, `[B, C, h, w]`, on the base's device."""
    images: Tensor
    """Condition images `[B, 3, H, W]` in [0, 1]."""
    prompts: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Held:
    """Held-out pictures of one condition, `uint8 [H, W, 3]`."""

    given: Sequence[np.ndarray]
    truths: Sequence[np.ndarray]
    prompts: Sequence[str]


class Source(ABC):
    """Pictures with prompts and condition images."""

    @abstractmethod
    def batch(
        self, condition: str, rng: np.random.Generator, count: int, prompt_drop: float, share: slice = _ALL
    ) -> Batch:
        """The `share` of `count` of them for one condition; the same `rng` gives the same."""

    @abstractmethod
    def names(self, condition: str, rng: np.random.Generator, count: int) -> list[str]:
        """What `batch` makes its `count` samples of with the same `rng`, for a person to find it."""

    def notes(self) -> list[str]:
        """What to tell of the data before training."""
        return []

    @abstractmethod
    def held_out(self, condition: str) -> Held:
        """Always the same few, that this condition is never trained on."""


class IconSource(Source):
    """Drawings of icons; conditions are computed from them as they are drawn, with random parameters."""

    def __init__(self, icons: str, base: Base, *, variants: int, seed: int, folder: Path, held_out: int) -> None:
        sets = IconSets(icons)
        self.base = base
        self.drawings = Drawings(
            sets.select(styles=TRAINED_STYLES, held_out=False),
            variants,
            seed,
            path=folder / "latents.safetensors",
            encode=lambda x: base.encode_picture(x.to(base.device)),
            key=network_key(base.vae),
        )
        rng = np.random.default_rng(0)
        kept = sets.select(styles=TRAINED_STYLES, held_out=True, drawable=True)
        self.test = [draw(kept[index], rng) for index in rng.permutation(len(kept))[:held_out]]

    def batch(
        self, condition: str, rng: np.random.Generator, count: int, prompt_drop: float, share: slice = _ALL
    ) -> Batch:
        kind = conditions.find(condition)
        chosen = [int(index) for index in rng.integers(len(self.drawings), size=count)]
        prompts = [self.drawings.prompt(index, rng, prompt_drop) for index in chosen]
        parameters = [kind.random_parameters(rng) for _ in chosen]
        mine = list(zip(chosen, parameters, strict=True))[share]
        images = [kind(self.drawings.draw(index).image, **values) for index, values in mine]
        latents = self.drawings.latents[torch.tensor(chosen[share])].float().to(self.base.device)
        return Batch(latents=latents, images=to_tensor(images).to(self.base.device), prompts=prompts[share])

    def names(self, condition: str, rng: np.random.Generator, count: int) -> list[str]:
        chosen = rng.integers(len(self.drawings), size=count)
        return [f"drawing {index}: {self.drawings.draw(int(index)).caption}" for index in chosen]

    def held_out(self, condition: str) -> Held:
        kind = conditions.find(condition)
        truths = [drawing.image for drawing in self.test]
        return Held(given=[kind(t) for t in truths], truths=truths, prompts=[d.caption for d in self.test])


class MultiGenSource(Source):
    """MultiGen-20M from disk; pictures are encoded as they come, since no cache would hold millions of latents.

    Torn and missing files are passed over for the next line and counted on standard error. The first lines of every
    task are held out.
    """

    def __init__(self, folder: str, tasks: Sequence[str], base: Base, *, held_out: int) -> None:
        self.base = base
        self.tasks = {task: MultiGen(folder, task) for task in tasks}
        for lines in self.tasks.values():
            if len(lines) <= held_out:
                raise UserError(f"{lines.path} has {len(lines)} lines; {held_out} are held out, so more are needed")
        self.kept = held_out
        self.torn = 0
        self._readers = ThreadPoolExecutor(_READERS)

    def batch(
        self, condition: str, rng: np.random.Generator, count: int, prompt_drop: float, share: slice = _ALL
    ) -> Batch:
        lines = self.tasks[condition]
        chosen = rng.integers(self.kept, len(lines), size=count)[share]
        seeds = rng.integers(2**63, size=count)[share]
        dropped = rng.random(count)[share] < prompt_drop
        jobs = zip([condition] * len(chosen), chosen.tolist(), seeds.tolist(), strict=True)
        read = list(self._readers.map(lambda job: self._read(*job), jobs))
        x = to_tensor([picture for _, picture, _ in read]).to(self.base.device) * 2 - 1
        return Batch(
            latents=self.base.encode_picture(x).float(),
            images=to_tensor([given for given, _, _ in read]).to(self.base.device),
            prompts=["" if drop else prompt for (_, _, prompt), drop in zip(read, dropped, strict=True)],
        )

    def notes(self) -> list[str]:
        """Empty prompts of every task, and how many of some lines' prompts are longer than the base reads."""
        limit = PromptLimit(reader="this base", tokens=self.base.prompt_tokens, cut_from=self.base.cut_from)
        told = []
        for task, lines in self.tasks.items():
            some = np.linspace(0, len(lines) - 1, min(_LOOKED_AT, len(lines))).astype(int)
            prompts = [("", text) for index in some if (text := _prompt(lines, int(index))) is not None]
            sample = "" if len(prompts) == len(lines) else f", of {len(prompts)} lines that were looked at"
            notes = empty_note(lines.empty_prompts(), len(lines))
            notes += [f"{note}{sample}" for note in count_note(prompts, limit)]
            told += [f"{task}: {note}" for note in notes]
        return told

    def names(self, condition: str, rng: np.random.Generator, count: int) -> list[str]:
        lines = self.tasks[condition]
        chosen = rng.integers(self.kept, len(lines), size=count)
        return [f"{lines.path}, line {index + 1}: {lines.entry(int(index))[1]}" for index in chosen]

    def held_out(self, condition: str) -> Held:
        read = [self._read(condition, index, None) for index in range(self.kept)]
        return Held(given=[r[0] for r in read], truths=[r[1] for r in read], prompts=[r[2] for r in read])

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
