"""Known values of the measures."""

from __future__ import annotations

import numpy as np
import pytest

from controlkit.conditions import find
from controlkit.conditions.fidelity import (
    colour_distance,
    dark_edge_f1,
    edge_f1,
    mean_iou,
    palette_distance,
    psnr,
)


def lines(*columns: int) -> np.ndarray:
    image = np.zeros((20, 40, 3), np.uint8)
    image[:, list(columns)] = 255
    return image


def plain(*colour: int) -> np.ndarray:
    return np.full((8, 8, 3), colour, np.uint8)


def test_edge_f1() -> None:
    assert edge_f1(lines(10), lines(10)) == 1
    assert edge_f1(lines(10), lines(11)) == 1
    assert edge_f1(lines(10), lines(12)) == 0
    assert edge_f1(lines(10), lines(12), tolerance=2) == 1
    assert edge_f1(lines(), lines()) == 1
    assert edge_f1(lines(10), lines()) == edge_f1(lines(), lines(10)) == 0
    assert edge_f1(lines(10, 30), lines(10)) == pytest.approx(2 / 3)
    assert edge_f1(lines(10), lines(10, 30)) == pytest.approx(2 / 3)
    assert dark_edge_f1(255 - lines(10, 30), 255 - lines(10)) == pytest.approx(2 / 3)


def test_psnr() -> None:
    assert psnr(plain(0, 0, 0), plain(255, 255, 255)) == pytest.approx(0)
    assert psnr(plain(100, 100, 100), plain(101, 101, 101)) == pytest.approx(48.1308, abs=1e-4)
    assert psnr(plain(5, 6, 7), plain(5, 6, 7)) == 100


def test_colour_distance() -> None:
    assert colour_distance(plain(0, 0, 0), plain(255, 255, 255)) == pytest.approx(100, abs=0.1)
    assert colour_distance(plain(9, 80, 200), plain(9, 80, 200)) == 0
    red_and_green = colour_distance(plain(255, 0, 0), plain(0, 255, 0))
    assert red_and_green == pytest.approx(170.6, abs=0.5)


def test_mean_iou() -> None:
    left = lines()
    left[:, :20] = 255
    wider = lines()
    wider[:, :30] = 255
    assert mean_iou(left, left) == 1
    assert mean_iou(left, wider) == pytest.approx((20 / 30 + 10 / 20) / 2)
    assert mean_iou(left, np.full_like(left, 200)) == pytest.approx(0.25), "nearest to white everywhere"
    assert mean_iou(lines(), lines()) == 1
    flat, lighter, spot = np.full_like(left, 120), np.full_like(left, 130), np.full_like(left, 120)
    spot[:, :10] = (250, 20, 20)
    assert mean_iou(flat, flat) == mean_iou(flat, lighter) == 1
    assert mean_iou(flat, spot) == pytest.approx(3 / 4), "one region, where the result has another"


@pytest.mark.parametrize("name", ["silhouette", "illusion"])
def test_regions_of_a_result_count_where_the_condition_image_has_one(name: str) -> None:
    grey, spot = np.full((64, 64, 3), 120, np.uint8), np.full((64, 64, 3), 120, np.uint8)
    spot[12:52, 12:52] = (255, 0, 0)
    condition = find(name)
    assert condition.score(condition(grey), grey) == 1
    assert condition.score(condition(grey), spot) < 0.7
    assert mean_iou(np.repeat(np.arange(256, dtype=np.uint8)[:, None, None], 3, axis=2), plain_ramp()) == 1


def plain_ramp() -> np.ndarray:
    return np.repeat(np.arange(256, dtype=np.uint8)[:, None, None], 3, axis=2)


def test_palette_distance_does_not_see_places() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (16, 16, 3)).astype(np.uint8)
    moved = rng.permutation(image.reshape(-1, 3)).reshape(image.shape)
    assert palette_distance(image, moved) == 0
    assert palette_distance(image, 255 - image) > 1
    assert palette_distance(plain(0, 0, 0), plain(255, 255, 255)) > 30
