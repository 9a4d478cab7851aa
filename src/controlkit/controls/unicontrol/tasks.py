"""Tasks of a UniControl: their instructions, weighted mixtures of them, and embeddings of instructions."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from controlkit import conditions
from controlkit.bases.base import Base
from controlkit.bases.text import token_ids
from controlkit.errors import UserError, nearest

InstructionToken = Literal["end", "first"]
"""The token of an encoded instruction that the HyperNet reads."""

RELEASED = {
    "hed": "hed edge to image",
    "canny": "canny edge to image",
    "seg": "segmentation map to image",
    "depth": "depth map to image",
    "normal": "normal surface map to image",
    "openpose": "human pose skeleton to image",
    "img": "image editing",
    "hedsketch": "sketch to image",
    "bbox": "bounding box to image",
    "outpaint": "image outpainting",
    "grayscale": "gray image to color image",
    "blur": "deblur image to clean image",
    "inpaint": "image inpainting",
}
"""Tasks of the released checkpoints in the order of their adapters -> instructions (salesforce/UniControl,
cldm/cldm_unicontrol.py). Names are those of the conditions here; the last release trained all but `img`."""

Mixture = Mapping[str, float]
"""Task -> weight of its adapter; the weights sum to 1."""


def instruction_of(condition: str) -> str:
    """The default instruction of a condition: that of the paper's code, or `palette to image`."""
    return RELEASED.get(condition, f"{condition.replace('_', ' ')} to image")


def task_problem(value: Any) -> str | None:
    """Why a value is neither the name of a task nor a mapping of such names to weights, to follow the input's name."""
    if isinstance(value, str):
        return None
    if not isinstance(value, dict) or not value:
        return 'must be the name of a task, or weights of tasks such as {"depth": 0.6, "seg": 0.4}'
    for name, weight in value.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
            return f"must have weights of at least 0, not {name}: {weight!r}"
    return None if sum(value.values()) > 0 else "must have a weight above 0"


def instruction_problem(value: Any) -> str | None:
    """Why a value is no instruction, to follow the input's name."""
    return None if isinstance(value, str) and value.strip() else "must be a text, such as 'canny edge to image'"


def mixture_of(value: str | Mapping[str, float], tasks: Collection[str]) -> Mixture:
    """A value of the input `task` as weights that sum to 1.

    Args:
        tasks: the known ones.

    Raises:
        UserError: a task is unknown, or a weight invalid.
    """
    if (problem := task_problem(value)) is not None:
        raise UserError(f"the task {problem}", "wrong-type")
    weights = {value: 1.0} if isinstance(value, str) else value
    total = sum(weights.values())
    mixture: dict[str, float] = {}
    for name, weight in weights.items():
        task = _find(name, tasks)
        mixture[task] = mixture.get(task, 0.0) + weight / total
    return {task: weight for task, weight in mixture.items() if weight > 0}


def _find(name: str, tasks: Collection[str]) -> str:
    """The task of this name, or of the condition that it is another name of."""
    plain = name.removeprefix("control_")
    if plain in tasks:
        return plain
    try:
        condition = conditions.find(plain).name
    except UserError:
        condition = plain
    if condition not in tasks:
        raise UserError(f"the control has no task {name!r}{nearest(name, list(tasks))}", "unknown-name")
    return condition


class InstructionEmbeddings:
    """Embeddings of instructions by a base's text encoder, which is frozen: each is computed once per base.

    Args:
        token: `end` reads the end-of-text token, which has seen the whole instruction. `first` reads the first token,
            as the paper's code does (cldm_unicontrol.py: `c_all[BS:, :1, :]`). CLIP's attention is causal, so that one
            is the same for every text.
    """

    def __init__(self, token: InstructionToken) -> None:
        if token not in ("end", "first"):
            raise ValueError(f"the token of instructions is {token!r}; expected end or first")
        self.token = token
        self._known: WeakKeyDictionary[Base, dict[str, Tensor]] = WeakKeyDictionary()

    @torch.no_grad()
    def __call__(self, instruction: str, base: Base) -> Tensor:
        """An instruction => `[1, D]`, in the base's text width D, as the base's dtype and device are at first use."""
        if base.device.type == "meta":  # without tokenizers
            return base.zero_text().tokens[:, 0].to("meta")
        known = self._known.setdefault(base, {})
        if instruction not in known:
            tokens = base.encode_text([instruction]).tokens
            known[instruction] = tokens[:, self._position(instruction, base)].clone()
        return known[instruction]

    def _position(self, instruction: str, base: Base) -> int:
        if self.token == "first":
            return 0
        tokenizer = base.tokenizers[0]
        ids = token_ids(tokenizer, [instruction])[0]
        return int((ids == tokenizer.eos_token_id).int().argmax())  # the first one: the rest may be padding
