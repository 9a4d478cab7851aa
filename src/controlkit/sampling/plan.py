"""When residuals are computed: what a control reads decides.

A control that reads the noisy latent runs at every step for every picture. One that does not is run for all its
steps before sampling, in batches over time, once for a (condition, prompt), and its residuals are shared by every
picture, and by the next call if a cache is given. Controls that share a network run in one pass. A plan changes when
work is done, never what comes out.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from controlkit.bases.base import Text, concatenate
from controlkit.bases.residuals import Residuals
from controlkit.controls.control import Control, Reads
from controlkit.sampling.cache import ResidualCache, digest, identity_of

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
        cache: where residuals that do not depend on the noise are kept and found.
    """

    def __init__(
        self,
        uses: Sequence[ActiveControl],
        timesteps: Tensor,
        texts: Sequence[Text],
        cache: ResidualCache | None = None,
    ) -> None:
        self.uses = uses
        self.timesteps = timesteps
        self.texts = texts
        self._ahead: dict[int, dict[int, Residuals]] = {}
        steps = len(timesteps)
        groups: dict[Hashable, list[int]] = {}
        for position, use in enumerate(uses):
            if Reads.NOISE not in use.control.reads:
                wanted = tuple(index for index in range(steps) if use.acts_at(index, steps))
                shared = use.control.shared_network
                key = (wanted, position if shared is None else id(shared), use.hint.shape)
                groups.setdefault(key, []).append(position)
        for (wanted, *_), positions in groups.items():  # type: ignore[misc]
            self._compute_ahead(positions, wanted, cache)

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
                (made,) = self._run([position], self.timesteps[index : index + 1], batch, x_t)
            made = made.scaled(use.weight)
            total = made if total is None else total + made
        return total

    def _compute_ahead(self, positions: list[int], wanted: Sequence[int], cache: ResidualCache | None) -> None:
        """Fill `_ahead` for controls that share a network and act at the same steps, from the cache where it can."""
        uses = [self.uses[position] for position in positions]
        timed = Reads.TIME in uses[0].control.reads
        batch = max(len(uses[0].hint), *(len(text) for text in self.texts))
        rows = batch * len(self.texts)
        keys = {}
        for position, use in zip(positions, uses, strict=True):
            found = self._ahead.setdefault(position, {})
            if cache is None:
                continue
            keys[position] = self._key(use)
            for index in wanted:
                kept = cache.get((*keys[position], self._time(index, timed)))
                if kept is not None:
                    found[index] = kept
        missing = [index for index in wanted if any(index not in self._ahead[position] for position in positions)]
        if not timed:
            missing = missing[:1]
        chunk = max(1, ROWS_AT_ONCE // (rows * len(positions)))
        for first in range(0, len(missing), chunk):
            indices = missing[first : first + chunk]
            for position, made in zip(
                positions, self._run(positions, self.timesteps[indices], batch, None), strict=True
            ):
                for place, index in enumerate(indices):
                    one = made.rows(place * rows, (place + 1) * rows)
                    self._ahead[position].update(dict.fromkeys([index] if timed else wanted, one))
                    if cache is not None:
                        key = (*keys[position], self._time(index, timed))
                        cache.put(key, self.uses[position].control, one)

    def _run(self, positions: Sequence[int], times: Tensor, batch: int, x_t: Tensor | None) -> list[Residuals]:
        """One pass of these controls: for each of `times`, every part, every picture."""
        rows = batch * len(self.texts)
        text = concatenate(*(text.expand(batch) for text in self.texts))
        text = concatenate(*[text] * len(times))
        t = times.repeat_interleave(rows)
        uses = [self.uses[position] for position in positions]
        hints = [
            _repeat(use.hint, batch).repeat(len(self.texts) * len(times), *[1] * (use.hint.ndim - 1)) for use in uses
        ]
        if len(uses) == 1:
            return [uses[0].control(x_t, t, text, hints[0])]
        return uses[0].control.forward_together([use.control for use in uses], t, text, hints)

    def _key(self, use: ActiveControl) -> tuple[Hashable, ...]:
        read = [part for text in self.texts for part in text.tensors()]
        texts = tuple(digest(part) for part in read) if Reads.TEXT in use.control.reads else ()
        return (identity_of(use.control), digest(use.hint), texts)

    def _time(self, index: int, timed: bool) -> int | None:
        return int(self.timesteps[index]) if timed else None


def _repeat(rows: Tensor, count: int) -> Tensor:
    """Each row as often as makes `count` rows."""
    return rows if len(rows) == count else rows.repeat_interleave(count // len(rows), 0)
