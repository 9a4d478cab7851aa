"""Generate the images of a request."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
from PIL import Image

from controlkit.bases.base import Base
from controlkit.controls.control import Control
from controlkit.sampling.axes import expand_folders, points_of
from controlkit.sampling.generation import Generation
from controlkit.sampling.given import files_of_images, with_what_is_loaded
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
    images: Mapping[str, Image.Image | np.ndarray] | None = None,
    cache: ResidualCache | None = None,
    on_step: Callable[[Step], object] | None = None,
    on_images: Callable[[Generation], object] | None = None,
) -> Generation:
    """Generate the images of `request`.

    Args:
        base: a loaded base; default: load that of the request. Calls in several threads with one base wait for each
            other.
        controls: loaded controls, in the order of the request's.
        images: images that are no files, by the name that stands for each in the request: PIL images, or `uint8`
            arrays `[H, W]`, `[H, W, 3]` or `[H, W, 4]`.
        cache: keeps residuals that do not depend on the noise, for the next request under the same condition.
        on_step: called after every denoising step, for progress and previews. An exception that it raises cancels the
            request.
        on_images: called with the generation after every batch of images, to save or show what is done so far.

    Raises:
        UserError: an image, control, base or setting cannot be used.
    """
    given = files_of_images(images or {}, request)
    request = with_what_is_loaded(expand_folders(request, given=given), base, controls)
    if base is None and controls is None:
        check_layers(point.request for point in points_of(request))
    passed: dict[str, Any] = {"base": base, "controls": controls, "given": given, "cache": cache}
    with nullcontext() if base is None else base.in_use:
        if request.vary or request.xy:
            return generate_varied(request, **passed, on_step=on_step, on_images=on_images)
        return generate_single(request, **passed, on_step=on_step, on_images=on_images, models=Models())
