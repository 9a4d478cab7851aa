"""A captioner for nano: the nearest concept that it was trained on, by the features that evaluate it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from controlkit.evaluation.features import lite0_features
from controlkit.evaluation.metrics import concept_similarity
from controlkit.nano.evaluation_sets import read_set
from controlkit.nano.icons import caption_of
from controlkit.sampling.prompts import Captioner, register_captioner

NAME = "concepts"


def load_concept_captioner() -> Captioner:
    """Images => the concept of the evaluation set `seen` (50 concepts, four images each) with the nearest features.

    Nearest is by cosine to the mean feature of a concept. Images of concepts that are not in the set get one that is.

    Raises:
        UserError: the `metrics` extra is not installed.
    """
    concepts, features = _gallery()

    @torch.inference_mode()
    def caption(images: Sequence[Image.Image]) -> list[str]:
        own = lite0_features([np.asarray(image.convert("RGB")) for image in images])
        names, similarity = concept_similarity(own, features, concepts)
        return [caption_of(names[best]) for best in similarity.argmax(1).tolist()]

    return caption


@cache
def _gallery() -> tuple[list[str], Tensor]:
    """Concepts of the set and the features of its images."""
    drawings = read_set("seen")
    return [drawing.concept for drawing in drawings.examples], lite0_features(drawings.images)


register_captioner(NAME, load_concept_captioner)
