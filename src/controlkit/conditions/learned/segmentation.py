"""Semantic segmentation: every pixel in the colour of its class."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from controlkit.conditions.condition import BLACK, condition
from controlkit.conditions.fidelity import CLASS_IOU
from controlkit.conditions.learned.inputs import BY_SETTINGS, prepare, read_inputs
from controlkit.conditions.learned.palettes import ADE20K, COCO_PANOPTIC
from controlkit.conditions.models import LearnedModel, find_folder, load_once, load_transformers, model_type
from controlkit.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

UPERNET = LearnedModel(hub="openmmlab/upernet-convnext-small", licence="MIT", commercial=True)
SEGFORMER = LearnedModel(
    hub="nvidia/segformer-b5-finetuned-ade-640-640", licence="NVIDIA Source Code License", commercial=False
)
ONEFORMER_ADE20K = LearnedModel(hub="shi-labs/oneformer_ade20k_swin_large", licence="MIT", commercial=True)
ONEFORMER_COCO = LearnedModel(hub="shi-labs/oneformer_coco_swin_large", licence="MIT", commercial=True)

_DENSE = ("upernet", "segformer", "beit", "data2vec-vision", "mobilevit", "mobilevitv2", "mobilenet_v2", "dpt")
_QUERIES = ("oneformer", "mask2former", "maskformer")
_UNREAD = (r"auxiliary_head\.", r"text_mapper\.", r"prompt_ctx", r"criterion\.", r"residual_layer1\.", r"pooler\.")
_TASK = "the task is semantic"


@condition(
    "seg",
    summary="classes of ADE20K as colours (UperNet on ConvNeXt)",
    background=BLACK,
    aliases=("segmentation", "segbase", "seg_ade20k", "seg_upernet", "seg_ufade20k"),
    fidelity=CLASS_IOU,
    requires=UPERNET,
    palette=ADE20K,
    resize="nearest",
    input_size=BY_SETTINGS,
)
def seg(image: np.ndarray, *, model: str | None = None) -> np.ndarray:
    """The 150 classes of ADE20K in their usual colours.

    ControlNet and CtrLoRA use UperNet (Xiao et al. 2018) on UniFormer, which transformers does not have.

    Args:
        model: a folder with a segmenter of these 150 classes (UperNet, SegFormer, OneFormer, ...), or one on the hub.
    """
    return _draw("seg", image, UPERNET, model, ADE20K)


@condition(
    "seg_segformer",
    summary="classes of ADE20K as colours (SegFormer B5)",
    background=BLACK,
    aliases=("segformer",),
    fidelity=CLASS_IOU,
    requires=SEGFORMER,
    palette=ADE20K,
    resize="nearest",
    input_size=BY_SETTINGS,
)
def seg_segformer(image: np.ndarray, *, model: str | None = None) -> np.ndarray:
    """The 150 classes of ADE20K, by SegFormer (Xie et al. 2021), whose weights forbid commercial use.

    Args:
        model: as for `seg`.
    """
    return _draw("seg_segformer", image, SEGFORMER, model, ADE20K)


@condition(
    "seg_oneformer",
    summary="classes of ADE20K as colours (OneFormer Swin-L; ControlNet 1.1's choice)",
    background=BLACK,
    aliases=("oneformer", "seg_ofade20k"),
    fidelity=CLASS_IOU,
    requires=ONEFORMER_ADE20K,
    palette=ADE20K,
    resize="nearest",
    input_size=BY_SETTINGS,
)
def seg_oneformer(image: np.ndarray, *, model: str | None = None) -> np.ndarray:
    """The 150 classes of ADE20K, by OneFormer (Jain et al. 2023) in its semantic task.

    Args:
        model: as for `seg`.
    """
    return _draw("seg_oneformer", image, ONEFORMER_ADE20K, model, ADE20K)


@condition(
    "seg_coco",
    summary="classes of COCO as colours (OneFormer Swin-L)",
    background=BLACK,
    aliases=("seg_ofcoco", "oneformer_coco"),
    fidelity=CLASS_IOU,
    requires=ONEFORMER_COCO,
    palette=COCO_PANOPTIC,
    resize="nearest",
    input_size=BY_SETTINGS,
)
def seg_coco(image: np.ndarray, *, model: str | None = None) -> np.ndarray:
    """The 133 classes of COCO panoptic, by OneFormer in its semantic task.

    Args:
        model: a folder with a segmenter of these 133 classes (Mask2Former, ...), or one on the hub.
    """
    return _draw("seg_coco", image, ONEFORMER_COCO, model, COCO_PANOPTIC)


def _draw(name: str, image: np.ndarray, model: LearnedModel, override: str | None, palette: np.ndarray) -> np.ndarray:
    import torch

    folder = find_folder(name, model, override)
    kind = model_type(name, folder, (*_DENSE, *_QUERIES))
    dense = kind in _DENSE
    architecture = "AutoModelForSemanticSegmentation" if dense else "AutoModelForUniversalSegmentation"
    network = load_transformers(name, folder, architecture, (kind,), unread=_UNREAD)
    if network.config.num_labels != len(palette):
        raise UserError(
            f"{name} needs a model of {len(palette)} classes; the one in {folder} has {network.config.num_labels}",
            "wrong-kind",
        )
    with torch.inference_mode():
        pixels = prepare(image, read_inputs(name, folder), least=32).to(network.device)
        scores = network(pixels).logits[0] if dense else _from_queries(name, folder, network, pixels)
        labels = labels_at(scores.float(), *image.shape[:2])
    return palette[labels.cpu().numpy()]


def _from_queries(name: str, folder: Path, network: Any, pixels: Tensor) -> Tensor:
    """Class scores `[C, h, w]`: the masks of all queries, weighted by their class probabilities."""
    import torch

    task = {"task_inputs": _task(name, folder, network)} if network.config.model_type == "oneformer" else {}
    output = network(pixel_values=pixels, **task)
    classes = output.class_queries_logits[0].softmax(dim=-1)[:, :-1]
    return torch.einsum("qc,qhw->chw", classes, output.masks_queries_logits[0].sigmoid())


def _task(name: str, folder: Path, network: Any) -> Tensor:
    """OneFormer's task prompt as CLIP tokens `[1, length]`."""

    def load(folder: Path, where: Any) -> Any:
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # tokenizers raise their own errors
            message = f"{name}: cannot load the tokenizer in {folder}; download the model again"
            raise UserError(message, "damaged-file") from error

    tokenizer, length = load_once("AutoTokenizer", folder, load), network.config.task_seq_len
    tokens = tokenizer([_TASK], padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return tokens.input_ids.to(network.device)


def labels_at(scores: Tensor, height: int, width: int, at_once: int = 16) -> Tensor:
    """The best class `[height, width]` of scores `[C, h, w]`, scaled bilinearly.

    `at_once` classes are scaled at a time: all 150 of a 2,048 x 2,048 image would take 2.5 GB.
    """
    import torch

    best: Tensor | None = None
    labels = torch.zeros((height, width), dtype=torch.long, device=scores.device)
    for first in range(0, len(scores), at_once):
        part = torch.nn.functional.interpolate(
            scores[None, first : first + at_once], (height, width), mode="bilinear", align_corners=False
        )[0]
        highest, which = part.max(dim=0)
        if best is None:
            best, labels = highest, which
        else:
            better = highest > best
            best, labels = torch.where(better, highest, best), torch.where(better, which + first, labels)
    return labels
