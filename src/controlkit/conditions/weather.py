"""Simulated bad weather and low light.

CtrLoRA's dehaze, derain, desnow and low-light have no annotator: their adapters are trained on real pairs (HazeWorld,
861 raindrop pairs, Yang 2020), for which use the condition `identity`.
"""

from __future__ import annotations

import cv2
import numpy as np

from controlkit.conditions.condition import condition, seed, uniform
from controlkit.conditions.fidelity import RESTORED_PSNR
from controlkit.conditions.pixels import REMAP_SIDE, length, short_side, smooth_field, smoothed, to_uint8


@condition(
    "haze",
    summary="the image in simulated haze",
    aliases=("dehaze", "fog"),
    fidelity=RESTORED_PSNR,
    random={"density": uniform(0.6, 1.8), "airlight": uniform(0.7, 1.0), "seed": seed()},
    limits={"density": (0, 20), "airlight": (0, 1)},
    mirrors=False,
)
def haze(image: np.ndarray, *, density: float = 1.2, airlight: float = 0.85, seed: int = 0) -> np.ndarray:
    """Scattering `J t + A (1 - t)` with `t = exp(-density distance)`; ranges as in RESIDE (Li et al. 2019).

    The true depth is unknown: here the distance grows from bottom to top, varied by a smooth random field.

    Args:
        density: attenuation over a distance of 1.
        airlight: brightness of the haze (A), in [0, 1].
        seed: of the random field.
    """
    height, width = image.shape[:2]
    ramp = np.linspace(1, 0.3, height, dtype=np.float32)[:, None]
    field = smooth_field(np.random.default_rng(seed), height, width, length(image, 0.4, least=2))
    clear = np.exp(-density * (0.6 * ramp + 0.4 * field))[..., None]
    return to_uint8(image * clear + 255 * airlight * (1 - clear))


@condition(
    "rain",
    summary="the image in simulated rain",
    aliases=("derain", "rain_streaks"),
    fidelity=RESTORED_PSNR,
    random={
        "amount": uniform(0.3, 1.0),
        "streak": uniform(0.04, 0.12),
        "slant": uniform(-30, 30),
        "seed": seed(),
    },
    limits={"amount": (0, 4), "streak": (0, 1), "slant": (-80, 80)},
    mirrors=False,
)
def rain(
    image: np.ndarray, *, amount: float = 0.6, streak: float = 0.08, slant: float = 12.0, seed: int = 0
) -> np.ndarray:
    """Bright parallel streaks over a lightly veiled image.

    Args:
        amount: density; 1 is a downpour.
        streak: length of the streaks as a fraction of the short side.
        slant: degrees from the vertical.
        seed: of their positions.
    """
    rng = np.random.default_rng(seed)
    height, width = image.shape[:2]
    run = length(image, streak, least=2)
    angle = np.radians(slant)
    step = run * np.array([np.sin(angle), np.cos(angle)])
    thickness = max(1, round(length(image, 0.003)))
    count = _number(image, 500 * amount, min(1.0, length(image, 0.003) / thickness))
    starts = rng.uniform([-run, -run], [width, height], (count, 2))
    lengths, brightness = rng.uniform(0.5, 1.5, (count, 1)), rng.integers(70, 190, count)
    ends = np.rint((starts + lengths * step) * 16).astype(int)
    starts = np.rint(starts * 16).astype(int)
    layer = np.zeros((height, width), np.uint8)
    for start, end, value in zip(starts.tolist(), ends.tolist(), brightness.tolist(), strict=True):
        cv2.line(layer, start, end, value, thickness, cv2.LINE_AA, 4)
    side = 2 * round(length(image, 0.08)) + 1
    veil = cv2.blur(cv2.blur(layer, (side, side)), (side, side)).astype(np.float32)
    light = np.maximum(smoothed(layer, length(image, 0.001)), veil * 0.8)[..., None] / 255
    return to_uint8(image * (1 - light) + 235 * light)


