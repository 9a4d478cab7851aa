"""Make one pair: image, condition images with parameters seeded by the image's content, caption."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from controlkit.conditions import Condition, find
from controlkit.data.buckets import Buckets
from controlkit.data.input_images import InputImage
from controlkit.data.sources import SUFFIXES, decode_pixels
from controlkit.data.turned import compute_upright
from controlkit.errors import UserError
from controlkit.files import sha256_of
from controlkit.images import resize_cover, sequence_note

_MUCH = 4
"""Factor from which an enlargement is noted."""


@dataclass(frozen=True, kw_only=True)
class MakeSettings:
    """Settings of pairs. Runs with the same settings make the same files."""

    conditions: tuple[str, ...]
    """Names of the conditions."""
    seed: int = 0
    """Random parameters depend on it, the image's content and the condition's name."""
    fixed: bool = False
    """Use the default parameters of conditions instead of random ones."""
    size: int | None = None
    """Side of the square that images are scaled and cropped to; with `buckets`, of the square bucket."""
    tiles: bool = False
    """The images were cut into squares of `size` (`with_tiles`)."""
    buckets: bool = False
    """Scale and crop images to the nearest aspect-ratio bucket."""
    copy: bool = False
    """Copy images that need no change, instead of referring to the originals."""

    def __post_init__(self) -> None:
        if isinstance(self.conditions, str):
            raise UserError(f"conditions is {self.conditions!r}; expected a list of names", "wrong-type")
        names = tuple(find(name).name for name in self.conditions)
        if not names or len(set(names)) != len(names):
            raise UserError(
                f"conditions is {', '.join(self.conditions) or 'empty'}; expected one or more different names",
                "contradiction" if names else "missing-setting",
            )
        object.__setattr__(self, "conditions", names)
        if self.size is not None and not 16 <= self.size <= 8192:
            raise UserError(f"size is {self.size}; expected 16 to 8192 pixels", "out-of-range")
        if self.tiles and (self.size is None or self.buckets):
            raise UserError("tiles needs size, the side of the tiles, and excludes buckets", "contradiction")
        if self.buckets:
            _ = self.bucket_sizes

    @property
    def bucket_sizes(self) -> Buckets:
        """The aspect-ratio buckets."""
        size = self.size or 512
        return Buckets(size=size, step=64 if size % 64 == 0 else 8)

    def target_size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of the pair for an image of this size."""
        if self.buckets:
            return self.bucket_sizes.assign(width, height)
        return (self.size, self.size) if self.size is not None else (width, height)

    def differences(self, other: MakeSettings) -> list[str]:
        """`name: here, now` of every setting that differs, except the conditions."""
        names = [name for name in vars(self) if name != "conditions" and vars(self)[name] != vars(other)[name]]
        return [f"{name}: {vars(self)[name]} here, {vars(other)[name]} now" for name in names]


@dataclass(frozen=True, kw_only=True)
class EncodedPair:
    """A finished pair as bytes of files."""

    entry: dict[str, Any]
    """Its manifest entry without paths."""
    image: bytes | None
    """The image file; None where the original is used in place."""
    suffix: str
    """Suffix of the image file: `png`, or that of the original."""
    conditions: Mapping[str, bytes] = field(default_factory=dict)
    """Name -> PNG."""
    note: str | None = None
    """What a person should know of it: a part of the image file that was not used, or an image that was much
    enlarged."""


