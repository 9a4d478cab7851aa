"""Degraded images: blur, JPEG, noise, downscaling."""

from __future__ import annotations

import cv2
import numpy as np

from controlkit.conditions.condition import condition, seed, truncated_normal, truncated_normal_int, uniform
from controlkit.conditions.fidelity import PSNR, RESTORED_PSNR
from controlkit.conditions.pixels import length, smoothed, to_uint8


@condition(
    "blur",
    summary="the image out of focus (Gaussian)",
    aliases=("gaussian_blur", "deblur"),
    fidelity=PSNR,
    random={"sigma": truncated_normal(0.004, 0.030)},
    limits={"sigma": (0, 1)},
)
def blur(image: np.ndarray, *, sigma: float = 0.017) -> np.ndarray:
    """Gaussian blur by `sigma`, a fraction of the short side.

    CtrLoRA, annotator/blur: kernels of 2 n + 1 pixels at 512, n normal between 5 and 50, meant to set sigma to
    0.3 (n - 1) + 0.8 (2 to 15.5 pixels, the range here). It passes a border flag as sigma, so every blur has 4 pixels,
    and crashes when n is negative.
    """
    return smoothed(image, length(image, sigma))


@condition(
    "jpeg",
    summary="JPEG with visible artefacts",
    aliases=("jpeg_artifacts", "compression"),
    fidelity=RESTORED_PSNR,
    random={"quality": truncated_normal_int(10, 30)},
    limits={"quality": (1, 100)},
    greatest_side=65500,  # libjpeg's
)
def jpeg(image: np.ndarray, *, quality: int = 20) -> np.ndarray:
    """The image encoded and decoded at `quality` of 100 (OpenCV).

    CtrLoRA, annotator/jpeg: normal between 10 and 30. Flipped images give flipped artefacts (35 dB) only at widths
    that are multiples of 16, JPEG's blocks.
    """
    encoded = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, int(quality)])[1]
    return np.asarray(cv2.imdecode(encoded, cv2.IMREAD_COLOR_RGB))


@condition(
    "noise",
    summary="the image under Gaussian noise",
    aliases=("gaussian_noise", "denoise"),
    fidelity=RESTORED_PSNR,
    random={"sigma": uniform(0.05, 0.3), "seed": seed()},
    limits={"sigma": (0, 4)},
    mirrors=False,
)
def noise(image: np.ndarray, *, sigma: float = 0.15, seed: int = 0) -> np.ndarray:
    """Independent Gaussian noise on every value.

    Args:
        sigma: standard deviation; 1 is the range from black to white. The range for training is this project's.
        seed: of the noise.
    """
    values = np.random.default_rng(seed).standard_normal(image.shape, dtype=np.float32)
    return to_uint8(image + values * (255 * sigma))


@condition(
    "downscale",
    summary="the image downscaled and upscaled again (for super-resolution and detail)",
    aliases=("tile", "tile_resample", "low_resolution", "super_resolution"),
    fidelity=PSNR,
    random={"factor": uniform(2, 8)},
    limits={"factor": (1, 256)},
)
def downscale(image: np.ndarray, *, factor: float = 4.0) -> np.ndarray:
    """Downscaled `factor` times by area averaging and upscaled bicubically.

    ControlNet 1.1 tile: its README shows 64 to 512, 8 times; how its training images were degraded is not documented.
    """
    height, width = image.shape[:2]
    size = max(1, round(width / factor)), max(1, round(height / factor))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)
