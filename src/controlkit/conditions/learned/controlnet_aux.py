"""Annotators of controlnet_aux, for networks that transformers does not have.

The package needs torchvision, so it belongs to the extra `annotators` and is imported at the first call.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from controlkit.conditions.learned.inputs import back_to_size, to_resolution
from controlkit.conditions.models import LearnedModel, find_folder, import_extra, load_once
from controlkit.errors import UserError

if TYPE_CHECKING:
    import torch


def annotate(
    name: str,
    model: LearnedModel,
    detector: str,
    image: np.ndarray,
    resolution: int,
    override: str | None,
    **settings: Any,
) -> np.ndarray:
    """Run `controlnet_aux.<detector>` on `image`; both are `uint8 [H, W, 3]`.

    The image is scaled here, and the detector runs at that size, because its own scaling does not preserve the size.

    Raises:
        UserError: the extra or the weights are missing, or the package cannot load them.
    """
    package = import_extra(name, model, "controlnet_aux")

    def load(folder: Path, where: torch.device) -> Any:
        try:
            return getattr(package, detector).from_pretrained(str(folder)).to(where)
        except Exception as error:  # the package passes on whatever torch raises for a truncated file
            files = ", ".join(model.files)
            message = f"{name}: cannot load {files} in {folder}; download the model again"
            raise UserError(message, "damaged-file") from error

    annotator = load_once(detector, find_folder(name, model, override), load)
    scaled = to_resolution(image, resolution)
    size = min(scaled.shape[:2])
    annotation = annotator(scaled, detect_resolution=size, image_resolution=size, output_type="np", **settings)
    return back_to_size(np.ascontiguousarray(annotation, dtype=np.uint8), *image.shape[:2])
