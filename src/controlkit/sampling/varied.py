"""Generate every combination of a request's axes, with the base and the controls loaded once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from controlkit.bases.base import Base
from controlkit.controls.control import Control
from controlkit.errors import UserError
from controlkit.sampling.axes import Point, points_of
from controlkit.sampling.embeddings import is_unused
from controlkit.sampling.generation import Generation
from controlkit.sampling.inputs import check_inputs
from controlkit.sampling.loras import lora_file
from controlkit.sampling.models import Models, base_key
from controlkit.sampling.passes import hires_strength
from controlkit.sampling.request import GenerateRequest
from controlkit.sampling.residual_cache import ResidualCache
from controlkit.sampling.sampler import solver_of
from controlkit.sampling.single import generate_single
from controlkit.sampling.step import Step


def generate_varied(
    request: GenerateRequest,
    *,
    base: Base | None,
    controls: Sequence[Control] | None,
    given: Mapping[str, bytes],
    cache: ResidualCache | None,
    on_step: Callable[[Step], object] | None,
    on_images: Callable[[Generation], object] | None,
) -> Generation:
    """`generate` for a request with axes; combinations of one base run one after another.

    Args:
        given: content of files in memory, by the name that stands for each in the request.

    Raises:
        UserError: as `generate`, or what the caller loaded is on an axis.
    """
    points = points_of(request)
    if base is not None and len({base_key(point.request) for point in points}) > 1:
        raise UserError("the base is on an axis, so it cannot be passed loaded", "contradiction")
    if controls is not None and len({_controls(point.request) for point in points}) > 1:
        raise UserError("the control is on an axis, so controls cannot be passed loaded", "contradiction")
    # A wrong value should not end it after the first images.
    for file in dict.fromkeys(use.file for point in points for use in point.request.loras):
        lora_file(file)
    check_inputs((point.request for point in points), controls, given)
    run = _Run(request, points, on_step, on_images)
    models, cache = Models(), ResidualCache() if cache is None else cache
    checked: set[object] = set()
    for number in run.order:
        if (key := base_key(points[number].request)) not in checked:
            checked.add(key)
            _check_samplers(models.base(points[number].request) if base is None else base, points, key)
        part = generate_single(
            points[number].request,
            base=base,
            controls=controls,
            given=given,
            cache=cache,
            on_step=None if on_step is None else partial(run.advance, number),
            on_images=None if on_images is None else partial(run.add, number),
            models=models,
        )
        run.end(number, part)
    return run.whole


class _Run:
    """Progress and results of all combinations.

    Args:
        request: with axes.
        points: its combinations.
    """

    def __init__(
        self,
        request: GenerateRequest,
        points: Sequence[Point],
        on_step: Callable[[Step], object] | None,
        on_images: Callable[[Generation], object] | None,
    ) -> None:
        self.whole = Generation(request)
        self._points, self._on_step, self._on_images = points, on_step, on_images
        keys = [base_key(point.request) for point in points]
        self.order = sorted(range(len(points)), key=lambda number: keys.index(keys[number]))
        """Numbers of the points, those of one base together."""
        self._parts: dict[int, Generation] = {}
        self._ended = 0
        """Steps of the points that have ended."""
        self._done = 0
        """Steps done."""

    def advance(self, number: int, step: Step) -> object:
        """Report a step of one point as one of all; steps of later points are estimated from its own."""
        assert self._on_step is not None
        place = self.order.index(number)
        work = [_work(self._points[each].request) for each in self.order[place:]]
        before = sum(len(point.request.seeds) for point in self._points[:number])
        self._done = self._ended + step.done
        total = self._ended + step.total + sum(round(step.total * each / work[0]) for each in work[1:])
        images = range(before + step.images.start, before + step.images.stop)
        return self._on_step(replace(step, done=self._done, total=total, images=images))

    def add(self, number: int, part: Generation) -> object:
        """Report finished images of one point."""
        assert self._on_images is not None
        self._gather(number, part)
        return self._on_images(self.whole)

    def end(self, number: int, part: Generation) -> None:
        """Take the result of one point."""
        self._gather(number, part)
        self._ended = self._done
        parts, whole = self.whole.parts, self.whole
        counts = Counter(note for each in parts for note in dict.fromkeys(each.notes))
        # Another prompt may have the word of an embedding.
        whole.notes = [note for note, count in counts.items() if count == len(parts) or not is_unused(note)]
        whole.used = _shared([each.used for each in parts])
        whole.graphs = whole.graphs + part.graphs
        for phase, seconds in part.seconds.items():
            whole.seconds[phase] = whole.seconds.get(phase, 0.0) + seconds

    def _gather(self, number: int, part: Generation) -> None:
        part.name = self._points[number].name
        self._parts[number] = part
        self.whole.parts = [self._parts[each] for each in sorted(self._parts)]
        self.whole.images = [image for each in self.whole.parts for image in each.images]


def _check_samplers(base: Base, points: Sequence[Point], key: object) -> None:
    """Check the sampler and the steps of all combinations of one base.

    Raises:
        UserError: the base does not take one.
    """
    for request in (point.request for point in points if base_key(point.request) == key):
        width, height = request.width or base.size, request.height or base.size
        base.check_size(width, height)
        solver_of(base, request.sampler, request.steps, width, height)


def _controls(request: GenerateRequest) -> tuple[str, ...]:
    return tuple(use.control for use in request.controls)


def _work(request: GenerateRequest) -> int:
    """Proportional to the steps of a request, to estimate those of others."""
    second = 0 if request.hires is None else hires_strength(request)
    return round(request.steps * len(request.seeds) * (1 + second))


def _shared(values: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What all mappings have in common."""
    first, *others = values
    return {key: value for key, value in first.items() if all(each.get(key) == value for each in others)}
