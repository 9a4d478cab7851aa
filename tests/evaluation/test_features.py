"""EfficientNet-Lite0 gets the weights and the input that it was trained with."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from controlkit.evaluation import features
from controlkit.evaluation.features import lite0, lite0_features
from controlkit.evaluation.sets import evaluation_set

IMAGENET = (
    torch.tensor([123.675, 116.28, 103.53]).view(1, 3, 1, 1),
    torch.tensor([58.395, 57.12, 57.375]).view(1, 3, 1, 1),
)
"""Mean and deviation that other EfficientNets want."""
UNIFORM, DRESSED = 652, (457, 652, 834, 906)
"""ImageNet's classes "military uniform", and beside it bow tie, suit and Windsor tie."""


@pytest.fixture(scope="module")
def officer():
    """The photograph of Rear Admiral Grace Hopper in uniform that Matplotlib carries."""
    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


@torch.inference_mode()
def classes(image):
    """The chances of ImageNet's classes, by the features of `image`."""
    network = lite0()
    assert isinstance(network._fc, torch.nn.Linear)
    return network._fc(lite0_features([image])).softmax(1)[0]


@torch.inference_mode()
def spread_ratio(images):
    """Variance of the first layer's output over the one that its batch norm kept from training (geometric mean)."""
    network, seen = lite0(), []
    handle = network._conv_stem.register_forward_hook(lambda module, inputs, output: seen.append(output))
    try:
        lite0_features(images)
    finally:
        handle.remove()
    kept = network._bn0.running_var
    alive = kept > 1e-3  # a channel that never answered has no variance to compare
    return float((torch.cat(seen).var((0, 2, 3)) / kept)[alive].log().mean().exp())


def wrongly(monkeypatch):
    monkeypatch.setattr(features, "MEAN", IMAGENET[0])
    monkeypatch.setattr(features, "DEVIATION", IMAGENET[1])


def test_pooled_features_of_a_photograph_say_what_is_on_it(officer, monkeypatch):
    chances = classes(officer)
    assert chances[list(DRESSED)].sum() > 0.9
    assert chances[UNIFORM] > 0.05
    wrongly(monkeypatch)
    assert classes(officer)[UNIFORM] < 0.02


def test_the_first_layer_sees_the_spread_that_it_was_trained_with(officer, monkeypatch):
    drawings = [drawing.image for drawing in evaluation_set("seen").examples[:32]]
    assert 0.7 < spread_ratio([officer]) < 1.5
    assert 0.7 < spread_ratio(drawings) < 1.5
    wrongly(monkeypatch)
    assert spread_ratio([officer]) > 4
    assert spread_ratio(drawings) > 4


def test_features_are_the_same_alone_and_in_a_batch():
    drawings = [drawing.image for drawing in evaluation_set("seen").examples[:3]]
    together = lite0_features(drawings, batch_size=2)
    assert together.shape == (3, 1280)
    assert torch.allclose(together, torch.cat([lite0_features([drawing]) for drawing in drawings]), atol=1e-4)
