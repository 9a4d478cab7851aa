"""When residuals are computed: what a control reads decides.

A control that reads the noisy latent runs at every step for every picture. One that does not is run for all its
steps before sampling, in batches over time, once for a (condition, prompt), and its residuals are shared by every
picture. A plan changes when work is done, never what comes out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from controlkit.bases.base import Text, concatenate
from controlkit.bases.residuals import Residuals
from controlkit.controls.control import Control, Reads

STEPS_AT_ONCE = 16
"""How many steps of a control are computed in one batch ahead of sampling."""


@dataclass(frozen=True)
class ActiveControl:
    """A control with its hint, ready to run."""

    control: Control
    hint: Tensor
    """From `Control.encode`, batch 1."""
    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0

    def acts_at(self, index: int, steps: int) -> bool:
        """Whether it acts at step `index` of `steps` (as diffusers: a step counts only if it lies wholly within)."""
        return self.weight != 0 and index / steps >= self.start and (index + 1) / steps <= self.end


class Plan:
    """The residuals of several controls along one schedule.

    Args:
        uses: the controls.
        timesteps: of the schedule, in the order of sampling.
        texts: the prompt of each part of the batch (one, or negative and positive for guidance), batch 1 each.
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
            x_t: `[len(texts) * B, C, h, w]`, the parts one after another.
        """
        steps, parts = len(self.timesteps), len(self.texts)
        batch = len(x_t) // parts
        total: Residuals | None = None
        for position, use in enumerate(self.uses):
            if not use.acts_at(index, steps):
                continue
            if position in self._ahead:
                made = self._ahead[position][index].map(lambda r: r.repeat_interleave(batch, 0))
            else:
                text = concatenate(*(text.expand(batch) for text in self.texts))
                t = self.timesteps[index].expand(len(x_t))
                made = use.control(x_t, t, text, use.hint)
            made = made.scaled(use.weight)
            total = made if total is None else total + made
        return total

    def _compute_ahead(self, use: ActiveControl) -> dict[int, Residuals]:
        """Step -> residuals with one entry a part, for every step at which `use` acts."""
        steps, parts = len(self.timesteps), len(self.texts)
        wanted = [index for index in range(steps) if use.acts_at(index, steps)]
        made: dict[int, Residuals] = {}
        chunk = STEPS_AT_ONCE if Reads.TIME in use.control.reads else 1
        for first in range(0, len(wanted), chunk):
            indices = wanted[first : first + chunk]
            t = self.timesteps[indices].repeat_interleave(parts)
            text = concatenate(*(concatenate(*self.texts) for _ in indices))
            residuals = use.control(None, t, text, use.hint.expand(len(t), *use.hint.shape[1:]))
            for place, index in enumerate(indices):
                made[index] = residuals.map(lambda r, at=place: r[at * parts : (at + 1) * parts])
        return made


