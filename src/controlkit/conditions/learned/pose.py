"""Body pose: a detector finds people, ViTPose their keypoints."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

from controlkit.conditions.condition import BLACK, condition
from controlkit.conditions.learned.detection import PERSON, RT_DETR, Detection, detect
from controlkit.conditions.learned.inputs import BY_SETTINGS, normalised, read_inputs
from controlkit.conditions.learned.skeleton import POSE_F1, Person, draw_people, from_coco
from controlkit.conditions.models import LearnedModel, find_folder, load_transformers
from controlkit.errors import UserError

VITPOSE = LearnedModel(
    hub="usyd-community/vitpose-base-simple", licence="Apache-2.0", commercial=True, companions=(RT_DETR,)
)

_MAX_PEOPLE = 32


@condition(
    "openpose",
    summary="people as coloured skeletons (ViTPose, drawn as OpenPose does; the body)",
    background=BLACK,
    aliases=("pose", "openpose_body", "vitpose"),
    fidelity=POSE_F1,
    limits={"score": (0, 1), "person_score": (0, 1)},
    mirrors=False,
    requires=VITPOSE,
    mirror_finished=None,
    input_size=BY_SETTINGS,
)
def openpose(
    image: np.ndarray,
    *,
    score: float = 0.3,
    person_score: float = 0.5,
    model: str | None = None,
    detector: str | None = None,
) -> np.ndarray:
    """The 18 points of each body and the limbs between them, on black.

    CMU's OpenPose network forbids commercial use. ViTPose (Xu et al. 2022) finds COCO's 17 points, which determine
    OpenPose's (the neck is the middle of the shoulders). Hands and face: `dwpose`.

    Args:
        score: minimum confidence of a point.
        person_score: minimum confidence of a person.
        model: a folder with a ViTPose model, or one on the hub.
        detector: a folder with an RT-DETR, DETR or YOLOS model of COCO's classes, or one on the hub.
    """
    found = detect("openpose", image, RT_DETR, detector, person_score, "detector")
    boxes = [detection for detection in found if detection.category == PERSON][:_MAX_PEOPLE]
    # Missing weights are an error for images without people, too.
    points, confidence = _joints(image, boxes, model)
    points[confidence < score] = np.nan
    people = [Person(body=from_coco(joints)) for joints in points[::-1]]
    return draw_people(people, *image.shape[:2])


def _joints(image: np.ndarray, boxes: list[Detection], override: str | None) -> tuple[np.ndarray, np.ndarray]:
    """COCO's points of the people in `boxes`: (x, y) `[N, 17, 2]` in pixels, and confidences `[N, 17]`."""
    import torch

    folder = find_folder("openpose", VITPOSE, override)
    network = load_transformers("openpose", folder, "VitPoseForPoseEstimation", ("vitpose",))
    if network.config.num_labels != 17:
        points = network.config.num_labels
        raise UserError(f"openpose needs a model of COCO's 17 points; the one in {folder} has {points}", "wrong-kind")
    if not boxes:
        return np.zeros((0, 17, 2)), np.zeros((0, 17))
    inputs = read_inputs("openpose", folder)
    height, width = inputs.size or (256, 192)
    frames = [frame(box.left, box.top, box.width, box.height, width / height) for box in boxes]
    crops = [crop(image, box, height, width) for box in frames]
    extra: dict[str, Any] = {}
    with torch.inference_mode():
        pixels = torch.cat([normalised(image, inputs) for image in crops]).to(network.device)
        if network.config.backbone_config.num_experts > 1:
            # ViTPose++ has an expert per data set; the first is COCO's.
            extra["dataset_index"] = torch.zeros(len(pixels), dtype=torch.long, device=network.device)
        heatmaps = network(pixels, **extra).heatmaps.float().cpu().numpy()
    return joints_of(heatmaps, np.array(frames))


def frame(
    left: float, top: float, width: float, height: float, aspect: float, padding: float = 1.25
) -> tuple[float, float, float, float]:
    """(centre x, centre y, width, height) around a box: widened to `aspect` (width / height), then by `padding`."""
    wide, high = max(width, height * aspect), max(height, width / aspect)
    return left + width / 2, top + height / 2, wide * padding, high * padding


def crop(image: np.ndarray, frame: tuple[float, float, float, float], height: int, width: int) -> np.ndarray:
    """The crop at `frame`, scaled to `[height, width, 3]`, black outside the image.

    Corner pixels lie on the frame's corners ("unbiased data processing", Huang et al. 2020).
    """
    x, y, wide, high = frame
    across, down = (width - 1) / max(wide, 1e-3), (height - 1) / max(high, 1e-3)
    matrix = np.array([[across, 0, across * (wide / 2 - x)], [0, down, down * (high / 2 - y)]])
    return cv2.warpAffine(image, matrix, (width, height), flags=cv2.INTER_LINEAR)


def joints_of(heatmaps: np.ndarray, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Peaks of `[N, K, h, w]` at subcell precision (DARK, Zhang et al. 2020): `[N, K, 2]` in the image, and `[N, K]`.

    A parabola is fitted around the highest cell to the logarithm of the map, blurred by a Gaussian of 0.8 cells.

    Args:
        frames: `[N, 4]` from `frame`.
    """
    count, kinds, rows, columns = heatmaps.shape
    points = np.zeros((count, kinds, 2))
    for person in range(count):
        for kind in range(kinds):
            points[person, kind] = _peak(heatmaps[person, kind])
    corner, extent = frames[:, None, :2] - frames[:, None, 2:] / 2, frames[:, None, 2:]
    return corner + points / (columns - 1, rows - 1) * extent, heatmaps.reshape(count, kinds, -1).max(axis=2)


def _peak(heatmap: np.ndarray) -> tuple[float, float]:
    row, column = np.unravel_index(int(heatmap.argmax()), heatmap.shape)
    blurred = cv2.GaussianBlur(heatmap, (11, 11), 0.8, borderType=cv2.BORDER_REFLECT)
    logs = np.pad(np.log(np.clip(blurred, 1e-3, 50)).astype(np.float64), 1, mode="edge")
    near = logs[row : row + 3, column : column + 3]
    slope = np.array([near[1, 2] - near[1, 0], near[2, 1] - near[0, 1]]) / 2
    mixed = (near[2, 2] - near[1, 2] - near[2, 1] + 2 * near[1, 1] - near[1, 0] - near[0, 1] + near[0, 0]) / 2
    bend = np.array(
        [[near[1, 2] - 2 * near[1, 1] + near[1, 0], mixed], [mixed, near[2, 1] - 2 * near[1, 1] + near[0, 1]]]
    )
    bend += np.finfo(np.float32).eps * np.eye(2)
    step = np.linalg.solve(bend, slope) if abs(np.linalg.det(bend)) > 1e-12 else np.zeros(2)
    # The parabola of a flat or ragged map can peak anywhere; a true peak is within a cell or two of the highest.
    across, down = np.clip(step, -2, 2)
    return float(column - across), float(row - down)
