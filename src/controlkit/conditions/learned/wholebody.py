"""DWPose: body, hands and face by two ONNX networks that OpenCV runs on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from controlkit.conditions.condition import BLACK, condition
from controlkit.conditions.learned.pose import frame
from controlkit.conditions.learned.skeleton import WHOLE_BODY_F1, Person, draw_people, from_coco
from controlkit.conditions.models import LearnedModel, find_folder, load_once
from controlkit.errors import UserError

DWPOSE = LearnedModel(
    hub="yzd-v/DWPose", licence="Apache-2.0", commercial=True, files=("yolox_l.onnx", "dw-ll_ucoco_384.onnx")
)

Network = Callable[[np.ndarray], list[np.ndarray]]
"""`float32 [N, 3, h, w]` => its outputs."""

_MEAN, _STD = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
_DETECTOR_SIDE, _POSE_SIZE = 640, (384, 288)
_FACE, _LEFT_HAND, _RIGHT_HAND = slice(23, 91), slice(91, 112), slice(112, 133)
_MAX_PEOPLE = 32


@condition(
    "dwpose",
    summary="people as coloured skeletons with hands and face (DWPose)",
    background=BLACK,
    aliases=("openpose_full", "dw_openpose", "dw_openpose_full"),
    fidelity=WHOLE_BODY_F1,
    limits={"score": (0, 1), "person_score": (0, 1)},
    mirrors=False,
    requires=DWPOSE,
    mirror_finished=None,
    input_size="fitted into 640 x 640, each person into 288 x 384",
)
def dwpose(
    image: np.ndarray,
    *,
    hands: bool = True,
    face: bool = True,
    score: float = 0.3,
    person_score: float = 0.3,
    model: str | None = None,
) -> np.ndarray:
    """Bodies as `openpose` draws them, 21 points for each hand and 68 for the face (Yang et al. 2023).

    Args:
        hands: draw the hands.
        face: draw the face.
        score: minimum confidence of a point.
        person_score: minimum confidence of a person.
        model: a folder with `yolox_l.onnx` and `dw-ll_ucoco_384.onnx`, or another model on the hub with these files.
    """
    folder = find_folder("dwpose", DWPOSE, model)
    detector, pose = (load_once(file, folder, _loader(file)) for file in DWPOSE.files)
    people = []
    for box in find_people(image, detector, person_score)[::-1]:
        points, confidence = whole_body(image, box, pose)
        points[confidence < score] = np.nan
        people.append(
            Person(
                body=from_coco(points[:17]),
                hands=(points[_LEFT_HAND], points[_RIGHT_HAND]) if hands else (),
                face=points[_FACE] if face else None,
            )
        )
    return draw_people(people, *image.shape[:2])


def _loader(file: str) -> Callable[[Path, Any], Network]:
    def load(folder: Path, _: Any) -> Network:
        try:
            network = cv2.dnn.readNetFromONNX(str(folder / file))
        except cv2.error as error:
            message = f"dwpose: {folder / file} is not an ONNX network; download it again"
            raise UserError(message, "damaged-file") from error

        def run(pixels: np.ndarray) -> list[np.ndarray]:
            network.setInput(pixels)
            return list(network.forward(network.getUnconnectedOutLayersNames()))

        return run

    return load


def find_people(image: np.ndarray, detector: Network, score: float) -> list[tuple[float, float, float, float]]:
    """Boxes (left, top, width, height) of people in pixels, most confident first, by YOLOX (Ge et al. 2021).

    Its input is BGR from 0 to 255 in the upper left of 640 x 640, grey elsewhere. Non-maximum suppression at an IoU of
    0.45.
    """
    height, width = image.shape[:2]
    zoom = min(_DETECTOR_SIDE / height, _DETECTOR_SIDE / width)
    rows, columns = max(1, int(height * zoom)), max(1, int(width * zoom))
    padded = np.full((_DETECTOR_SIDE, _DETECTOR_SIDE, 3), 114, np.uint8)
    padded[:rows, :columns] = cv2.resize(image, (columns, rows), interpolation=cv2.INTER_LINEAR)
    pixels = padded[..., ::-1].transpose(2, 0, 1)[None].astype(np.float32)
    output = detector(np.ascontiguousarray(pixels))[0][0].astype(np.float64)
    cells, strides = _yolox_cells(_DETECTOR_SIDE)
    if len(output) != len(cells):
        raise UserError(
            f"dwpose: expected {len(cells)} boxes from {DWPOSE.files[0]}, got {len(output)}; download it again",
            "wrong-kind",
        )
    centres = (output[:, :2] + cells) * strides
    sizes = np.exp(np.clip(output[:, 2:4], -20, 20)) * strides
    confidence = output[:, 4] * output[:, 5]
    boxes = np.concatenate([centres - sizes / 2, sizes], axis=1) / zoom
    candidates = np.nonzero(confidence > score)[0]
    candidates = candidates[np.argsort(-confidence[candidates], kind="stable")][:1000]
    kept = cv2.dnn.NMSBoxes(boxes[candidates].tolist(), confidence[candidates].tolist(), score, 0.45)
    best = candidates[np.array(kept, dtype=int).ravel()][:_MAX_PEOPLE]
    return [tuple(box) for box in boxes[best].tolist()]


def _yolox_cells(side: int) -> tuple[np.ndarray, np.ndarray]:
    """Corner (x, y) `[N, 2]` in cells and stride `[N, 1]` of each YOLOX box."""
    cells, strides = [], []
    for stride in (8, 16, 32):
        y, x = np.mgrid[: side // stride, : side // stride]
        cells.append(np.stack([x.ravel(), y.ravel()], axis=1))
        strides.append(np.full((x.size, 1), stride))
    return np.concatenate(cells), np.concatenate(strides)


def whole_body(
    image: np.ndarray, box: tuple[float, float, float, float], pose: Network
) -> tuple[np.ndarray, np.ndarray]:
    """The 133 points of COCO-WholeBody in a box: (x, y) `[133, 2]` in pixels, and confidences `[133]`.

    The network (RTMPose, Jiang et al. 2023) reads RGB normalised by ImageNet's mean and deviation, and classifies each
    coordinate into bins of half a pixel.
    """
    rows, columns = _POSE_SIZE
    x, y, wide, high = frame(*box, columns / rows)
    across, down = columns / max(wide, 1e-3), rows / max(high, 1e-3)
    matrix = np.array([[across, 0, columns / 2 - across * x], [0, down, rows / 2 - down * y]])
    cropped = cv2.warpAffine(image, matrix, (columns, rows), flags=cv2.INTER_LINEAR)
    pixels = ((cropped - _MEAN) / _STD).transpose(2, 0, 1)[None].astype(np.float32)
    outputs = sorted(pose(np.ascontiguousarray(pixels)), key=lambda output: output.shape[-1])
    if len(outputs) != 2 or any(output.shape[1] != 133 for output in outputs):
        shapes = ", ".join(str(list(output.shape)) for output in outputs)
        raise UserError(
            f"dwpose: expected 133 points in x and y from {DWPOSE.files[1]}, got {shapes}; download it again",
            "wrong-kind",
        )
    positions = np.stack([output[0].argmax(axis=1) for output in outputs], axis=1) / 2
    confidence = np.minimum(*(output[0].max(axis=1) for output in outputs))
    points = positions / (columns, rows) * (wide, high) + (x - wide / 2, y - high / 2)
    return points, confidence
