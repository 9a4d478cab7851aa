"""What holds for every condition that needs no weights, whatever it draws."""

from __future__ import annotations

import hashlib
import re

import cv2
import numpy as np
import pytest
from condition_scenes import draw_scene, needed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from controlkit.conditions import Condition, find, registry
from controlkit.conditions.condition import background_of
from controlkit.conditions.fidelity import edge_f1, psnr
from controlkit.conditions.learned.densepose import viridis
from refusals import refused

NAMES = [name for name, made in registry().items() if made.requires is None]
MIRRORED = [name for name in NAMES if find(name).mirrors]

LABELLED = ("bbox", "segments")
"""Drawn from annotations of the whole image, whatever part of it is given."""

EXPECTED = """
canny softedge_sobel scribble sketch lineart_xdog lines_lsd lineart_color_hints
grayscale palette pixel shuffle illusion blur jpeg noise downscale
haze rain raindrop snow low_light inpaint inpaint_brush outpaint
color_regions silhouette identity bbox segments scribble_xdog lineart_given
"""


def test_the_list_is_complete_and_none_of_these_needs_weights() -> None:
    assert set(EXPECTED.split()) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(height=st.integers(16, 700), width=st.integers(16, 700), draw=st.integers(0, 2**32 - 1))
def test_any_size_and_any_drawn_parameters(name: str, height: int, width: int, draw: int) -> None:
    made = find(name)
    parameters = {**made.random_parameters(np.random.default_rng(draw)), **needed(name)}
    check_one(made, draw_scene(height, width), parameters)


def test_a_condition_that_changes_nothing_still_gives_its_own_copy() -> None:
    check_one(find("blur"), draw_scene(16, 16), {"sigma": 0.001})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(16, 16), (2000, 16), (17, 1999)], ids=str)
def test_extreme_sizes(name: str, size: tuple[int, int]) -> None:
    check_one(find(name), draw_scene(*size), needed(name))


def check_one(made: Condition, image: np.ndarray, parameters: dict) -> None:
    before = image.copy()
    image.setflags(write=False)
    made_image = made(image, **parameters)
    assert made_image.dtype == np.uint8 and made_image.shape == image.shape
    assert not np.shares_memory(made_image, image)
    np.testing.assert_array_equal(image, before)
    np.testing.assert_array_equal(made(image, **parameters), made_image, err_msg="not the same twice")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["black", "white", "grey", "greyscale"])
def test_plain_and_colourless_images(name: str, kind: str) -> None:
    if kind == "greyscale":
        image = np.repeat(draw_scene()[..., :1], 3, axis=2)
    else:
        image = np.full((40, 64, 3), {"black": 0, "white": 255, "grey": 128}[kind], np.uint8)
    made = find(name)
    made_image = made(image, **needed(name))
    assert made_image.shape == image.shape
    score = made.score(made_image, image, image, **needed(name))
    assert score == pytest.approx(perfect(made), abs=1e-6)


def perfect(made: Condition) -> float:
    if made.fidelity.name.startswith("PSNR"):
        return 100.0
    return 1.0 if made.fidelity.higher_is_better else 0.0


@pytest.mark.parametrize("name", NAMES)
def test_the_true_image_follows_best(name: str) -> None:
    made = find(name)
    for number in range(3):
        image = draw_scene(64, 72, number)
        made_image = made(image, **needed(name))
        assert made.score(made_image, image, image, **needed(name)) == pytest.approx(perfect(made), abs=1e-6)
        if np.ptp(made_image.reshape(-1, 3), axis=0).max() == 0:
            continue  # All of one tone: there is nothing to follow.
        others = [draw_scene(64, 72, number + 100 * other) for other in range(1, 6)]
        unrelated = np.mean([made.score(made_image, other, image, **needed(name)) for other in others])
        assert unrelated < 0.95 * perfect(made) if made.fidelity.higher_is_better else unrelated > 3


