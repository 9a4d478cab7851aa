"""Generate the images of a request."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from controlkit.bases.base import Base
from controlkit.controls.control import Control
from controlkit.sampling.axes import expand_folders, points_of
from controlkit.sampling.generation import Generation
from controlkit.sampling.inputs import check_layers
from controlkit.sampling.models import Models
from controlkit.sampling.request import GenerateRequest
from controlkit.sampling.residual_cache import ResidualCache
from controlkit.sampling.single import generate_single
from controlkit.sampling.step import Step
from controlkit.sampling.varied import generate_varied


def generate(
    request: GenerateRequest,
    *,
    base: Base | None = None,
    controls: Sequence[Control] | None = None,
    cache: ResidualCache | None = None,
    on_step: Callable[[Step], object] | None = None,
    on_images: Callable[[Generation], object] | None = None,
) -> Generation:
    """Generate the images of `request`.

    Args:
        base: a loaded base; default: load that of the request.
        controls: loaded controls, in the order of the request's.
        cache: keeps residuals that do not depend on the noise, for the next request under the same condition.
        on_step: called after every denoising step, for progress and previews. An exception that it raises cancels the
            request.
        on_images: called with the generation after every batch of images, to save or show what is done so far.

    Raises:
        UserError: an image, control, base or setting cannot be used.
    """
    request = expand_folders(request)
    if base is None and controls is None:
        check_layers(point.request for point in points_of(request))
    if request.vary or request.xy:
        return generate_varied(request, base=base, controls=controls, cache=cache, on_step=on_step, on_images=on_images)
    return generate_single(
        request, base=base, controls=controls, cache=cache, on_step=on_step, on_images=on_images, models=Models()
    )
