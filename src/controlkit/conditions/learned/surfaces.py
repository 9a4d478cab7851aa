"""Surface normals by controlnet_aux."""

from __future__ import annotations

import numpy as np

from controlkit.conditions.condition import condition
from controlkit.conditions.fidelity import NORMAL_ANGLE
from controlkit.conditions.learned.controlnet_aux import annotate
from controlkit.conditions.learned.inputs import AT_RESOLUTION
from controlkit.conditions.models import LearnedModel
from controlkit.conditions.pixels import mirrored_normals

BAE = LearnedModel(
    hub="lllyasviel/Annotators", licence="MIT", commercial=True, extra="annotators", files=("scannet.pt",)
)


@condition(
    "normal_bae",
    summary="surface normals as colours (Bae et al. 2021, ScanNet)",
    background=(128, 128, 255),
    aliases=("normalbae",),
    fidelity=NORMAL_ANGLE,
    limits={"resolution": (64, 4096)},
    mirrors=False,
    requires=BAE,
    mirror_finished=mirrored_normals,
    input_size=AT_RESOLUTION,
)
def normal_bae(image: np.ndarray, *, resolution: int = 512, model: str | None = None) -> np.ndarray:
    """Normals n as (n + 1) / 2 in red, green and blue, as for ControlNet 1.1.

    Args:
        resolution: short side of the network's input, in pixels.
        model: a folder with `scannet.pt`, or another model on the hub with that file.
    """
    return annotate("normal_bae", BAE, "NormalBaeDetector", image, resolution, model)