def make_pair(image: InputImage, settings: MakeSettings) -> EncodedPair:
    """Make the pair of one image in memory.

    Raises:
        UserError: the image is missing, truncated or too small, or a condition cannot be computed from it.
    """
    data = _read(image)
    # Images that other tools may read differently (EXIF rotation, alpha, 16 bits) or not at all, by their names, are
    # written again as decoded here.
    original, plain = decode_pixels(data, image.name)
    plain = plain and image.tile is None and image.name.lower().endswith(SUFFIXES)
    if image.tile is not None:
        left, top, side = image.tile
        original = np.ascontiguousarray(original[top : top + side, left : left + side])
    height, width = original.shape[:2]
    size = settings.target_size(width, height)
    fits = size == (width, height)
    pixels = original if fits else np.asarray(resize_cover(Image.fromarray(original), *size))
    digest = sha256(data)
    kept = plain and fits
    file = (data if settings.copy or not isinstance(image.source, Path) else None) if kept else png(pixels)
    images, parameters, seeds = {}, {}, {}
    for name in settings.conditions:
        condition = find(name)
        content = digest if image.tile is None else f"{digest} {image.tile}"
        seed = condition_seed(settings.seed, content, name)
        objects = (image.objects or {}).get(name)
        values = condition.defaults if settings.fixed else condition.random_parameters(np.random.default_rng(seed))
        if objects:
            drawn = _compute(condition, original, {**values, **objects}, size, data)
        else:
            drawn = _compute(condition, pixels, values, size)
        images[name] = png(drawn)
        parameters[name] = {"objects": len(next(iter(objects.values())))} if objects else values
        if not settings.fixed:
            seeds[name] = seed
    entry = {
        "key": image.key,
        "prompt": image.caption(),
        "size": list(size),
        "parameters": parameters,
        "seeds": seeds,
        "sha256": {
            "picture": digest if kept else sha256(file or b""),
            "conditions": {name: sha256(image) for name, image in images.items()},
        },
        "original": {"name": image.name, "sha256": digest},
    }
    suffix = image.name.rpartition(".")[2].lower() if kept else "png"
    notes = list(sequence_note(data, image.name))
    if (enlarged := max(size[0] / width, size[1] / height)) >= _MUCH:
        notes.append(f"{image.name} has {width} x {height} pixels and was enlarged {enlarged:.0f} times")
    note = "; ".join(notes) or None
    return EncodedPair(entry=entry, image=file, suffix=suffix, conditions=images, note=note)


def condition_seed(seed: int, content: str, condition: str) -> int:
    """The seed of a condition's random parameters: the same for the same image in any company and order.

    Args:
        content: hash of the image file's bytes.
    """
    return int(sha256_of("pairs", str(seed), content, condition)[:12], 16)


def sha256(data: bytes) -> str:
    """Hex SHA-256 of a file's bytes, as `sha256sum` prints it."""
    return hashlib.sha256(data).hexdigest()


def png(pixels: np.ndarray) -> bytes:
    """`uint8 [H, W, 3]` RGB as a PNG file; greyscale, a third of the bytes, if all three channels agree."""
    # A few pixels are enough to rule out greyscale for most colour images.
    sample = pixels[::16, ::16]
    grey = cv2.extractChannel(pixels, 0) if (sample == sample[..., :1]).all() else None
    if grey is not None and cv2.norm(cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB), pixels, cv2.NORM_INF) > 0:
        grey = None
    success, encoded = cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR) if grey is None else grey)
    assert success
    return encoded.tobytes()


def _compute(
    condition: Condition,
    image: np.ndarray,
    parameters: Mapping[str, Any],
    size: tuple[int, int],
    annotated: bytes | None = None,
) -> np.ndarray:
    """The condition image at `size`. Annotations are drawn on the full image and cropped afterwards with nearest
    neighbours, since their coordinates refer to the full image.

    Args:
        annotated: the bytes of the image file, if `parameters` has annotations.
    """
    try:
        if annotated is None:
            result = condition(image, **parameters)
        else:
            result = compute_upright(condition, image, annotated, parameters)
    except (cv2.error, ValueError, ArithmeticError, IndexError) as error:
        height, width = image.shape[:2]
        reason = " ".join(str(error).split())
        raise UserError(
            f"cannot compute {condition.name} from an image of {width} x {height}: {reason}", "wrong-size"
        ) from error
    if result.shape[1::-1] == size:
        return result
    height, width = result.shape[:2]
    scale = max(size[0] / width, size[1] / height)
    # The window of resize_cover, sampled at pixel centres.
    columns = ((np.arange(size[0]) + 0.5 - size[0] / 2) / scale + width / 2).astype(int).clip(0, width - 1)
    rows = ((np.arange(size[1]) + 0.5 - size[1] / 2) / scale + height / 2).astype(int).clip(0, height - 1)
    return result[rows][:, columns]


def _read(image: InputImage) -> bytes:
    path = image.source if isinstance(image.source, Path) else image.source.path
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the name of {image.name} is not UTF-8; rename it", "bad-data") from error
    try:
        return image.source.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {image.name}: {error.strerror or error}", "unreadable-file") from error
