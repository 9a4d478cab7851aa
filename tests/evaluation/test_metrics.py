"""Numbers of the evaluation, held to known values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from controlkit.data.icons import COLOURS, is_held_out
from controlkit.evaluation.metrics import (
    background_colour,
    frechet_distance,
    joint_frechet_distance,
    psnr_and_ssim,
    retrieval_accuracy,
)
from controlkit.evaluation.pictures import SETS, evaluation_set
from controlkit.evaluation.report import gap_closed


def test_frechet_distance_of_equal_sets_is_zero_and_of_a_shift_its_square():
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    shift = torch.arange(8.0)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-8)
    assert frechet_distance(x, x + shift) == pytest.approx(float(shift @ shift), rel=1e-6)


def test_frechet_distance_agrees_with_the_matrix_square_root():
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(300, 6, generator=generator, dtype=torch.float64)
    b = torch.randn(300, 6, generator=generator, dtype=torch.float64) @ torch.diag(torch.arange(1.0, 7).double()) + 0.3
    covariance_a, covariance_b = torch.cov(a.T), torch.cov(b.T)
    root = torch.linalg.eigvals(covariance_a @ covariance_b).real.sqrt().sum()
    expected = (a.mean(0) - b.mean(0)).pow(2).sum() + covariance_a.trace() + covariance_b.trace() - 2 * root
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-6)


def test_joint_frechet_distance_sees_whose_picture_is_whose():
    generator = torch.Generator().manual_seed(2)
    given_ones = torch.eye(6).repeat(50, 1)
    features = given_ones @ torch.randn(6, 8, generator=generator) + 0.1 * torch.randn(300, 8, generator=generator)
    others = features[torch.randperm(300, generator=generator)]
    assert frechet_distance(others, features) == pytest.approx(0, abs=1e-6)
    assert joint_frechet_distance(features, given_ones, features, given_ones) == pytest.approx(0, abs=1e-6)
    spread = float(features.var(0).sum())
    # The more what they were made from weighs, the nearer the mean squared distance to their own: twice the spread.
    assert 0.5 * spread < joint_frechet_distance(others, given_ones, features, given_ones) < 2 * spread


@given(st.sampled_from(sorted(COLOURS)), st.integers(0, 2**16))
@settings(max_examples=40, deadline=None)
def test_background_colour_is_found_behind_an_object(colour, seed):
    rng = np.random.default_rng(seed)
    picture = np.empty((64, 64, 3), np.uint8)
    picture[:] = np.clip(np.array(COLOURS[colour]) + rng.integers(-12, 13, 3), 0, 255)
    picture[10:, 20:44] = rng.integers(0, 256, 3)
    assert background_colour(picture) == colour


def test_retrieval_finds_its_own_and_misses_noise():
    gallery = torch.eye(20)
    names = [f"c{i}" for i in range(20)]
    assert retrieval_accuracy(gallery, names, gallery, names, k=1) == 1
    assert retrieval_accuracy(gallery.roll(1, 0), names, gallery, names, k=1) == 0


def test_gap_closed_works_for_scores_and_distances():
    assert gap_closed(0.2, 0.5, 0.8) == pytest.approx(0.5)
    assert gap_closed(30, 10, 10) == 1
    assert np.isnan(gap_closed(1, 1, 1))


def test_psnr_and_ssim_of_equal_and_different_pictures():
    rng = np.random.default_rng(0)
    a = [rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(3)]
    b = [np.clip(picture.astype(int) + 10, 0, 255).astype(np.uint8) for picture in a]
    psnr, ssim = psnr_and_ssim(a, b)
    assert psnr == pytest.approx(28.2, abs=0.3)
    assert 0.9 < ssim < 1


@pytest.mark.parametrize("name", sorted(SETS))
def test_evaluation_pictures_are_what_they_say(name):
    drawings = evaluation_set(name).drawings
    assert len(drawings) >= 96
    for drawing in drawings:
        assert drawing.image.shape == (64, 64, 3)
        assert drawing.concept.replace("-", " ") in drawing.caption
        assert (drawing.style == "openmoji") == (name == "openmoji")
        if name != "openmoji":
            assert is_held_out(drawing.concept) == (name == "held-out")
    colours = [background_colour(drawing.image) == drawing.colour for drawing in drawings]
    assert np.mean(colours) > 0.97


def test_pictures_drawn_again_have_the_same_captions_and_other_places():
    once, again = evaluation_set("seen").drawings, evaluation_set("seen-again").drawings
    assert [drawing.caption for drawing in once] == [drawing.caption for drawing in again]
    assert not any(np.array_equal(a.image, b.image) for a, b in zip(once, again, strict=True))
