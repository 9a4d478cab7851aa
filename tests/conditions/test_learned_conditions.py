"""What holds for every condition that needs weights, on tiny models of random weights."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from condition_scenes import draw_scene
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from controlkit.conditions import Condition, find, models, registry
from controlkit.conditions.learned.palettes import ADE20K, COCO_PANOPTIC
from refusals import refused

LEARNED = [name for name, made in registry().items() if made.requires is not None]
KINDS = {
    "depth": tiny_models.dpt,
    "depth_anything": tiny_models.depth_anything,
    "depth_zoe": tiny_models.zoe,
    "normal": tiny_models.dpt,
    "seg": tiny_models.upernet,
    "seg_segformer": tiny_models.segformer,
    "seg_coco": tiny_models.oneformer,
    "bbox_detected": tiny_models.yolos,
    "hed": tiny_models.hed,
    "hedsketch": tiny_models.hed,
    "scribble_hed": tiny_models.hed,
    "lineart": tiny_models.lineart,
    "densepose": tiny_models.densepose,
}
EXPECTED = """
hed hedsketch scribble_hed pidinet lineart lineart_anime mlsd openpose dwpose densepose depth depth_anything depth_zoe
normal normal_bae seg seg_segformer seg_oneformer seg_coco mediapipe_face mediapipe_pose bbox_detected
scribble_pidinet depth_leres
"""


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Parameters that make a condition use its tiny model."""
    root, made = tmp_path_factory.mktemp("models"), {}

    def of(name: str) -> dict:
        if name not in made:
            made[name] = KINDS[name](root / name)
        small = {"resolution": 64} if "resolution" in find(name).defaults else {}
        if name == "bbox_detected":  # random weights are sure of nothing
            small = {"score": 0.01}
        return {"model": str(made[name]), **small}

    yield of
    models.unload_models()


def check(made: Condition, image: np.ndarray, parameters: dict) -> np.ndarray:
    image.setflags(write=False)
    made_image = made(image, **parameters)
    assert made_image.dtype == np.uint8 and made_image.shape == image.shape and made_image.flags.c_contiguous
    np.testing.assert_array_equal(made(image, **parameters), made_image, err_msg="not the same twice")
    return made_image


def test_the_list_is_complete_and_says_what_each_needs() -> None:
    assert set(EXPECTED.split()) == set(LEARNED)
    for name in LEARNED:
        model = find(name).requires
        assert model.licence and model.download
        if not model.commercial:
            assert "no commercial use" in str(model)
        assert "model" in find(name).defaults or "/" not in model.hub
    for alias, name in {
        "softedge_hed": "hed",
        "softedge_pidinet": "pidinet",
        "depth_midas": "depth",
        "depth_dpt": "depth",
        "normal_midas": "normal",
    }.items():
        assert find(alias) is find(name)


@pytest.mark.parametrize("name", list(KINDS))
def test_any_size_in_any_order(name: str, weights) -> None:
    made, parameters = find(name), weights(name)
    first = check(made, draw_scene(48, 80), parameters)
    for size in [(16, 16), (301, 17)] if name in ("hedsketch", "scribble_hed") else [(16, 16), (16, 400), (301, 17)]:
        check(made, draw_scene(*size), parameters)
    np.testing.assert_array_equal(made(draw_scene(48, 80), **parameters), first)


@pytest.mark.parametrize("name", ["depth", "depth_anything", "seg_segformer"])
@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(height=st.integers(16, 300), width=st.integers(16, 300))
def test_random_sizes(name: str, height: int, width: int, weights) -> None:
    check(find(name), draw_scene(height, width), weights(name))


@pytest.mark.parametrize("name", list(KINDS))
def test_the_true_image_follows_best(name: str, weights) -> None:
    made, parameters = find(name), weights(name)
    image, other = draw_scene(64, 72), draw_scene(64, 72, 5)
    made_image = made(image, **parameters)
    best = made.score(made_image, image, **parameters)
    assert best == pytest.approx(100 if "PSNR" in made.fidelity.name else float(made.fidelity.higher_is_better))
    worse = made.score(made_image, other, **parameters)
    if name != "densepose":  # its stand-in finds the same person everywhere
        assert worse < best if made.fidelity.higher_is_better else worse > best


