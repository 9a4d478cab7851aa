"""What controls do at each step, and when it is computed: what a control reads decides.

A control that reads the noisy latent runs at every step for every image. One that does not is run ahead, in batches
over time, once for a (condition, prompt), and its residuals are shared by every image, and by the next call if a
cache is given. Controls that share a network run in one pass. Taps act at every step, inside of the base's own pass,
each on the rows of its control alone. Tokens follow those of the prompt at the steps where their control acts, zeros on
the half where it does not. A plan changes when work is done, never what comes out.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from controlkit.bases.base import Base
from controlkit.bases.residuals import Residuals
from controlkit.bases.taps import Tap, TapFunction
from controlkit.bases.text import Text, concatenate
from controlkit.controls.control import Acts, Control, Reads
from controlkit.controls.hints import Hint, expand, map_hint, rows_of, shapes_of
from controlkit.sampling.request import lies_within
from controlkit.sampling.residual_cache import ResidualCache, digest, identity_of

ROWS_AT_ONCE = 32
"""Largest batch in which residuals are computed ahead, if one step of one control is not larger by itself."""
PIXELS_AT_ONCE = 2**23
"""And the most pixels of images in it: 32 of 512 x 512, 8 of 1024 x 1024; a batch's activations grow with them."""

KEPT_MEGABYTES = 2048
"""The most that a plan keeps of residuals for batches to come (at SD1.5, 512 x 512, in fp16, 20 steps under guidance
take 536), where batches are to come; what is beyond is computed again for the next batch."""


@dataclass(frozen=True)
class ActiveControl:
    """A control with its hint, ready to run."""

    control: Control
    hint: Hint
    """From `Control.encode`: batch 1 for all images, or one for each image."""
    weight: float | tuple[float, ...] = 1.0
    """Factor of all that it adds; or one of each of its residuals, as in `Residuals.scaled`."""
    start: float = 0.0
    end: float = 1.0
    conditional_only: bool = False
    """Whether, under guidance, it acts on the half that has the prompt alone (Zhang et al. 2023, section 3.4; with
    weights from 0.1 to 1, diffusers' `guess_mode`); it does not run for the other half."""

    def __post_init__(self) -> None:
        if self.control.conditional_only:
            object.__setattr__(self, "conditional_only", True)

    def acts_at(self, index: int, steps: int) -> bool:
        """Whether it acts at step `index` of `steps`."""
        return self.weight != 0 and lies_within(index, steps, self.start, self.end)

    @classmethod
    def in_mode(cls, mode: str | None, base: Base, **settings: Any) -> ActiveControl:
        """One that acts in `mode` (of `request.MODES`); None is the base's own."""
        return cls(**settings, conditional_only=(mode or base.default_mode) == "control")

    @staticmethod
    def mode_in(mode: str | None, base: Base, control: Control) -> str:
        """The mode in which `control` acts when `mode` is asked for; None is the base's own.

        A control that is meant for the half with the prompt alone acts in no other.
        """
        return "control" if control.conditional_only else mode or base.default_mode

    def of_images(self, images: slice) -> ActiveControl:
        """The same for some of the images."""
        if rows_of(self.hint) == 1:
            return self
        return replace(self, hint=map_hint(self.hint, lambda one: one if len(one) == 1 else one[images]))


