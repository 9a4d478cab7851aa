"""Sampling passes of a request: one, or with `hires` a second one that starts from the enlarged images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from PIL import Image

from controlkit.bases.base import Base
from controlkit.bases.solver_names import solver_name
from controlkit.images import resize_cover, to_tensor
from controlkit.sampling.plan import ActiveControl
from controlkit.sampling.request import GenerateRequest
from controlkit.sampling.sampler import images_at_once
from controlkit.sampling.start_image import StartImage, first_step
from controlkit.sampling.uses import check_spans

HIRES_STRENGTH = 0.7
"""Default strength of the second pass, as in A1111."""


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One pass of sampling, at one size."""

    width: int
    height: int
    """Both in pixels."""
    uses: Sequence[ActiveControl]
    """Controls with hints of this size."""
    start: StartImage | None = None
    """The images that it starts from; None until they are known, or if it starts from noise."""
    strength: float | None = None
    """Strength of `start`, in (0, 1]; None if it starts from noise."""

    def number_of_steps(self, base: Base, request: GenerateRequest) -> int:
        """Number of denoising steps of all batches, as `Step.total` counts them."""
        solver = base.schedule.solver(
            solver_name(request.sampler or base.default_sampler), request.steps, base.device, base.name
        )
        first = 0 if self.strength is None else first_step(base, request.steps, self.strength) * solver.order
        batches = -(-len(request.seeds) // (request.batch_size or images_at_once(self.width, self.height)))
        return batches * (len(solver.timesteps) - first)

    def starting_from(self, images: Sequence[Image.Image]) -> Pass:
        """This pass, starting from images (one per seed) that are enlarged to its size.

        Args:
            images: of the first pass; `strength` must be set.
        """
        assert self.strength is not None
        enlarged = [resize_cover(image, self.width, self.height) for image in images]
        return replace(self, start=StartImage(pixels=to_tensor(enlarged) * 2 - 1, strength=self.strength))


def enlarged_size(request: GenerateRequest, base: Base, width: int, height: int) -> tuple[int, int]:
    """Width and height of the second pass in pixels: the nearest multiples that the base supports.

    Raises:
        UserError: the base does not support the size, or a control would act at no step.
    """
    assert request.hires is not None
    multiple = base.size_multiple
    larger = [round(side * request.hires / multiple) * multiple for side in (width, height)]
    base.check_size(*larger)
    check_spans(request.controls, request.steps - first_step(base, request.steps, hires_strength(request)))
    return larger[0], larger[1]


def hires_strength(request: GenerateRequest) -> float:
    """The strength of the second pass."""
    return HIRES_STRENGTH if request.hires_strength is None else request.hires_strength