@pytest.mark.parametrize("name", NAMES)
def test_score_falls_as_the_image_is_damaged(name: str) -> None:
    made, image = find(name), draw_scene(96, 96, 3)
    made_image = made(image, **needed(name))
    half = image.copy()
    half[:, 48:] = draw_scene(96, 96, 103)[:, 48:]
    own = made.score(made_image, image, image, **needed(name))
    damaged = made.score(made_image, half, image, **needed(name))
    assert damaged < own if made.fidelity.higher_is_better else damaged > own


@pytest.mark.parametrize("name", MIRRORED)
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    height=st.integers(16, 200),
    width=st.integers(16, 200),
    number=st.integers(0, 50),
    draw=st.integers(0, 2**32 - 1),
)
def test_a_flipped_image_has_the_flipped_condition(name: str, height: int, width: int, number: int, draw: int) -> None:
    """Tolerance, in pixels that differ by more than 2 levels.

    None for most. Canny breaks ties between neighbours to one side (canny, scribble), so that its lines, a large part
    of a small image, are held to one pixel; the middle column of an odd width belongs to one of an even number of
    cells (palette, pixel). JPEG's blocks begin at the left, so its artefacts lie elsewhere unless the width is a
    multiple of 16; there it is held to 32 dB.
    """
    made, image = find(name), draw_scene(height, width, number)
    parameters = {**made.random_parameters(np.random.default_rng(draw)), **needed(name)}
    straight = made(image, **parameters)[:, ::-1]
    flipped = made(np.ascontiguousarray(image[:, ::-1]), **parameters)
    if name == "jpeg":
        assert psnr(straight, flipped) > (32 if width % 16 == 0 else 18)
        return
    if name in ("canny", "scribble"):
        assert edge_f1(straight, flipped, tolerance=1) > 0.9
        return
    differing = (np.abs(straight.astype(int) - flipped).max(axis=2) > 2).mean()
    allowed = {"palette": 1 / width, "pixel": 1 / width}
    assert differing <= allowed.get(name, 0.0)


@pytest.mark.parametrize("name", [name for name in NAMES if find(name).channels == 1 or find(name).values is not None])
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(number=st.integers(0, 1000), draw=st.integers(0, 2**32 - 1))
def test_channels_and_values_are_what_is_said(name: str, number: int, draw: int) -> None:
    made = find(name)
    parameters = {**made.random_parameters(np.random.default_rng(draw)), **needed(name)}
    image = made(draw_scene(96, 80, number), **parameters)
    if made.channels == 1:
        assert (image == image[..., :1]).all()
    if made.values is not None:
        assert set(np.unique(image)) <= set(made.values)


def test_what_is_said_to_have_three_channels_or_all_values_has_them() -> None:
    for name in NAMES:
        made = find(name)
        image = np.concatenate([made(draw_scene(96, 96, number), **needed(name)) for number in range(6)])
        assert (made.channels == 3) == bool((image != image[..., :1]).any()), name
        labels = made.resize == "nearest"
        assert (made.values is not None) == (len(np.unique(image)) <= 3) or labels, name


@pytest.mark.parametrize("name", [name for name in NAMES if "seed" not in find(name).defaults and name not in LABELLED])
def test_a_part_of_the_image_is_the_image_of_the_part_where_that_is_said(name: str) -> None:
    made, part, inside = find(name), np.s_[:, 48:240], np.s_[24:-24, 24:-24]
    cut, unrelated = [], []
    for number in range(4):
        image = draw_scene(192, 288, number)
        again = made(np.ascontiguousarray(image[part]), **needed(name))[inside]
        cut.append(psnr(made(image, **needed(name))[part][inside], again))
        unrelated.append(psnr(made(draw_scene(192, 192, number + 50), **needed(name))[inside], again))
    assert (np.mean(cut) > np.mean(unrelated) + 3) == made.croppable


def test_finished_images_are_mirrored_as_their_condition_is() -> None:
    image = draw_scene(32, 48)
    for name, made in registry().items():
        if name in ("normal", "normal_bae"):
            turned = made.mirrored(image)
            np.testing.assert_array_equal(turned[..., 1:], image[:, ::-1, 1:])
            np.testing.assert_array_equal(turned[..., 0], 255 - image[:, ::-1, 0])
            np.testing.assert_array_equal(made.mirrored(turned), image)
        elif name in ("openpose", "dwpose", "densepose", "mediapipe_face", "mediapipe_pose"):
            with refused("unsupported", name, "flip"):
                made.mirrored(image)
        else:
            np.testing.assert_array_equal(made.mirrored(image), image[:, ::-1])


