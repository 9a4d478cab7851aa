"""Face meshes and body pose by MediaPipe, whose package contains the weights. It runs on the CPU."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from controlkit.conditions.condition import BLACK, condition
from controlkit.conditions.fidelity import PSNR
from controlkit.conditions.learned.inputs import AT_RESOLUTION, back_to_size, to_resolution
from controlkit.conditions.learned.skeleton import POSE_F1, Person, draw_people, from_coco
from controlkit.conditions.models import LearnedModel, import_extra, load_once
from controlkit.conditions.pixels import length
from controlkit.errors import UserError

# Later versions require numpy 1, and 0.10.30 removed `solutions` with its weights.
MEDIAPIPE = LearnedModel(hub="mediapipe<0.10.15", licence="Apache-2.0", commercial=True, extra="mediapipe")

FACE_COLOURS = {
    "FACE_OVAL": (10, 200, 10),
    "LEFT_EYE": (10, 200, 180),
    "LEFT_EYEBROW": (10, 220, 180),
    "RIGHT_EYE": (180, 200, 10),
    "RIGHT_EYEBROW": (180, 220, 10),
    "LIPS": (10, 180, 10),
}
"""Outline in MediaPipe's face mesh -> colour, in the order of drawing. Left and right are the person's."""
PUPILS = {468: (250, 200, 10), 473: (10, 200, 250)}
"""Point in the middle of an iris -> colour: right, left."""

# Indices of COCO's 17 points among BlazePose's 33.
_COCO = (0, 2, 5, 7, 8, 11, 12, 13, 14, 15, 16, 23, 24, 25, 26, 27, 28)


@condition(
    "mediapipe_face",
    summary="faces as coloured outlines of eyes, brows, mouth and face (MediaPipe)",
    background=BLACK,
    aliases=("face_mesh", "mediapipe"),
    fidelity=PSNR,
    limits={"faces": (1, 100), "score": (0, 1), "resolution": (64, 4096)},
    mirrors=False,
    requires=MEDIAPIPE,
    mirror_finished=None,
    input_size=AT_RESOLUTION,
)
def mediapipe_face(image: np.ndarray, *, faces: int = 1, score: float = 0.5, resolution: int = 512) -> np.ndarray:
    """Outlines of faces on black, as CrucibleAI/ControlNetMediaPipeFace was trained on (Kartynnik et al. 2019).

    As there, faces narrower or lower than an eighth of the short side are left out.

    Args:
        faces: maximum number of faces.
        score: minimum confidence of a face.
        resolution: short side of the image in which faces are found and drawn, in pixels.
    """
    scaled = to_resolution(image, resolution)
    settings = {"max_num_faces": faces, "refine_landmarks": True, "min_detection_confidence": score}
    found = _run("mediapipe_face", "face_mesh", "FaceMesh", scaled, settings).multi_face_landmarks or ()
    meshes = [_points(mesh.landmark)[:, :2] for mesh in found]
    outlines = _face_outlines()
    canvas = np.zeros_like(scaled)
    for mesh in meshes:
        if np.ptp(mesh * canvas.shape[1::-1], axis=0).min() >= length(canvas, 64 / 512):
            draw_face(canvas, mesh, outlines)
    return back_to_size(canvas, *image.shape[:2])


@condition(
    "mediapipe_pose",
    summary="one person as a coloured skeleton (MediaPipe's BlazePose, drawn as OpenPose does; the body)",
    background=BLACK,
    aliases=("blazepose",),
    fidelity=POSE_F1,
    limits={"score": (0, 1), "person_score": (0, 1)},
    mirrors=False,
    requires=MEDIAPIPE,
    mirror_finished=None,
    input_size="with the person at 256 x 256",
)
def mediapipe_pose(image: np.ndarray, *, score: float = 0.5, person_score: float = 0.5) -> np.ndarray:
    """The most prominent person, drawn as by `openpose` (Bazarevsky et al. 2020, the full model).

    Small and fast on the CPU, and less exact than `openpose`: see docs/conditions.md. Points outside the image are left
    out.

    Args:
        score: minimum probability that a point is visible.
        person_score: minimum confidence of the person.
    """
    # Complexities 0 and 2 are not in the package.
    settings = {"model_complexity": 1, "min_detection_confidence": person_score}
    found = _run("mediapipe_pose", "pose", "Pose", image, settings).pose_landmarks
    if found is None:
        return np.zeros_like(image)
    points = _points(found.landmark)
    hidden = (points[:, 2] < score) | (points[:, :2] < 0).any(axis=1) | (points[:, :2] >= 1).any(axis=1)
    points[hidden] = np.nan
    body = from_coco(points[list(_COCO), :2] * image.shape[1::-1])
    return draw_people([Person(body=body)], *image.shape[:2])


def draw_face(canvas: np.ndarray, mesh: np.ndarray, outlines: Mapping[str, Iterable[tuple[int, int]]]) -> None:
    """Draw a face into `canvas`, `uint8 [H, W, 3]`.

    Args:
        mesh: MediaPipe's 478 points `[478, 2]` (x, y) as fractions of width and height. Those outside are not drawn.
        outlines: name in `FACE_COLOURS` -> pairs of points to connect.
    """
    inside = np.abs(mesh - 0.5).max(axis=1) <= 0.5
    size = np.array(canvas.shape[1::-1])
    pixels = np.minimum((mesh * size).astype(int), size - 1)
    thickness = max(1, round(length(canvas, 2 / 512)))
    for name, colour in FACE_COLOURS.items():
        for start, end in outlines[name]:
            if inside[start] and inside[end]:
                cv2.line(canvas, pixels[start].tolist(), pixels[end].tolist(), colour, thickness)
    for point, colour in PUPILS.items():
        if inside[point]:
            left, top = np.maximum(pixels[point] - thickness, 0).tolist()
            right, bottom = (pixels[point] + thickness).tolist()
            canvas[top:bottom, left:right] = colour


def _face_outlines() -> dict[str, Iterable[tuple[int, int]]]:
    tables = import_extra("mediapipe_face", MEDIAPIPE, "mediapipe").solutions.face_mesh
    return {name: getattr(tables, f"FACEMESH_{name}") for name in FACE_COLOURS}


def _points(landmarks: Iterable[Any]) -> np.ndarray:
    """(x, y, visibility) `[N, 3]`: fractions of width and height, and a probability."""
    return np.array([(point.x, point.y, point.visibility) for point in landmarks])


class _Solution:
    """A solution of MediaPipe, which handles one image at a time."""

    def __init__(self, solution: Any) -> None:
        self._solution, self._lock = solution, threading.Lock()

    def __call__(self, image: np.ndarray) -> Any:
        with self._lock:
            return self._solution.process(image)


def _run(name: str, module: str, solution: str, image: np.ndarray, settings: Mapping[str, Any]) -> Any:
    """The result of `mediapipe.solutions.<module>.<solution>(**settings)` for `image`.

    Raises:
        UserError: the package is missing, or is a version without `solutions`.
    """
    package = import_extra(name, MEDIAPIPE, "mediapipe")
    if not hasattr(package, "solutions"):
        version = getattr(package, "__version__", "the installed version")
        raise UserError(
            f"{name} needs mediapipe with `solutions`, which {version} lacks: run `{MEDIAPIPE.install}`",
            "missing-package",
        )

    def load(_: Path, __: Any) -> _Solution:
        return _Solution(getattr(getattr(package.solutions, module), solution)(static_image_mode=True, **settings))

    # Building a solution takes several times as long as an image.
    kind = " ".join((module, *(f"{key}={value}" for key, value in settings.items())))
    return load_once(kind, Path(package.__file__).parent, load)(image)