@pytest.mark.parametrize("name", LEARNED)
def test_drawn_parameters_are_within_limits(name: str) -> None:
    made = find(name)
    assert set(made.random) <= set(made.defaults) and set(made.limits) <= set(made.defaults)
    for seed in range(20):
        drawn = made.random_parameters(np.random.default_rng(seed))
        assert drawn == made.random_parameters(np.random.default_rng(seed))
        assert all(low <= drawn[key] <= high for key, (low, high) in made.limits.items())


def test_depth_spans_the_whole_range_and_a_plain_answer_is_black(weights) -> None:
    for name in ("depth", "depth_anything"):
        image = find(name)(draw_scene(), **weights(name))
        assert image.min() == 0 and image.max() == 255 and np.ptp(image, axis=2).max() == 0


def test_metric_depth_is_turned_so_that_near_is_white(tmp_path: Path) -> None:
    relative = tiny_models.depth_anything(tmp_path / "relative")
    metric = tiny_models.depth_anything(tmp_path / "metric", depth_estimation_type="metric", max_depth=80)
    images = [find("depth_anything")(draw_scene(), model=str(folder))[..., 0] for folder in (relative, metric)]
    assert np.corrcoef(images[0].ravel(), images[1].ravel())[0, 1] < -0.7


def test_normals_have_unit_length_and_a_flatter_relief_for_a_larger_a(weights) -> None:
    image, parameters = draw_scene(), weights("normal")
    made = find("normal")(image, a=0.05, **parameters)
    lengths = np.linalg.norm(made / 127.5 - 1, axis=2)
    assert np.abs(lengths - 1).max() < 0.02
    assert made[..., 2].mean() < find("normal")(image, a=50.0, **parameters)[..., 2].mean()
    np.testing.assert_array_equal(find("normal")(image, a=0.05, reverse=True, **parameters), made[..., ::-1])


def test_segmentation_uses_only_its_palette(weights) -> None:
    for name, palette in (("seg", ADE20K), ("seg_segformer", ADE20K), ("seg_coco", COCO_PANOPTIC)):
        found = {tuple(colour) for colour in find(name)(draw_scene(), **weights(name)).reshape(-1, 3).tolist()}
        assert found <= {tuple(colour) for colour in palette.tolist()}


def test_hed_sketches_and_line_art(weights) -> None:
    image = draw_scene()
    parameters = weights("hed")
    assert set(np.unique(find("hed")(image, safe=True, **parameters))) <= {0, 127, 128, 255}
    assert set(np.unique(find("scribble_hed")(image, **parameters))) <= {0, 255}
    fine, coarse = (find("lineart")(image, coarse=flag, **weights("lineart")) for flag in (False, True))
    assert (fine != coarse).any()


def test_densepose_colours_parts_and_leaves_the_rest_dark(weights) -> None:
    image = find("densepose")(draw_scene(64, 64), **weights("densepose"))
    assert tuple(image[5, 5]) == (68, 1, 84)
    assert tuple(image[60, 60]) == (253, 231, 36) or tuple(image[60, 60]) == (253, 231, 37)
    assert tuple(image[5, 60]) not in {(68, 1, 84), tuple(image[60, 60])}


def test_openpose_runs_on_tiny_networks(tmp_path: Path) -> None:
    detector, model = tiny_models.yolos(tmp_path / "yolos"), tiny_models.vitpose(tmp_path / "vitpose")
    parameters = {"detector": str(detector), "model": str(model), "score": 0.0}
    for size in [(64, 64), (16, 40), (120, 33)]:
        check(find("openpose"), draw_scene(*size), {**parameters, "person_score": 0.0})
    assert not check(find("openpose"), draw_scene(), {**parameters, "person_score": 1.0}).any()


@pytest.mark.parametrize("name", sorted(set(LEARNED) - {"mediapipe_face", "mediapipe_pose"}))
def test_without_weights_one_sentence_says_what_to_do(name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.delenv("CONTROLKIT_MODELS", raising=False)
    made = find(name)
    needed = made.requires.companions[0] if made.requires.companions else made.requires
    facts = [name, needed.licence, needed.hub, *([] if needed.commercial else ["no commercial use"])]
    if needed.extra and name != "densepose" and "controlnet_aux" not in sys.modules:
        expected = refused("missing-package", *facts, "pip install 'controlkit[annotators]'")
    else:
        expected = refused("missing-weights", *facts, needed.download, "HF_HUB_OFFLINE", "CONTROLKIT_MODELS")
    with expected as raised:
        made(draw_scene())
    assert "\n" not in str(raised.value)
