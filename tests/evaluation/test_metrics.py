"""Numbers of the evaluation, held to known values."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from controlkit.evaluation.metrics import frechet_distance, joint_frechet_distance, psnr_and_ssim, retrieval_accuracy
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


def test_joint_frechet_distance_sees_whose_image_is_whose():
    generator = torch.Generator().manual_seed(2)
    given_ones = torch.eye(6).repeat(50, 1)
    features = given_ones @ torch.randn(6, 8, generator=generator) + 0.1 * torch.randn(300, 8, generator=generator)
    others = features[torch.randperm(300, generator=generator)]
    assert frechet_distance(others, features) == pytest.approx(0, abs=1e-6)
    assert joint_frechet_distance(features, given_ones, features, given_ones) == pytest.approx(0, abs=1e-6)
    spread = float(features.var(0).sum())
    # The more what they were made from weighs, the nearer the mean squared distance to their own: twice the spread.
    assert 0.5 * spread < joint_frechet_distance(others, given_ones, features, given_ones) < 2 * spread


def test_retrieval_finds_its_own_and_misses_noise():
    gallery = torch.eye(20)
    names = [f"c{i}" for i in range(20)]
    assert retrieval_accuracy(gallery, names, gallery, names, k=1) == 1
    assert retrieval_accuracy(gallery.roll(1, 0), names, gallery, names, k=1) == 0


def test_gap_closed_works_for_scores_and_distances():
    assert gap_closed(0.2, 0.5, 0.8, higher_is_better=True) == pytest.approx(0.5)
    assert gap_closed(30, 10, 10, higher_is_better=False) == 1


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_no_gap_is_closed_where_the_ceiling_is_not_better_than_the_baseline(higher_is_better):
    worse = 0.259 if higher_is_better else 0.291
    assert np.isnan(gap_closed(1, 1, 1, higher_is_better=higher_is_better))
    assert np.isnan(gap_closed(0.275, 0.257, worse, higher_is_better=higher_is_better))


def test_psnr_and_ssim_of_equal_and_different_images():
    rng = np.random.default_rng(0)
    a = [rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(3)]
    b = [np.clip(image.astype(int) + 10, 0, 255).astype(np.uint8) for image in a]
    psnr, ssim = psnr_and_ssim(a, b)
    assert psnr == pytest.approx(28.2, abs=0.3)
    assert 0.9 < ssim < 1
