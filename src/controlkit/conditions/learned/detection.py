"""Object detection, and the detected boxes as a condition."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from controlkit.conditions.coco import COCO_CATEGORIES
from controlkit.conditions.condition import BLACK, condition, find
from controlkit.conditions.fidelity import CLASS_IOU
from controlkit.conditions.learned.inputs import BY_SETTINGS, prepare, read_inputs
from controlkit.conditions.models import LearnedModel, find_folder, load_transformers
from controlkit.errors import UserError

RT_DETR = LearnedModel(hub="PekingU/rtdetr_r50vd_coco_o365", licence="Apache-2.0", commercial=True)

_SIGMOID = ("rt_detr", "rt_detr_v2", "d_fine")
_SOFTMAX = ("detr", "yolos", "conditional_detr", "deformable_detr")
PERSON = 1
"""COCO's category id of people."""


@dataclass(frozen=True, kw_only=True)
class Detection:
    """One object in an image."""

    left: float
    """In pixels from the left edge."""
    top: float
    """In pixels from the top."""
    width: float
    """In pixels."""
    height: float
    """In pixels."""
    category: int
    """COCO's category id."""
    score: float
    """Confidence, in [0, 1]."""


@condition(
    "bbox_detected",
    summary="filled boxes coloured by class, of objects found in the image (RT-DETR)",
    background=BLACK,
    aliases=("bbox_rtdetr", "detected_boxes"),
    fidelity=CLASS_IOU,
    limits={"score": (0, 1)},
    requires=RT_DETR,
    resize="nearest",
    input_size=BY_SETTINGS,
)
def bbox_detected(image: np.ndarray, *, score: float = 0.4, model: str | None = None) -> np.ndarray:
    """Boxes of COCO's 80 classes in the colours of `bbox`, the largest first, on black.

    CtrLoRA, annotator/bbox: YOLOv4's detections with a confidence of at least 0.4.

    Args:
        score: minimum confidence of an object.
        model: a folder with an RT-DETR, DETR or YOLOS model of COCO's classes, or one on the hub.
    """
    found = detect("bbox_detected", image, RT_DETR, model, score)
    boxes = [{"bbox": [o.left, o.top, o.width, o.height], "category_id": o.category} for o in found]
    return find("bbox")(image, boxes=boxes)


def detect(
    name: str,
    image: np.ndarray,
    model: LearnedModel,
    override: str | None,
    score: float,
    parameter: str = "model",
) -> list[Detection]:
    """The objects in `image`, most confident first.

    Raises:
        UserError: the weights are missing, of another kind, or of other classes than COCO's.
    """
    import torch

    folder = find_folder(name, model, override, parameter)
    network = load_transformers(name, folder, "AutoModelForObjectDetection", (*_SIGMOID, *_SOFTMAX))
    categories = _categories(name, folder.name, network.config)
    with torch.inference_mode():
        output = network(prepare(image, read_inputs(name, folder), least=64).to(network.device))
        logits, boxes = output.logits[0].float().cpu(), output.pred_boxes[0].float().cpu().numpy()
    # DETR and YOLOS end with a "no object" class; the others score each class independently.
    has_no_object = network.config.model_type in ("detr", "yolos")
    scores = (logits.softmax(-1)[:, :-1] if has_no_object else logits.sigmoid()).numpy()
    height, width = image.shape[:2]
    queries, classes = np.nonzero(scores > score) if not has_no_object else _best_of_each(scores, score)
    found = []
    for query, which in zip(queries.tolist(), classes.tolist(), strict=True):
        across, down, wide, high = (boxes[query] * (width, height, width, height)).tolist()
        found.append(
            Detection(
                left=across - wide / 2,
                top=down - high / 2,
                width=wide,
                height=high,
                category=categories[which] if which < len(categories) else 0,
                score=float(scores[query, which]),
            )
        )
    return sorted(found, key=lambda detection: -detection.score)[: len(boxes)]


def _best_of_each(scores: np.ndarray, score: float) -> tuple[np.ndarray, np.ndarray]:
    classes = scores.argmax(axis=1)
    queries = np.nonzero(scores[np.arange(len(scores)), classes] > score)[0]
    return queries, classes[queries]


def _categories(name: str, folder: str, config: object) -> tuple[int, ...]:
    """COCO's category id of each class of a detector."""
    classes = int(getattr(config, "num_labels", 0))
    if classes == len(COCO_CATEGORIES):
        return COCO_CATEGORIES
    if classes in (91, 92):
        return tuple(range(classes))
    raise UserError(f"{name} needs a detector of COCO's 80 classes; the model in {folder} has {classes}", "wrong-kind")
