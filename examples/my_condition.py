"""A condition of your own in one file.

    export CONTROLKIT_CONDITIONS=examples/my_condition.py
    controlkit condition halftone photo.jpg --out halftone.png

All verbs know it then: `condition`, `pairs`, `train`, `adapt`, `evaluate`.
"""

import cv2
import numpy as np

from controlkit.conditions.condition import condition, uniform_int
from controlkit.conditions.fidelity import PSNR


@condition(
    "halftone",
    summary="black dots on white whose size is the image's darkness, as in print",
    aliases=("dots",),
    fidelity=PSNR,
    random={"step": uniform_int(4, 12)},
    limits={"step": (2, 64)},
)
def halftone(image: np.ndarray, *, step: int = 8) -> np.ndarray:
    """Dots on a grid of `step` pixels.

    The keyword-only parameters become the condition's parameters; `random` is their distribution in training.
    """
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    height, width = grey.shape
    canvas = np.full((height, width), 255, np.uint8)
    for top in range(0, height, step):
        for left in range(0, width, step):
            darkness = 1 - grey[top : top + step, left : left + step].mean() / 255
            radius = round(step / 2 * darkness**0.5)
            cv2.circle(canvas, (left + step // 2, top + step // 2), radius, 0, cv2.FILLED)
    return cv2.cvtColor(canvas, cv2.COLOR_GRAY2RGB)
