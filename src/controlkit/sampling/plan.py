"""When residuals are computed: what a control reads decides.

A control that reads the noisy latent runs at every step for every picture. One that does not is run for all its
steps before sampling, in batches over time, once for a (condition, prompt), and its residuals are shared by every
picture. A plan changes when work is done, never what comes out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from controlkit.bases.base import Text, concatenate
from controlkit.bases.residuals import Residuals
from controlkit.controls.control import Control, Reads

ROWS_AT_ONCE = 32
"""Largest batch in which the residuals of several steps are computed ahead of sampling."""


@dataclass(frozen=True)
class ActiveControl:
    """A control with its hint, ready to run."""

    control: Control
    hint: Tensor
    """From `Control.encode`: batch 1 for all pictures, or one for each picture."""
    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0

    def acts_at(self, index: int, steps: int) -> bool:
        """Whether it acts at step `index` of `steps` (as in diffusers, a step counts if it lies wholly within)."""
        return self.weight != 0 and index / steps >= self.start and (index + 1) / steps <= self.end

    def of_pictures(self, pictures: slice) -> ActiveControl:
        """The same for some of the pictures."""
        return self if len(self.hint) == 1 else replace(self, hint=self.hint[pictures])


class Plan:
    """The residuals of several controls along one schedule.

    Args:
        uses: the controls.
        timesteps: of the schedule, in the order of sampling.
        texts: the prompts of each part of the batch (one part, or negative and positive for guidance); batch 1
            for all pictures, or one for each picture.
    """

    def __init__(self, uses: Sequence[ActiveControl], timesteps: Tensor, texts: Sequence[Text]) -> None:
        self.uses = uses
        self.timesteps = timesteps
        self.texts = texts
        self._ahead = {
            position: self._compute_ahead(use)
            for position, use in enumerate(uses)
            if Reads.NOISE not in use.control.reads
        }

    def residuals(self, index: int, x_t: Tensor) -> Residuals | None:
        """The sum of all residuals at step `index`, or None if no control acts.

        Args:
            x_t: `[parts * B, C, h, w]`, the parts one after another.
        """
        parts, steps = len(self.texts), len(self.timesteps)
        batch = len(x_t) // parts
        total: Residuals | None = None
        for position, use in enumerate(self.uses):
            if not use.acts_at(index, steps):
                continue
            if position in self._ahead:
                made = self._ahead[position][index].map(lambda r: _repeat(r, len(x_t)))
            else:
                made = self._run(use, self.timesteps[index : index + 1], batch, x_t)
            made = made.scaled(use.weight)
            total = made if total is None else total + made
        return total

    def _compute_ahead(self, use: ActiveControl) -> dict[int, Residuals]:
        """Step -> residuals of every part, for every step at which `use` acts; one row a part if all share them."""
        batch = max(len(use.hint), *(len(text.tokens) for text in self.texts))
        rows = batch * len(self.texts)
        wanted = [index for index in range(len(self.timesteps)) if use.acts_at(index, len(self.timesteps))]
        if Reads.TIME not in use.control.reads:
            made = self._run(use, self.timesteps[:1], batch, None)
            return dict.fromkeys(wanted, made)
        ahead: dict[int, Residuals] = {}
        chunk = max(1, ROWS_AT_ONCE // rows)
        for first in range(0, len(wanted), chunk):
            indices = wanted[first : first + chunk]
            made = self._run(use, self.timesteps[indices], batch, None)
            for place, index in enumerate(indices):
                ahead[index] = made.map(lambda r, at=place: r[at * rows : (at + 1) * rows])
        return ahead

    def _run(self, use: ActiveControl, times: Tensor, batch: int, x_t: Tensor | None) -> Residuals:
        """One pass: for each of `times`, every part, every picture."""
        rows = batch * len(self.texts)
        text = concatenate(*(text.expand(batch) for text in self.texts))
        hint = _repeat(use.hint, batch).repeat(len(self.texts), *[1] * (use.hint.ndim - 1))
        return use.control(
            x_t,
            times.repeat_interleave(rows),
            concatenate(*[text] * len(times)),
            hint.repeat(len(times), *[1] * (hint.ndim - 1)),
        )


def _repeat(rows: Tensor, count: int) -> Tensor:
    """Each row as often as makes `count` rows."""
    return rows if len(rows) == count else rows.repeat_interleave(count // len(rows), 0)