@condition(
    "raindrop",
    summary="the image through a pane with simulated drops",
    aliases=("raindrops", "deraindrop"),
    fidelity=RESTORED_PSNR,
    random={"drops": uniform(10, 40), "seed": seed()},
    limits={"drops": (0, 2000), "size": (0, 0.5)},
    greatest_side=REMAP_SIDE,
    mirrors=False,
)
def raindrop(image: np.ndarray, *, drops: float = 25.0, size: float = 0.045, seed: int = 0) -> np.ndarray:
    """Round drops, each a small lens that shows a wide part of the image upside down.

    Args:
        drops: number on a square of the short side.
        size: mean radius, as a fraction of the short side.
        seed: of their positions.
    """
    rng = np.random.default_rng(seed)
    height, width = image.shape[:2]
    map_y, map_x = np.indices((height, width), dtype=np.float32)
    cover = np.zeros((height, width), np.float32)
    light = np.zeros((height, width), np.float32)
    for _ in range(_number(image, drops)):
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        radius = length(image, size * rng.lognormal(0, 0.4), least=1.5)
        tall = rng.uniform(1, 1.3)
        top, left = max(0, int(y - radius * tall)), max(0, int(x - radius))
        window = (slice(top, int(y + radius * tall) + 2), slice(left, int(x + radius) + 2))
        place: np.ndarray = np.indices(cover[window].shape, dtype=np.float32)
        across, down = (place[1] + left - x) / radius, (place[0] + top - y) / (radius * tall)
        inside = np.clip((1 - np.hypot(across, down)) * radius, 0, 1)
        covered = inside > 0
        bulge = 1 + across**2 + down**2
        # A drop shows the scene upside down, over about five times its own width.
        map_x[window][covered] = (x - across * radius * 2.5 * bulge)[covered]
        map_y[window][covered] = (y - down * radius * 2.5 * bulge)[covered]
        cover[window] = np.maximum(cover[window], inside)
        glint = np.exp(-((across + 0.35) ** 2 + (down + 0.4) ** 2) / 0.06)
        shine = 60 * glint - 45 * np.clip(down, 0, 1) ** 2
        light[window][covered] = (shine * inside)[covered]
    through = smoothed(image, length(image, 0.006))
    through = cv2.remap(through, map_x, map_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    weight = cover[..., None]
    return to_uint8(image * (1 - weight) + through * weight + light[..., None])


@condition(
    "snow",
    summary="the image in simulated snowfall",
    aliases=("desnow",),
    fidelity=RESTORED_PSNR,
    random={"amount": uniform(0.3, 1.0), "seed": seed()},
    limits={"amount": (0, 4)},
    mirrors=False,
)
def snow(image: np.ndarray, *, amount: float = 0.6, seed: int = 0) -> np.ndarray:
    """White flakes in three sizes, the large ones out of focus, and a light veil.

    Args:
        amount: density; 1 is heavy snowfall.
        seed: of their positions.
    """
    rng = np.random.default_rng(seed)
    height, width = image.shape[:2]
    light = np.full((height, width), 0.12 * min(amount, 1.0), np.float32)
    for radius, count, strength in ((0.003, 500, 0.95), (0.007, 160, 0.9), (0.016, 30, 0.7)):
        layer = np.zeros((height, width), np.uint8)
        size = length(image, radius)
        number = _number(image, count * amount, min(1.0, size / 0.7))
        centres = np.rint(rng.uniform(0, [width, height], (number, 2)) * 16).astype(int)
        sizes = np.rint(max(0.7, size) * rng.uniform(0.7, 1.3, number) * 16).astype(int)
        for centre, flake in zip(centres.tolist(), sizes.tolist(), strict=True):
            cv2.circle(layer, centre, flake, 255, -1, cv2.LINE_AA, 4)
        flakes = smoothed(layer, length(image, radius * 0.4)).astype(np.float32) * (strength / 255)
        light = np.maximum(light, flakes)
    return to_uint8(image * (1 - light[..., None]) + 250 * light[..., None])


@condition(
    "low_light",
    summary="the image as if taken in simulated darkness, with sensor noise",
    aliases=("lowlight", "dark", "low_light_enhancement"),
    fidelity=RESTORED_PSNR,
    random={
        "gain": uniform(0.2, 0.5),
        "gamma": uniform(1.2, 2.2),
        "noise": uniform(0.005, 0.03),
        "seed": seed(),
    },
    limits={"gain": (0, 1), "gamma": (0.1, 10), "noise": (0, 1)},
    mirrors=False,
)
def low_light(
    image: np.ndarray, *, gain: float = 0.35, gamma: float = 1.6, noise: float = 0.015, seed: int = 0
) -> np.ndarray:
    """`gain image^gamma` in [0, 1], plus Gaussian noise.

    Args:
        gain: brightness of white.
        gamma: above 1, dark parts are darkened more.
        noise: standard deviation of the noise.
        seed: of the noise.
    """
    values = np.random.default_rng(seed).standard_normal(image.shape, dtype=np.float32) * (255 * noise)
    curve = (255 * gain * (np.arange(256) / 255) ** gamma).astype(np.float32)
    return to_uint8(curve[image] + values)


def _number(image: np.ndarray, on_a_square: float, coarseness: float = 1.0) -> int:
    """Number of flakes, drops or streaks on the image.

    Args:
        image: `[H, W, 3]`.
        on_a_square: the number on a square of its short side.
        coarseness: intended over actual size, below 1 where pixels are too coarse; there are fewer then, so that they
            do not cover a small image.
    """
    height, width = image.shape[:2]
    return round(on_a_square * np.sqrt(coarseness) * height * width / short_side(image) ** 2)
