"""Plan: when the residuals, taps and tokens of controls are computed along a schedule.

What a control reads decides. One that reads the noisy latent runs at every step for every image. One that does not
runs ahead, batched over time, once per (condition, prompt); its residuals are shared by all images, and by later calls
through a cache. Controls that share a network run in one pass. Taps act at every step within the pass of the base, on
the rows of their control only. Where a control replaces modules of the base on one branch of guidance only, the base
runs for each branch by itself. Tokens are appended to those of the prompt at the steps where their control acts. The
unconditional branch gets `Control.unconditional`. A plan changes when work is done, never the result.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from controlkit.bases.base import Base
from controlkit.bases.prompt_encoding import same_length
from controlkit.bases.residuals import Residuals
from controlkit.bases.taps import Tap, TapFunction
from controlkit.bases.text import Text, concatenate
from controlkit.controls.control import Acts, Control, Reads, residuals_together
from controlkit.controls.hints import Hint, concatenated, expand, map_hint, rows_of, shapes_of
from controlkit.errors import UserError
from controlkit.sampling.graphs import NetworkCalls
from controlkit.sampling.residual_cache import ResidualCache, digest, identity_of
from controlkit.sampling.uses import CONDITIONAL_MODES, lies_within, mode_name
from controlkit.sampling.weighting import Weighting, check_weighted

ROWS_AT_ONCE = 32
"""Largest batch of residuals computed ahead, unless one step of one control is larger."""
PIXELS_AT_ONCE = 2**23
"""Limit of image pixels in that batch, as activations grow with them: 32 of 512 x 512, 8 of 1024 x 1024."""

KEPT_MEGABYTES = 2048
"""Limit of the residuals that a plan keeps for later batches (at SD1.5, 512 x 512, fp16, 20 steps under guidance take
536 MB); what exceeds it is computed again."""


@dataclass(frozen=True)
class ActiveControl:
    """A control with its hint, ready to run."""

    control: Control
    hint: Hint
    """From `Control.encode`: batch 1 for all images, or one row per image."""
    weight: float | tuple[float, ...] = 1.0
    """Factor of everything it adds; or one factor per residual, as in `Residuals.scaled`."""
    start: float = 0.0
    end: float = 1.0
    conditional_only: bool = False
    """Whether it acts on the conditional branch of CFG only; it does not run for the unconditional branch."""
    weighting: Weighting | None = None
    """Factors of its residuals by injection site; None is 1 everywhere."""

    def __post_init__(self) -> None:
        if self.control.conditional_only:
            object.__setattr__(self, "conditional_only", True)
        if self.weighting is not None and self.weighting.is_zero:
            object.__setattr__(self, "weight", 0.0)

    def acts_at(self, index: int, steps: int) -> bool:
        """Whether it acts at step `index` of `steps`."""
        return self.weight != 0 and lies_within(index, steps, self.start, self.end)

    @classmethod
    def in_mode(
        cls,
        mode: str | None,
        base: Base,
        *,
        control: Control,
        layers: Sequence[float] | None = None,
        mask: Tensor | None = None,
        **settings: Any,
    ) -> ActiveControl:
        """Build one that acts in `mode` (one of `uses.MODES`); None is the default of the base.

        Args:
            layers: one factor per residual.
            mask: where it acts, `[1, 1, H, W]` in [0, 1], in pixels of the image.

        Raises:
            UserError: its residuals cannot be weighted by site as asked.
        """
        mode = cls.mode_in(mode, base, control)
        weighting = Weighting.of(mode, base, control, layers=layers, mask=mask)
        return cls(control, conditional_only=mode in CONDITIONAL_MODES, weighting=weighting, **settings)

    @staticmethod
    def mode_in(mode: str | None, base: Base, control: Control) -> str:
        """The mode in which `control` acts if `mode` is requested; None is the default of the base.

        A control for the conditional branch only acts there in every mode, and `guess` does not weight it, as in
        diffusers.

        Raises:
            UserError: the mode weights residuals by site, and those of this control on this base cannot be.
        """
        mode = mode_name(mode) or base.default_mode
        if control.conditional_only and mode in ("balanced", "guess"):
            return "control"
        check_weighted(mode, base, control)
        return mode

    def weighted(self, residuals: Residuals) -> Residuals:
        """Its residuals with all factors."""
        scaled = residuals.scaled(self.weight)
        return scaled if self.weighting is None else self.weighting(scaled)

    def of_images(self, images: slice) -> ActiveControl:
        """A copy for some of the images."""
        if rows_of(self.hint) == 1:
            return self
        return replace(self, hint=map_hint(self.hint, lambda rows: rows if len(rows) == 1 else rows[images]))


class Plan:
    """The residuals of several controls along one schedule.

    Args:
        uses: the controls.
        timesteps: of the schedule, in the order of sampling.
        texts: the prompts of each part of the batch (one part, or negative and positive for guidance); batch 1
            for all images, or one row per image. Prompts of fewer tokens are repeated to one length.
        cache: cache of residuals that do not depend on the noise, before all weights: modes, layers and masks that
            share a branch share them.
        rows_at_once: the largest batch of residuals computed ahead.
        megabytes: limit of the residuals that the plan keeps.
        base_key: identifies what is merged into the base (`Base.merged`), in the keys of the cache.
        calls: how controls that run at every step are called; default: eagerly.
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
        base_key: tuple[Hashable, ...] = (),
        calls: NetworkCalls | None = None,
    ) -> None:
        self.uses = uses
        self._calls = calls
        self._base_key = base_key
        self.timesteps = timesteps
        self.texts = same_length(texts)
        # Of a prompt that is repeated, tokens beside it are repeated, too: cross attention is then that of the prompt
        # alone with them, whatever the length of the negative prompt. On both branches alike, as all parts of a batch
        # have one length.
        self._repeats = self.texts[-1].tokens.shape[1] // texts[-1].tokens.shape[1]
        self.cache = cache
        self.rows_at_once = rows_at_once
        self.reused = False
        """Whether another batch of images follows with this plan. If not, residuals are freed as soon as their step
        has read them. The sampler sets it before each batch."""
        self._room = int(megabytes * 2**20)
        self._texts_of: dict[frozenset[int], Sequence[Text]] = {}
        self._kept: dict[int, Residuals] = {}
        self._window: dict[int, Residuals] = {}
        self._once: dict[int, Residuals] = {}
        adding = [place for place, use in enumerate(uses) if Acts.RESIDUALS in use.control.acts]
        self._ahead = [place for place in adding if Reads.NOISE not in uses[place].control.reading]
        self._every = [place for place in adding if place not in self._ahead]
        self._tokens = {place: _tokens(use) for place, use in enumerate(uses) if Acts.TOKENS in use.control.acts}
        self._tapping = [place for place, use in enumerate(uses) if Acts.TAPS in use.control.acts]
        self._replacing = {place: modules for place, use in enumerate(uses) if (modules := use.control.replacements())}
        for index in range(len(timesteps)) if self._replacing else ():
            self._check_replacements(index)
        self._times: Sequence[float] = timesteps.tolist() if cache is not None else ()
        self._digests: dict[int, str] = {}
        if cache is not None:  # hashing reads the device, which no step should wait for
            for index in range(len(timesteps)):
                for place in self._acting(self._ahead, index):
                    self._digests_of(uses[place], index)

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
                computed = self._run(together, [index], len(x_t) // len(self.texts), x_t)
                for place, residuals in zip(together, computed, strict=True):
                    weighted = self.uses[place].weighted(self._all_parts(self.uses[place], residuals))
                    total = weighted if total is None else total + weighted
        return total

    def taps(self, index: int, x_t: Tensor, base: Base) -> dict[str, list[Tap]]:
        """The taps of all controls at step `index` by point, in the order of the request.

        Args:
            x_t: `[parts * B, C, h, w]`, the parts one after another.

        Raises:
            ValueError: a control that acts by taps has one weight per residual.
        """
        taps: dict[str, list[Tap]] = {}
        for place in self._acting(self._tapping, index):
            use = self.uses[place]
            first = len(x_t) - len(x_t) // len(self.texts) if use.conditional_only else 0
            rows = x_t[first:]
            parts = self.text(index) if use.control.reads_tokens else self.texts
            parts = parts[-1:] if use.conditional_only else parts
            batch = len(rows) // len(parts)
            text = concatenate(*(part.expand(batch) for part in parts))
            hint = self._hint_of_taps(use, batch, len(parts))
            functions = use.control.taps(base, rows, self.timesteps[index].expand(len(rows)), text, hint)
            for point, function in functions.items():
                taps.setdefault(point, []).append(_tap(function, use, (first, len(x_t))))
        return taps

    def acting(self, index: int) -> tuple[int, ...]:
        """Places of the controls that act at step `index`."""
        return tuple(self._acting(range(len(self.uses)), index))

    def tapping(self, index: int) -> list[Control]:
        """The controls that act by taps at step `index`."""
        return [self.uses[place].control for place in self._acting(self._tapping, index)]

    @staticmethod
    def _hint_of_taps(use: ActiveControl, batch: int, parts: int) -> Hint:
        """The hint for each part of the batch, of which the last is the conditional one."""
        null = use.control.unconditional(use.hint)
        unconditional = expand(use.hint if null is None else null, batch)
        return concatenated([unconditional] * (parts - 1) + [expand(use.hint, batch)])

    def passes(self, index: int) -> list[tuple[int, int, dict[str, nn.Module]]]:
        """Calls of the base at step `index`: first and last (exclusive) part of the batch, and the modules that run in
        place of the base's.

        One call for all parts, unless a control of the conditional branch replaces modules.
        """
        count = len(self.texts)
        every: dict[str, nn.Module] = {}
        conditional: dict[str, nn.Module] = {}
        for place in self._acting(self._replacing, index):
            conditional |= self._replacing[place]
            if not self.uses[place].conditional_only:
                every |= self._replacing[place]
        if count == 1 or every == conditional:
            return [(0, count, conditional)]
        return [(0, count - 1, every), (count - 1, count, conditional)]

    def _check_replacements(self, index: int) -> None:
        """Check that the controls of step `index` can act together.

        Raises:
            UserError: two replace the same module, or one does on one branch only while taps act on all rows.
        """
        acting = self._acting(self._replacing, index)
        owners: dict[str, int] = {}
        for place in acting:
            for path in self._replacing[place]:
                if path in owners:
                    raise UserError(
                        f"controls {owners[path] + 1} and {place + 1} both replace the base's {path}, which only one"
                        " can at a time; remove one, or let them act at different steps",
                        "contradiction",
                    )
                owners[path] = place
        if len(self.passes(index)) > 1 and (tapping := self._acting(self._tapping, index)):
            names = " and ".join(self.uses[place].control.title for place in tapping)
            raise UserError(
                f"{self.uses[acting[0]].control.title} with modules of the base's acts on the conditional branch only,"
                f" in which {names} cannot act beside it; use the mode balanced",
                "contradiction",
            )

    def text(self, index: int) -> Sequence[Text]:
        """The prompts of each part at step `index`, padded to one length, with the tokens of the acting controls."""
        return self._extended(frozenset(self._acting(list(self._tokens), index)))

    def _extended(self, acting: frozenset[int]) -> Sequence[Text]:
        if acting not in self._texts_of:
            texts = list(self.texts)
            for place in sorted(acting):
                unconditional, conditional = self._tokens[place]
                for number in range(len(texts)):
                    weighted = conditional if number + 1 == len(texts) else unconditional
                    weighted = weighted.repeat(1, self._repeats, 1)
                    rows = max(len(weighted), len(texts[number]))
                    texts[number] = texts[number].expand(rows).extended(weighted.expand(rows, *weighted.shape[1:]))
            self._texts_of[acting] = texts
        return self._texts_of[acting]

    def release(self) -> None:
        """Free all residuals, when no batch follows. The plan can still compute them again."""
        for residuals in (self._kept, self._window, self._once):
            residuals.clear()

    def _acting(self, places: Iterable[int], index: int) -> list[int]:
        return [place for place in places if self.uses[place].acts_at(index, len(self.timesteps))]

    def _sum_at(self, index: int) -> Residuals:
        """The weighted sum of the controls that do not read the noise; computed together with later steps."""
        if index not in self._kept and index not in self._window:
            self._window = self._compute(index)
            if self.reused:
                self._keep_for_later(self._window)
        total = self._kept[index] if index in self._kept else self._window[index]
        if not self.reused:
            self._kept.pop(index, None)
            self._window.pop(index, None)
        return total

    def _keep_for_later(self, sums: dict[int, Residuals]) -> None:
        """Keep as many of these steps as fit."""
        for step, residuals in sums.items():
            size = sum(tensor.numel() * tensor.element_size() for tensor in residuals.tensors())
            if size <= self._room:
                self._room -= size
                self._kept[step] = residuals

    def _compute(self, first: int) -> dict[int, Residuals]:
        """Sums for `first` and later steps under the same controls, as many as fit into one batch."""
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
                for index, residuals in self._group(together, steps):
                    sums[index] = residuals if index not in sums else _add(sums[index], residuals)
        return sums

    def _groups(self, places: Sequence[int]) -> dict[Hashable, list[int]]:
        """Controls that run in one pass: they share a network, inputs, shape of hints, and parts of the batch."""
        groups: dict[Hashable, list[int]] = {}
        for place in places:
            use = self.uses[place]
            shared, reads = use.control.shared_network, (use.control.reading, use.control.reads_tokens)
            network = place if shared is None else id(shared)
            key = (network, type(use.control), reads, shapes_of(use.hint), use.conditional_only)
            groups.setdefault(key, []).append(place)
        return groups

    def _group(self, places: Sequence[int], steps: Sequence[int]) -> Iterator[tuple[int, Residuals]]:
        """Weighted residuals for each control and step, computed in one pass or taken from the cache."""
        timed = _is_timed(self.uses[places[0]].control)
        found = {place: self._found(place, steps, timed) for place in places}
        missing = [index for index in steps if any(index not in found[place] for place in places)]
        if missing:
            batch = self._batch(places[0], steps[0])
            rows = batch * self._parts(self.uses[places[0]])
            indices = missing if timed else missing[:1]
            computed = self._run(places, indices, batch, None)
            for place, together in zip(places, computed, strict=True):
                for number, index in enumerate(indices):
                    residuals = together.rows(number * rows, (number + 1) * rows)
                    self._keep(place, index, timed, residuals)
                    found[place].update(dict.fromkeys([index] if timed else steps, residuals))
        for place in places:
            for index in steps:
                use = self.uses[place]
                yield index, use.weighted(self._all_parts(use, found[place][index]))

    def _found(self, place: int, steps: Sequence[int], timed: bool) -> dict[int, Residuals]:
        """Cached residuals for these steps."""
        if not timed and place in self._once:
            return dict.fromkeys(steps, self._once[place])
        if self.cache is None:
            return {}
        use = self.uses[place]
        cached = {index: self.cache.get((*self._key(use, index), self._time(index, timed))) for index in steps}
        return {index: residuals for index, residuals in cached.items() if residuals is not None}

    def _keep(self, place: int, index: int, timed: bool, residuals: Residuals) -> None:
        if not timed:
            self._once[place] = residuals
        if self.cache is not None:
            use = self.uses[place]
            self.cache.put((*self._key(use, index), self._time(index, timed)), use.control, residuals)

    def _batch(self, place: int, index: int) -> int:
        """Batch size of a control per step: 1 if all images share what it reads."""
        use = self.uses[place]
        read = [len(text) for text in self._texts(use, index)] if Reads.TEXT in use.control.reading else []
        return max(rows_of(use.hint), *read, 1)

    def _run(self, places: Sequence[int], indices: Sequence[int], batch: int, x_t: Tensor | None) -> list[Residuals]:
        """Run these controls in one pass over the steps `indices`, their parts, and the images."""
        first = self.uses[places[0]]
        parts = self._parts(first)
        rows = batch * parts
        text = None
        if Reads.TEXT in first.control.reading:
            read = [part.expand(batch) for index in indices for part in self._texts(first, index=index)]
            text = concatenate(*read)
        x_t = None if x_t is None else x_t[-rows:]
        t = torch.stack([self.timesteps[index] for index in indices]).repeat_interleave(rows)
        uses = [self.uses[place] for place in places]
        controls = [use.control for use in uses]
        hints = [_tiled(expand(use.hint, batch), parts * len(indices)) for use in uses]
        if x_t is None or self._calls is None:
            computed = residuals_together(controls, x_t, t, text, hints)
        else:
            computed = self._calls.residuals(controls, x_t, t, text, hints)
        return [each.map(lambda tensor: tensor.expand(len(t), *tensor.shape[1:])) for each in computed]

    def _texts(self, use: ActiveControl, index: int) -> Sequence[Text]:
        """The prompts of the parts that a control runs for, with the tokens of other controls if it reads them."""
        texts = self.text(index) if use.control.reads_tokens else self.texts
        return texts[-self._parts(use) :]

    def _parts(self, use: ActiveControl) -> int:
        """How many parts a control runs for: one if it acts on one only, or reads at most one of the prompts."""
        one = use.conditional_only or use.control.one_prompt or Reads.TEXT not in use.control.reading
        return 1 if one else len(self.texts)

    def _all_parts(self, use: ActiveControl, residuals: Residuals) -> Residuals:
        """Expand residuals to every part of the batch; zeros where the control does not act."""
        others = len(self.texts) - self._parts(use)
        if not others:
            return residuals
        fill = torch.zeros_like if use.conditional_only else torch.Tensor.clone
        return residuals.map(lambda tensor: torch.cat([fill(tensor)] * others + [tensor]))

    def _key(self, use: ActiveControl, index: int) -> tuple[Hashable, ...]:
        return (identity_of(use.control), *self._digests_of(use, index), self._base_key)

    def _digests_of(self, use: ActiveControl, index: int) -> tuple[Hashable, ...]:
        """Digests of the hint and of the texts that a control reads."""
        parts = self._texts(use, index)
        read = [tensor for text in parts for tensor in text.tensors()]
        texts = tuple(map(self._digest, read)) if Reads.TEXT in use.control.reading else ()
        return self._digest(use.hint), len(parts), texts

    def _digest(self, hint: Hint) -> str:
        """`digest` of a hint or text of the plan, which keeps it alive."""
        if id(hint) not in self._digests:
            self._digests[id(hint)] = digest(hint)
        return self._digests[id(hint)]

    def _time(self, index: int, timed: bool) -> float | None:
        return self._times[index] if timed else None


def rows_at_once(width: int, height: int) -> int:
    """The largest batch of residuals computed ahead for images of this size."""
    return max(1, min(ROWS_AT_ONCE, PIXELS_AT_ONCE // (width * height)))


def _chunks(places: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Consecutive chunks of at most `size` and at least one."""
    size = max(1, size)
    for first in range(0, len(places), size):
        yield places[first : first + size]


def _add(a: Residuals, b: Residuals) -> Residuals:
    """Sum residuals with one row per part and with one per image."""
    rows = max(a.batch, b.batch)
    return a.map(lambda tensor: _repeat(tensor, rows)) + b.map(lambda tensor: _repeat(tensor, rows))


def _repeat(rows: Tensor, count: int) -> Tensor:
    """Repeat each row to get `count` rows."""
    return rows if len(rows) == count else rows.repeat_interleave(count // len(rows), 0)


def _tiled(hint: Hint, times: int) -> Hint:
    """Repeat the batch `times` times."""
    return map_hint(hint, lambda rows: rows.repeat(times, *[1] * (rows.ndim - 1)))


def _is_timed(control: Control) -> bool:
    """Whether its residuals differ between steps, also through tokens of controls that act at some steps only."""
    return Reads.TIME in control.reading or (control.reads_tokens and Reads.TEXT in control.reading)


def _tokens(use: ActiveControl) -> tuple[Tensor, Tensor]:
    """The weighted tokens of a control on the unconditional and on the conditional branch."""
    conditional, null = use.control.tokens(use.hint), use.control.unconditional(use.hint)
    if null is not None:
        unconditional = use.control.tokens(null)
    else:
        unconditional = torch.zeros_like(conditional) if use.conditional_only else conditional
    weight = _one_weight(use)
    return unconditional * weight, conditional * weight


def _one_weight(use: ActiveControl) -> float:
    """The weight of a control without residuals, which must be one number."""
    if isinstance(use.weight, (int, float)):
        return use.weight
    raise ValueError(f"{use.control.title} adds no residuals, so it takes one weight and not {len(use.weight)}")


def _tap(tap: TapFunction | Tap, use: ActiveControl, rows: tuple[int, int]) -> Tap:
    """A tap on the rows of its control, scaled by the weight if it is a weighted one."""
    weight = _one_weight(use)
    tap = tap if isinstance(tap, Tap) else Tap(function=tap)
    function, replaces = tap.function, tap.replaces
    if weight == 1 or not tap.weighted:
        return replace(tap, rows=rows)

    def weighted(stream: Tensor) -> Tensor | None:
        output = function(stream)
        if output is None:
            return None
        return stream + (output - stream) * weight if replaces else output * weight

    return replace(tap, function=weighted, rows=rows)
