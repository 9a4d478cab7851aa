"""Surface normals and face meshes by controlnet_aux."""

from __future__ import annotations

import numpy as np

from controlkit.conditions.condition import BLACK, condition
from controlkit.conditions.fidelity import NORMAL_ANGLE, PSNR
from controlkit.conditions.learned.controlnet_aux import annotate, annotate_faces
from controlkit.conditions.learned.inputs import AT_RESOLUTION
from controlkit.conditions.models import LearnedModel
from controlkit.conditions.pixels import mirrored_normals

BAE = LearnedModel(
    hub="lllyasviel/Annotators", licence="MIT", commercial=True, extra="annotators", files=("scannet.pt",)
)
# Later versions require numpy 1, and 0.10.30 removed `solutions`, which draws faces.
FACE_MESH = LearnedModel(hub="mediapipe<0.10.15", licence="Apache-2.0", commercial=True, extra="annotators")


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


@condition(
    "mediapipe_face",
    summary="faces as coloured outlines of eyes, brows, mouth and face (MediaPipe)",
    background=BLACK,
    aliases=("face_mesh", "mediapipe"),
    fidelity=PSNR,
    limits={"faces": (1, 100), "score": (0, 1), "resolution": (64, 4096)},
    mirrors=False,
    requires=FACE_MESH,
    mirror_finished=None,
    input_size=AT_RESOLUTION,
)
def mediapipe_face(image: np.ndarray, *, faces: int = 1, score: float = 0.5, resolution: int = 512) -> np.ndarray:
    """Outlines of faces on black (CrucibleAI/ControlNetMediaPipeFace). The weights are in the package mediapipe.

    Args:
        faces: maximum number of faces.
        score: minimum confidence of a face.
        resolution: short side of the network's input, in pixels.
    """
    return annotate_faces("mediapipe_face", FACE_MESH, image, resolution, faces, score)
