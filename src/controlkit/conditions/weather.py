"""Images in bad weather and bad light. The sources train on paired data; these are simulated, and say so.

CtrLoRA's dehaze, derain, desnow and low-light have no annotator: they are adapters trained on given pairs
(HazeWorld, 861 raindrop pairs, Yang 2020), for which there is the condition `identity`.
"""

from __future__ import annotations

import cv2
import numpy as np

from controlkit.conditions.condition import condition, seed, uniform
from controlkit.conditions.fidelity import RESTORED_PSNR
from controlkit.conditions.pixels import length, short_side, smooth_field, smoothed, to_uint8


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

    Nothing is known about true depth: the distance grows from the bottom to the top, with smooth random
    swathes.

    Args:
        density: how much is lost over a distance of 1.
        airlight: brightness of the haze (A), of 1.
        seed: of the swathes.
    """
    height, width = image.shape[:2]
    ramp = np.linspace(1, 0.3, height, dtype=np.float32)[:, None]
    swathes = smooth_field(np.random.default_rng(seed), height, width, length(image, 0.4, least=2))
    clear = np.exp(-density * (0.6 * ramp + 0.4 * swathes))[..., None]
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
    """Bright parallel streaks over a slightly veiled image.

    Args:
        amount: how densely they fall; 1 is a downpour.
        streak: their length as a fraction of the short side.
        slant: degrees from the vertical.
        seed: where they are.
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
    mirrors=False,
)
def raindrop(image: np.ndarray, *, drops: float = 25.0, size: float = 0.045, seed: int = 0) -> np.ndarray:
    """Round drops, each a small lens that shows a wide part of the image upside down.

    Args:
        drops: how many lie on a square of the short side.
        size: mean radius, as a fraction of the short side.
        seed: where they lie.
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
        seen = inside > 0
        bulge = 1 + across**2 + down**2
        # A drop bends light so far that it shows the scene upside down, some five times its own width.
        map_x[window][seen] = (x - across * radius * 2.5 * bulge)[seen]
        map_y[window][seen] = (y - down * radius * 2.5 * bulge)[seen]
        cover[window] = np.maximum(cover[window], inside)
        glint = np.exp(-((across + 0.35) ** 2 + (down + 0.4) ** 2) / 0.06)
        shine = 60 * glint - 45 * np.clip(down, 0, 1) ** 2
        light[window][seen] = (shine * inside)[seen]
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
    """White flakes in three sizes, the large ones near and out of focus, and a light veil.

    Args:
        amount: how densely they fall; 1 is a heavy snowfall.
        seed: where they are.
    """
    rng = np.random.default_rng(seed)
    height, width = image.shape[:2]
    light = np.full((height, width), 0.12 * min(amount, 1.0), np.float32)
    for radius, count, strength in ((0.003, 500, 0.95), (0.007, 160, 0.9), (0.016, 30, 0.7)):
        layer = np.zeros((height, width), np.uint8)
        wanted = length(image, radius)
        number = _number(image, count * amount, min(1.0, wanted / 0.7))
        centres = np.rint(rng.uniform(0, [width, height], (number, 2)) * 16).astype(int)
        sizes = np.rint(max(0.7, wanted) * rng.uniform(0.7, 1.3, number) * 16).astype(int)
        for centre, size in zip(centres.tolist(), sizes.tolist(), strict=True):
            cv2.circle(layer, centre, size, 255, -1, cv2.LINE_AA, 4)
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
    """`gain image^gamma`, all of 1, plus Gaussian noise.

    Args:
        gain: brightness of what was white.
        gamma: how much more the dark parts lose.
        noise: standard deviation of the noise.
        seed: of the noise.
    """
    values = np.random.default_rng(seed).standard_normal(image.shape, dtype=np.float32) * (255 * noise)
    curve = (255 * gain * (np.arange(256) / 255) ** gamma).astype(np.float32)
    return to_uint8(curve[image] + values)


def _number(image: np.ndarray, on_a_square: float, coarseness: float = 1.0) -> int:
    """How many flakes, drops or streaks lie on the image, given how many do on a square of its short side.

    Args:
        image: `[H, W, 3]`.
        on_a_square: the number on a square.
        coarseness: size that one should have over the size that it has, below 1 where a pixel is too large
            for it; there are fewer then, so that a small image is not covered.
    """
    height, width = image.shape[:2]
    return round(on_a_square * np.sqrt(coarseness) * height * width / short_side(image) ** 2)