class Plan:
    """The residuals of several controls along one schedule.

    Args:
        uses: the controls.
        timesteps: of the schedule, in the order of sampling.
        texts: the prompts of each part of the batch (one part, or negative and positive for guidance); batch 1
            for all images, or one for each image.
        cache: where residuals that do not depend on the noise are kept and found.
        rows_at_once: the largest batch in which residuals are computed ahead.
        megabytes: the most that the plan itself keeps.
    """

    def __init__(
        self,
        uses: Sequence[ActiveControl],
        timesteps: Tensor,
        texts: Sequence[Text],
        cache: ResidualCache | None = None,
        *,
        rows_at_once: int = ROWS_AT_ONCE,
        megabytes: float = KEPT_MEGABYTES,
    ) -> None:
        self.uses = uses
        self.timesteps = timesteps
        self.texts = texts
        self.cache = cache
        self.rows_at_once = rows_at_once
        self.reused = False
        """Whether another batch of images will be sampled with this plan. If not, residuals are let go as soon as
        their step has read them. The sampler sets it before each batch."""
        self._room = int(megabytes * 2**20)
        self._texts_of: dict[frozenset[int], Sequence[Text]] = {}
        self._kept: dict[int, Residuals] = {}
        self._window: dict[int, Residuals] = {}
        self._once: dict[int, Residuals] = {}
        adding = [place for place, use in enumerate(uses) if Acts.RESIDUALS in use.control.acts]
        self._ahead = [place for place in adding if Reads.NOISE not in uses[place].control.reads]
        self._every = [place for place in adding if place not in self._ahead]
        self._tokens = {
            place: use.control.tokens(use.hint) for place, use in enumerate(uses) if Acts.TOKENS in use.control.acts
        }
        self._tapping = [place for place, use in enumerate(uses) if Acts.TAPS in use.control.acts]

    def residuals(self, index: int, x_t: Tensor) -> Residuals | None:
        """The sum of all residuals at step `index`, or None if no control acts.

        Args:
            x_t: `[parts * B, C, h, w]`, the parts one after another.
        """
        total: Residuals | None = None
        if self._acting(self._ahead, index):
            total = self._sum_at(index).map(lambda tensor: _repeat(tensor, len(x_t)))
        for group in self._groups(self._acting(self._every, index)).values():
            for together in _chunks(group, self.rows_at_once // len(x_t)):
                made = self._run(together, [index], len(x_t) // len(self.texts), x_t)
                for place, residuals in zip(together, made, strict=True):
                    weighted = self._all_parts(self.uses[place], residuals).scaled(self.uses[place].weight)
                    total = weighted if total is None else total + weighted
        return total

    def taps(self, index: int, x_t: Tensor, base: Base) -> dict[str, list[Tap]]:
        """What controls do inside of the base's pass at step `index`, in the order of the request.

        Args:
            x_t: `[parts * B, C, h, w]`, the parts one after another.

        Raises:
            ValueError: a control that acts by taps has a weight for each residual.
        """
        taps: dict[str, list[Tap]] = {}
        for place in self._acting(self._tapping, index):
            use = self.uses[place]
            first = len(x_t) - len(x_t) // len(self.texts) if use.conditional_only else 0
            own = x_t[first:]
            parts = self.text(index) if use.control.reads_tokens else self.texts
            parts = parts[-1:] if use.conditional_only else parts
            batch = len(own) // len(parts)
            text = concatenate(*(part.expand(batch) for part in parts))
            hint = _tiled(expand(use.hint, batch), len(parts))
            functions = use.control.taps(base, own, self.timesteps[index].expand(len(own)), text, hint)
            for point, function in functions.items():
                taps.setdefault(point, []).append(_tap(function, use, (first, len(x_t))))
        return taps

    def text(self, index: int) -> Sequence[Text]:
        """The prompts of each part at step `index`, of one length, with the tokens of the controls that act there."""
        return self._extended(frozenset(self._acting(list(self._tokens), index)))

    def _extended(self, acting: frozenset[int]) -> Sequence[Text]:
        if acting not in self._texts_of:
            made = list(self.texts)
            for place in sorted(acting):
                use, tokens = self.uses[place], self._tokens[place]
                for number in range(len(made)):
                    acts = not use.conditional_only or number + 1 == len(made)
                    own = tokens * _one_weight(use) if acts else torch.zeros_like(tokens)
                    rows = max(len(own), len(made[number]))
                    made[number] = made[number].expand(rows).extended(own.expand(rows, *own.shape[1:]))
            self._texts_of[acting] = made
        return self._texts_of[acting]

    def release(self) -> None:
        """Let go of all residuals; call it when no batch is to come. The plan can still compute them again."""
        for residuals in (self._kept, self._window, self._once):
            residuals.clear()

    def _acting(self, places: Iterable[int], index: int) -> list[int]:
        return [place for place in places if self.uses[place].acts_at(index, len(self.timesteps))]

    def _sum_at(self, index: int) -> Residuals:
        """The weighted sum of the controls that do not read the noise; computed with those of the steps after it."""
        if index not in self._kept and index not in self._window:
            self._window = self._compute(index)
            if self.reused:
                self._keep_for_later(self._window)
        made = self._kept[index] if index in self._kept else self._window[index]
        if not self.reused:
            self._kept.pop(index, None)
            self._window.pop(index, None)
        return made

    def _keep_for_later(self, sums: dict[int, Residuals]) -> None:
        """Keep as many of these steps as there is room for."""
        for step, made in sums.items():
            size = sum(tensor.numel() * tensor.element_size() for tensor in made.tensors())
            if size <= self._room:
                self._room -= size
                self._kept[step] = made

    def _compute(self, first: int) -> dict[int, Residuals]:
        """Sums for `first` and the steps after it under the same controls, as many as fit into one batch."""
        places, tokens = (self._acting(every, first) for every in (self._ahead, self._tokens))
        rows = len(self.texts) * max(self._batch(place, first) for place in places)
        steps = [first]
        for index in range(first + 1, len(self.timesteps)):
            same = self._acting(self._ahead, index) == places and self._acting(self._tokens, index) == tokens
            if (len(steps) + 1) * rows > self.rows_at_once or not same:
                break
            steps.append(index)
        sums: dict[int, Residuals] = {}
        for group in self._groups(places).values():
            for together in _chunks(group, self.rows_at_once // (rows * len(steps))):
                for index, made in self._group(together, steps):
                    sums[index] = made if index not in sums else _add(sums[index], made)
        return sums

    def _groups(self, places: Sequence[int]) -> dict[Hashable, list[int]]:
        """Controls that run in one pass: those of one shared network that read the same, with hints of one shape, for
        the same parts."""
        groups: dict[Hashable, list[int]] = {}
        for place in places:
            use = self.uses[place]
            shared, reads = use.control.shared_network, (use.control.reads, use.control.reads_tokens)
            network = place if shared is None else id(shared)
            key = (network, type(use.control), reads, shapes_of(use.hint), use.conditional_only)
            groups.setdefault(key, []).append(place)
        return groups

    def _group(self, places: Sequence[int], steps: Sequence[int]) -> Iterator[tuple[int, Residuals]]:
        """Weighted residuals of controls that run in one pass, or were kept, for each control and step."""
        timed = _is_timed(self.uses[places[0]].control)
        found = {place: self._found(place, steps, timed) for place in places}
        missing = [index for index in steps if any(index not in found[place] for place in places)]
        if missing:
            batch = self._batch(places[0], steps[0])
            rows = batch * self._parts(self.uses[places[0]])
            indices = missing if timed else missing[:1]
            made = self._run(places, indices, batch, None)
            for place, together in zip(places, made, strict=True):
                for number, index in enumerate(indices):
                    one = together.rows(number * rows, (number + 1) * rows)
                    self._keep(place, index, timed, one)
                    found[place].update(dict.fromkeys([index] if timed else steps, one))
        for place in places:
            for index in steps:
                use = self.uses[place]
                yield index, self._all_parts(use, found[place][index]).scaled(use.weight)

    def _found(self, place: int, steps: Sequence[int], timed: bool) -> dict[int, Residuals]:
        """What was computed before for these steps."""
        if not timed and place in self._once:
            return dict.fromkeys(steps, self._once[place])
        if self.cache is None:
            return {}
        use = self.uses[place]
        kept = {index: self.cache.get((*self._key(use, index), self._time(index, timed))) for index in steps}
        return {index: made for index, made in kept.items() if made is not None}

    def _keep(self, place: int, index: int, timed: bool, made: Residuals) -> None:
        if not timed:
            self._once[place] = made
        if self.cache is not None:
            use = self.uses[place]
            self.cache.put((*self._key(use, index), self._time(index, timed)), use.control, made)

    def _batch(self, place: int, index: int) -> int:
        """Images that one pass of a control is made for: one, if all have the same of what it reads at a step."""
        use = self.uses[place]
        read = [len(text) for text in self._texts(use, index)] if Reads.TEXT in use.control.reads else []
        return max(rows_of(use.hint), *read, 1)

    def _run(self, places: Sequence[int], indices: Sequence[int], batch: int, x_t: Tensor | None) -> list[Residuals]:
        """One pass of these controls: for each step of `indices`, every part that they act on, every image."""
        first = self.uses[places[0]]
        parts = self._parts(first)
        rows = batch * parts
        text = None
        if Reads.TEXT in first.control.reads:
            read = [part.expand(batch) for index in indices for part in self._texts(first, index=index)]
            text = concatenate(*read)
        x_t = None if x_t is None else x_t[-rows:]
        t = self.timesteps[list(indices)].repeat_interleave(rows)
        uses = [self.uses[place] for place in places]
        hints = [_tiled(expand(use.hint, batch), parts * len(indices)) for use in uses]
        if len(uses) == 1:
            made = [first.control(x_t, t, text, hints[0])]
        else:
            made = first.control.forward_together([use.control for use in uses], x_t, t, text, hints)
        return [one.map(lambda tensor: tensor.expand(len(t), *tensor.shape[1:])) for one in made]

    def _texts(self, use: ActiveControl, index: int) -> Sequence[Text]:
        """The prompts of the parts that a control runs for, with the tokens of controls at a step if it reads them."""
        texts = self.text(index) if use.control.reads_tokens else self.texts
        return texts[-self._parts(use) :]

    def _parts(self, use: ActiveControl) -> int:
        """How many parts a control runs for: one, if it is for one alone, or does not read the prompts."""
        return 1 if use.conditional_only or Reads.TEXT not in use.control.reads else len(self.texts)

    def _all_parts(self, use: ActiveControl, made: Residuals) -> Residuals:
        """Residuals of every part, from those that a control ran for; zeros where it does not act."""
        others = len(self.texts) - self._parts(use)
        if not others:
            return made
        fill = torch.zeros_like if use.conditional_only else torch.Tensor.clone
        return made.map(lambda tensor: torch.cat([fill(tensor)] * others + [tensor]))

    def _key(self, use: ActiveControl, index: int) -> tuple[Hashable, ...]:
        parts = self._texts(use, index)
        read = [tensor for text in parts for tensor in text.tensors()]
        texts = tuple(digest(tensor) for tensor in read) if Reads.TEXT in use.control.reads else ()
        return (identity_of(use.control), digest(use.hint), len(parts), texts)

    def _time(self, index: int, timed: bool) -> float | None:
        return float(self.timesteps[index]) if timed else None


def rows_at_once(width: int, height: int) -> int:
    """The largest batch of residuals that are computed ahead, for images of so many pixels."""
    return max(1, min(ROWS_AT_ONCE, PIXELS_AT_ONCE // (width * height)))


def _chunks(places: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Consecutive parts of `size` at the most, and at least one."""
    size = max(1, size)
    for first in range(0, len(places), size):
        yield places[first : first + size]


def _add(a: Residuals, b: Residuals) -> Residuals:
    """The sum of residuals for one row a part and for one an image."""
    rows = max(a.batch, b.batch)
    return a.map(lambda tensor: _repeat(tensor, rows)) + b.map(lambda tensor: _repeat(tensor, rows))


def _repeat(rows: Tensor, count: int) -> Tensor:
    """Each row as often as makes `count` rows."""
    return rows if len(rows) == count else rows.repeat_interleave(count // len(rows), 0)


def _tiled(hint: Hint, times: int) -> Hint:
    """All rows, and all of them again, `times` times in all."""
    return map_hint(hint, lambda rows: rows.repeat(times, *[1] * (rows.ndim - 1)))


def _is_timed(control: Control) -> bool:
    """Whether its residuals differ from step to step; so do those that read the tokens of controls with a span."""
    return Reads.TIME in control.reads or (control.reads_tokens and Reads.TEXT in control.reads)


def _one_weight(use: ActiveControl) -> float:
    """The weight of a control that adds no residuals, of which there could be one each."""
    if isinstance(use.weight, (int, float)):
        return use.weight
    raise ValueError(f"{use.control.title} adds no residuals, so it takes one weight and not {len(use.weight)}")


def _tap(given: TapFunction | Tap, use: ActiveControl, rows: tuple[int, int]) -> Tap:
    """What a control hangs on a point, times its weight unless none scales it, on its own rows."""
    weight = _one_weight(use)
    tap = given if isinstance(given, Tap) else Tap(function=given)
    function, replaces = tap.function, tap.replaces
    if weight == 1 or not tap.weighted:
        return replace(tap, rows=rows)

    def weighted(stream: Tensor) -> Tensor | None:
        made = function(stream)
        if made is None:
            return None
        return stream + (made - stream) * weight if replaces else made * weight

    return replace(tap, function=weighted, rows=rows)
