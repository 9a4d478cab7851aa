"""Annotators of the package controlnet_aux, for the networks that transformers does not have.

The package needs torchvision, so it is an extra (`annotators`) and is imported when one of its conditions is called.
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
    given: str | None,
    **settings: Any,
) -> np.ndarray:
    """The annotation that `controlnet_aux.<detector>` makes of `image`, both `uint8 [H, W, 3]`.

    The image is scaled here and the detector is told the size that it already has, because it would give back another
    size than it got.

    Raises:
        UserError: the extra or the weights are not there, or the package fails on them.
    """
    package = import_extra(name, model, "controlnet_aux")

    def load(folder: Path, where: torch.device) -> Any:
        try:
            return getattr(package, detector).from_pretrained(str(folder)).to(where)
        except Exception as error:  # the package lets through whatever torch raises for a torn file
            files = ", ".join(model.files)
            raise UserError(f"{name}: {files} in {folder} cannot be loaded; download the model again") from error

    found = load_once(detector, find_folder(name, model, given), load)
    seen = to_resolution(image, resolution)
    size = min(seen.shape[:2])
    annotation = found(seen, detect_resolution=size, image_resolution=size, output_type="np", **settings)
    return back_to_size(np.ascontiguousarray(annotation, dtype=np.uint8), *image.shape[:2])


def annotate_faces(
    name: str, model: LearnedModel, image: np.ndarray, resolution: int, faces: int, score: float
) -> np.ndarray:
    """The outlines of faces that controlnet_aux draws with mediapipe, `uint8 [H, W, 3]`.

    Raises:
        UserError: one of the two packages is not there, or mediapipe is one without the interface that is used.
    """
    mediapipe = import_extra(name, model, "mediapipe")
    if not hasattr(mediapipe, "solutions"):
        version = getattr(mediapipe, "__version__", "installed")
        raise UserError(
            f"{name} needs mediapipe's `solutions`, which mediapipe {version} has not: run `{model.install}`"
        )
    detector = import_extra(name, model, "controlnet_aux").MediapipeFaceDetector()
    seen = to_resolution(image, resolution)
    size = min(seen.shape[:2])
    annotation = detector(
        seen,
        max_faces=faces,
        min_confidence=score,
        output_type="np",
        detect_resolution=size,
        image_resolution=size,
    )
    return back_to_size(np.ascontiguousarray(annotation, dtype=np.uint8), *image.shape[:2])
