"""Image metrics: PSNR, SSIM, Frechet distance, joint Frechet distance, retrieval."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from controlkit.errors import UserError
from controlkit.images import to_tensor


def psnr_and_ssim(targets: Sequence[np.ndarray], results: Sequence[np.ndarray]) -> tuple[float, float]:
    """Mean PSNR in dB and mean SSIM (torchmetrics) of `uint8 [H, W, 3]` images."""
    try:
        from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
    except ImportError as error:
        message = "PSNR and SSIM need torchmetrics; run: pip install 'controlkit[metrics]'"
        raise UserError(message, "missing-package") from error
    x, y = to_tensor(targets), to_tensor(results)
    psnr = peak_signal_noise_ratio(y, x, data_range=1.0, reduction="elementwise_mean", dim=(1, 2, 3))
    ssim = structural_similarity_index_measure(y, x, data_range=1.0)
    return float(psnr), float(ssim)  # type: ignore[arg-type]


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Frechet distance of two sets of features `[N, D]`, modelled as Gaussians (Heusel et al. 2017, eq. 6).

    Compare only distances of sets of the same size: with fewer samples than dimensions the estimate is biased upwards.
    """
    a, b = a.double(), b.double()
    difference = a.mean(0) - b.mean(0)
    # tr sqrt(A B) = the sum of the singular values of XY' where A = X'X and B = Y'Y: no D x D root is needed.
    x = (a - a.mean(0)) / (len(a) - 1) ** 0.5
    y = (b - b.mean(0)) / (len(b) - 1) ** 0.5
    cross = torch.linalg.svdvals(x @ y.T).sum()
    return float(difference @ difference + x.pow(2).sum() + y.pow(2).sum() - 2 * cross)


def joint_frechet_distance(a: Tensor, a_condition: Tensor, b: Tensor, b_condition: Tensor) -> float:
    """Frechet joint distance of image features `[N, D]` concatenated with condition features `[N, E]`.

    Condition features are scaled to the mean norm of the image features of `b` (DeVries et al. 2019, section 3.3).
    Images that ignore their condition are far away, even if as a set they look right.
    """
    scale = b.norm(dim=1).mean() / b_condition.norm(dim=1).mean()
    return frechet_distance(torch.cat([a, scale * a_condition], 1), torch.cat([b, scale * b_condition], 1))


def concept_similarity(features: Tensor, gallery: Tensor, concepts: Sequence[str]) -> tuple[list[str], Tensor]:
    """Cosine of `features` `[N, D]` to each concept of a gallery, whose feature is the mean of its normalised ones.

    Args:
        gallery: features `[M, D]`.
        concepts: of the gallery, one each.

    Returns:
        The names of the K concepts, and the similarities `[N, K]`.
    """
    names = sorted(set(concepts))
    unit = torch.nn.functional.normalize(gallery, dim=1)
    centres = torch.stack(
        [unit[[i for i, concept in enumerate(concepts) if concept == name]].mean(0) for name in names]
    )
    similarity = torch.nn.functional.normalize(features, dim=1) @ torch.nn.functional.normalize(centres, dim=1).T
    return names, similarity


def retrieval_accuracy(
    features: Tensor, concepts: Sequence[str], gallery: Tensor, gallery_concepts: Sequence[str], k: int = 5
) -> float:
    """Top-k accuracy: fraction of `features` `[N, D]` whose concept is among the `k` nearest of the gallery (cosine).

    A gallery concept is the mean of its normalised features.
    """
    names, similarity = concept_similarity(features, gallery, gallery_concepts)
    best = similarity.topk(k, dim=1).indices
    return float(np.mean([names.index(concept) in row.tolist() for concept, row in zip(concepts, best, strict=True)]))