@pytest.mark.parametrize("name", NAMES)
def test_images_under_16_pixels_are_refused(name: str) -> None:
    with refused("wrong-size", name, "40 x 15", "16 x 16"):
        find(name)(draw_scene(15, 40), **needed(name))


@pytest.mark.parametrize("name", [name for name in NAMES if find(name).greatest_side])
def test_longer_images_than_it_can_take_are_refused(name: str) -> None:
    greatest = find(name).greatest_side
    assert greatest is not None
    few = {"drops": 0.01} if name == "raindrop" else {}  # for time
    assert find(name)(np.zeros((16, greatest, 3), np.uint8), **few).shape == (16, greatest, 3)
    with refused("wrong-size", name, f"{greatest + 1} x 16", greatest):
        find(name)(np.zeros((16, greatest + 1, 3), np.uint8))
    with refused("wrong-size", name, f"16 x {greatest + 1}", greatest):
        find(name)(np.zeros((greatest + 1, 16, 3), np.uint8))


@pytest.mark.parametrize("name", [name for name in NAMES if "seed" in find(name).defaults])
def test_another_seed_gives_another_image(name: str) -> None:
    made, image = find(name), draw_scene()
    assert not made.mirrors
    images = {hashlib.sha256(made(image, seed=seed).tobytes()).hexdigest() for seed in range(4)}
    assert len(images) == 4


@pytest.mark.parametrize("name", NAMES)
def test_drawn_parameters_are_parameters_within_limits_and_reproducible(name: str) -> None:
    made = find(name)
    assert set(made.random) <= set(made.defaults)
    assert set(made.limits) <= set(made.defaults)
    assert "seed" not in made.defaults or "seed" in made.random
    for seed in range(50):
        drawn = made.random_parameters(np.random.default_rng(seed))
        assert drawn == made.random_parameters(np.random.default_rng(seed))
        for key, (low, high) in made.limits.items():
            assert low <= drawn[key] <= high
            assert type(drawn[key]) is type(made.defaults[key])


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, made in registry().items() for key in made.random])
def test_how_parameters_are_drawn_is_told_and_true(name: str, key: str) -> None:
    draw = registry()[name].random[key]
    text = str(draw)
    values = np.array([draw(np.random.default_rng(number)) for number in range(400)])
    if text == "any seed":
        assert values.dtype.kind == "i" and len(set(values.tolist())) == 400
        limits = registry()[name].limits.get("seed", (0, 2**32 - 1))
        assert limits[0] <= values.min() and values.max() <= limits[1]
        return
    if share := re.fullmatch(r"true with probability (\d+)%", text):
        assert values.dtype == bool
        assert values.mean() == pytest.approx(int(share[1]) / 100, abs=0.1)
        return
    assert values.dtype.kind == ("i" if text.startswith("integers, ") else "f")
    low, high = (float(word.rstrip(",")) for word in text.split() if word[0] in "-0123456789")
    assert low <= values.min() and values.max() <= high
    # Uniform numbers reach both limits and spread over all between them; normal ones crowd about the middle.
    places = (values - low) / (high - low)
    assert places.mean() == pytest.approx(0.5, abs=0.06)
    if "uniform" in text:
        assert places.min() < 0.02 and places.max() > 0.98
        count = high - low + 1 if values.dtype.kind == "i" else np.inf
        expected = ((count + 1) / (count - 1) / 12) ** 0.5 if np.isfinite(count) else 12**-0.5
        assert places.std() == pytest.approx(expected, rel=0.08)
    else:  # within one standard deviation, a normal distribution has 0.54 of it; 0.289 would be uniform
        assert "normal" in text and places.std() == pytest.approx(0.27, abs=0.018)


@pytest.mark.parametrize("name", NAMES)
def test_unknown_parameters_are_refused(name: str) -> None:
    with refused("unknown-key", name, "'strenght'"):
        find(name)(draw_scene(), strenght=3)


