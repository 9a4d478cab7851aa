"""The controls of a request with their hints and masks, at one size."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from controlkit.bases.base import Base
from controlkit.controls.control import Control
from controlkit.controls.hints import Hint
from controlkit.images import to_tensor
from controlkit.sampling.file_names import condition_name, mask_name
from controlkit.sampling.generation import Generation
from controlkit.sampling.identity import pixels_sha256
from controlkit.sampling.input_images import Frame, RequestImages
from controlkit.sampling.inputs import values_of
from controlkit.sampling.plan import ActiveControl


def active_controls(
    generation: Generation,
    controls: Sequence[Control],
    images: RequestImages,
    base: Base,
    frame: Frame,
    prefix: str = "",
) -> list[ActiveControl]:
    """The controls of a request as they act.

    Args:
        generation: gets the condition images and masks; of the first pass also hashes and notes.
        controls: loaded, in the order of the request's.
        images: of the request.
        base: that they act on.
        frame: of the pass.
        prefix: before the names of condition images and masks; empty for the first pass.
    """
    return [
        ActiveControl.in_mode(
            use.mode,
            base,
            control=control,
            hint=_hint(generation, index, control, images, base, frame, prefix),
            weight=use.weight,
            layers=use.layers,
            mask=_mask(generation, index, images, frame, prefix),
            start=use.start,
            end=use.end,
        )
        for index, (use, control) in enumerate(zip(generation.request.controls, controls, strict=True))
    ]


def _hint(
    generation: Generation,
    index: int,
    control: Control,
    images: RequestImages,
    base: Base,
    frame: Frame,
    prefix: str,
) -> Hint:
    use, hashes = generation.request.controls[index], generation.sha256["controls"][index]
    inputs = values_of(use, control)
    if (part := frame.part) is not None:
        for entry in control.inputs:
            if entry.part is not None and entry.name in inputs:
                inputs[entry.name] = entry.part(inputs[entry.name], part)
                if not inputs[entry.name]:
                    generation.notes.append(f"no {entry.name} of {use.control} are in the inpainted part")
    sources = images.controls[index]
    for source in sources:
        name = None if use.inputs is None else source.input.name
        image = source.condition_image(control, frame)
        generation.conditions[prefix + condition_name(index, name)] = image
        if not prefix:
            (hashes if name is None else hashes["inputs"][name])["condition"] = pixels_sha256(image)
            generation.notes += source.flat_note(control, image)
        inputs[source.input.name] = to_tensor([image]).to(base.device)
    if len(control.inputs) == 1 and sources:
        return control.encode(inputs[sources[0].input.name], base)
    return control.encode(inputs, base)


def _mask(generation: Generation, index: int, images: RequestImages, frame: Frame, prefix: str) -> Tensor | None:
    """The mask of a control `[1, 1, H, W]` in [0, 1]."""
    mask = images.masks[index]
    if mask is None:
        return None
    grey = mask.grey(frame)
    generation.masks[prefix + mask_name(index)] = grey
    if not prefix:
        generation.sha256["controls"][index]["mask_pixels"] = pixels_sha256(grey)
    if grey.getextrema()[1] == 0:
        name = generation.request.controls[index].control
        generation.notes.append(f"the mask of {name} is black everywhere, so the control does not act")
    return torch.from_numpy(np.asarray(grey, dtype=np.float32) / 255)[None, None]
