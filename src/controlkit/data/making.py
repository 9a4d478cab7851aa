"""One image -> its pair: the image, condition images with parameters that follow from its content, the caption."""

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
from controlkit.errors import UserError
from controlkit.files import sha256_of
from controlkit.images import resize_cover, sequence_note


@dataclass(frozen=True, kw_only=True)
class MakeSettings:
    """What decides how pairs come out. Two runs with the same settings make the same files."""

    conditions: tuple[str, ...]
    """Names of the conditions."""
    seed: int = 0
    """Random parameters follow from it, the image's content and the condition's name."""
    fixed: bool = False
    """Whether conditions keep their default parameters."""
    size: int | None = None
    """Side of the square that images are scaled and cropped to; with `buckets`, of the square bucket."""
    buckets: bool = False
    """Whether images are scaled and cropped to the aspect-ratio bucket nearest to their shape."""
    copy: bool = False
    """Whether images that stay as they are are copied, and not referred to where they lie."""

    def __post_init__(self) -> None:
        names = tuple(find(name).name for name in self.conditions)
        if not names or len(set(names)) != len(names):
            raise UserError(f"conditions must be a list of different names, got {', '.join(self.conditions) or 'none'}")
        object.__setattr__(self, "conditions", names)
        if self.size is not None and not 16 <= self.size <= 8192:
            raise UserError(f"size is {self.size}; it must lie from 16 to 8192")
        if self.buckets:
            _ = self.bucket_sizes

    @property
    def bucket_sizes(self) -> Buckets:
        """The buckets that images are assigned to."""
        size = self.size or 512
        return Buckets(size=size, step=64 if size % 64 == 0 else 8)

    def target_size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of the pair of an image of this size."""
        if self.buckets:
            return self.bucket_sizes.assign(width, height)
        return (self.size, self.size) if self.size is not None else (width, height)

    def differences(self, other: MakeSettings) -> list[str]:
        """`name: this, other` of all that differs but the conditions."""
        both = ((name, vars(self)[name], vars(other)[name]) for name in vars(self) if name != "conditions")
        return [f"{name}: {mine} here, {theirs} now" for name, mine, theirs in both if mine != theirs]


@dataclass(frozen=True, kw_only=True)
class EncodedPair:
    """A finished pair in memory."""

    entry: dict[str, Any]
    """What the manifest says of it, less the places of its files."""
    image: bytes | None
    """The image's file; None where it stays as and where it is."""
    suffix: str
    """How that file is called: `png`, or the original's ending."""
    conditions: Mapping[str, bytes] = field(default_factory=dict)
    """Name -> PNG."""
    note: str | None = None
    """What of the image's file was not used."""


def make_pair(image: InputImage, settings: MakeSettings) -> EncodedPair:
    """The pair of one image; nothing is written.

    Raises:
        UserError: the image is missing, torn or too small, or a condition cannot be drawn from it.
    """
    data = _read(image)
    # What another tool may show otherwise (turned, transparent, 16 bits) or would not take for an image, by its name,
    # is written anew, as it is seen here.
    original, plain = decode_pixels(data, image.name)
    plain = plain and image.name.lower().endswith(SUFFIXES)
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
        seed = condition_seed(settings.seed, digest, name)
        given = (image.objects or {}).get(name)
        values = condition.defaults if settings.fixed else condition.random_parameters(np.random.default_rng(seed))
        images[name] = png(_drawn(condition, original if given else pixels, {**values, **(given or {})}, size))
        parameters[name] = {"objects": len(next(iter(given.values())))} if given else values
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
    note = next(iter(sequence_note(data, image.name)), None)
    return EncodedPair(entry=entry, image=file, suffix=suffix, conditions=images, note=note)


def condition_seed(seed: int, content: str, condition: str) -> int:
    """The seed of a condition's random parameters: the same for the same image, whatever else is made and when.

    Args:
        content: hash of the image file's bytes.
    """
    return int(sha256_of("pairs", str(seed), content, condition)[:12], 16)


def sha256(data: bytes) -> str:
    """Hex SHA-256 of a file's bytes, as `sha256sum` tells it."""
    return hashlib.sha256(data).hexdigest()


def png(pixels: np.ndarray) -> bytes:
    """`uint8 [H, W, 3]` RGB as a PNG file, in grey if all three channels agree, which is a third of the bytes."""
    # Most images in colour are told by a few pixels, without a look at all of them.
    few = pixels[::16, ::16]
    first = cv2.extractChannel(pixels, 0) if (few == few[..., :1]).all() else None
    if first is not None and cv2.norm(cv2.cvtColor(first, cv2.COLOR_GRAY2RGB), pixels, cv2.NORM_INF) > 0:
        first = None
    done, encoded = cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR) if first is None else first)
    assert done
    return encoded.tobytes()


def _drawn(condition: Condition, image: np.ndarray, parameters: Mapping[str, Any], size: tuple[int, int]) -> np.ndarray:
    """The condition image at `size`. What is drawn from annotations is drawn on the whole image and fitted after,
    colours kept, since annotations know nothing of the crop."""
    try:
        made = condition(image, **parameters)
    except (cv2.error, ValueError, ArithmeticError, IndexError) as error:
        height, width = image.shape[:2]
        reason = " ".join(str(error).split())
        raise UserError(f"{condition.name} cannot be drawn of an image of {width} x {height}: {reason}") from error
    if made.shape[1::-1] == size:
        return made
    height, width = made.shape[:2]
    scale = max(size[0] / width, size[1] / height)
    # The same window as resize_cover's, sampled at the centres of its pixels.
    columns = ((np.arange(size[0]) + 0.5 - size[0] / 2) / scale + width / 2).astype(int).clip(0, width - 1)
    rows = ((np.arange(size[1]) + 0.5 - size[1] / 2) / scale + height / 2).astype(int).clip(0, height - 1)
    return made[rows][:, columns]


def _read(image: InputImage) -> bytes:
    place = image.source if isinstance(image.source, Path) else image.source.path
    try:
        str(place).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the name of {image.name} is not UTF-8; rename it") from error
    try:
        return image.source.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {image.name}: {error.strerror or error}") from error