def test_a_misspelt_parameter_gets_a_proposal() -> None:
    with refused("unknown-key", "palette", "'cels'", "did you mean cells"):
        find("palette")(draw_scene(), cels=3)


@pytest.mark.parametrize(
    ("name", "parameters", "code", "facts"),
    [
        ("palette", {"cells": 0}, "out-of-range", ["1 to 2000", "not 0"]),
        ("palette", {"cells": 2.5}, "wrong-type", ["integer", 2.5]),
        ("jpeg", {"quality": "low"}, "wrong-type", ["integer", "'low'"]),
        ("blur", {"sigma": float("nan")}, "out-of-range", ["0 to 1", "nan"]),
        ("noise", {"seed": -1}, "out-of-range", ["from 0", -1]),
        ("blur", {"sigma": True}, "wrong-type", ["number", "True"]),
        ("silhouette", {"fill_holes": "off"}, "wrong-type", ["fill_holes", "true or false", "'off'"]),
    ],
)
def test_parameters_out_of_limits_are_refused(name: str, parameters: dict, code: str, facts: list) -> None:
    with refused(code, name, *parameters, *facts):
        find(name)(draw_scene(), **parameters)


@pytest.mark.parametrize("shape", [(64, 64), (64, 64, 4), (1, 64, 64, 3)])
def test_only_rgb_arrays_are_taken(shape: tuple[int, ...]) -> None:
    with refused("wrong-type", "canny", list(shape), "expected an array uint8"):
        find("canny")(np.zeros(shape, np.uint8))


def test_a_picture_is_no_array() -> None:
    with refused("wrong-type", "the image is Image", "np.asarray"):
        find("canny")(Image.new("RGB", (64, 64)))


def test_the_number_of_threads_does_not_matter() -> None:
    image, threads = draw_scene(200, 300), cv2.getNumThreads()
    images = []
    try:
        for number in (1, 2):
            cv2.setNumThreads(number)
            images.append([find(name)(image, **needed(name)) for name in NAMES])
    finally:
        cv2.setNumThreads(threads)
    for name, first, second in zip(NAMES, *images, strict=True):
        np.testing.assert_array_equal(first, second, err_msg=name)


def test_other_memory_layouts_give_the_same() -> None:
    image = draw_scene(48, 64)
    for name in NAMES:
        plain = find(name)(image, **needed(name))
        strided = find(name)(np.asfortranarray(image), **needed(name))
        np.testing.assert_array_equal(plain, strided, err_msg=name)


@pytest.mark.parametrize("name", NAMES)
def test_aliases_hyphens_and_case_do_not_matter(name: str) -> None:
    made = find(name)
    assert made.name == name and made.summary
    for alias in (name, *made.aliases):
        assert find(alias) is made
        assert find(f" {alias.upper().replace('_', '-')} ") is made


def test_an_unknown_condition_names_the_nearest() -> None:
    with refused("unknown-name", "'cany'", "did you mean canny"):
        find("cany")
    with refused("unknown-name", "'xyzzy'"):
        find("xyzzy")


def test_the_background_of_a_condition_is_what_it_draws_where_there_is_nothing():
    told = {name: condition.background for name, condition in registry().items()}
    for name, condition in registry().items():
        if condition.requires is None and name not in ("bbox", "segments"):
            made = condition(np.full((64, 64, 3), (250, 250, 250), np.uint8))
            if len(np.unique(made.reshape(-1, 3), axis=0)) == 1 and made.min() in (0, 255):
                assert told[name] == tuple(made[0, 0].tolist()), name
    for name in ("openpose", "dwpose", "depth", "seg", "hed", "lineart", "bbox", "inpaint", "outpaint", "mlsd"):
        assert told[name] == (0, 0, 0)
    assert told["densepose"] == tuple(viridis()[0].tolist())
    for name in ("sketch", "hedsketch", "palette", "identity", "blur"):
        assert told[name] == (255, 255, 255)
    assert background_of("Canny") == (0, 0, 0) and background_of(None) == background_of("none") == (255, 255, 255)
