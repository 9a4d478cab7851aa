"""Test images for pairs, and helpers to write them to disk."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import cv2
import numpy as np
from PIL import Image


def scene(number: int, height: int = 48, width: int = 48) -> np.ndarray:
    """Coloured shapes on a plain background, `uint8 [height, width, 3]`; another for every number."""
    rng = np.random.default_rng(number)
    image = np.empty((height, width, 3), np.uint8)
    image[:] = rng.integers(0, 256, 3)
    for _ in range(4):
        colour = tuple(int(value) for value in rng.integers(0, 256, 3))
        corners = rng.uniform(0.1, 0.9, (4, 2)) * [width, height]
        cv2.fillConvexPoly(image, cv2.convexHull(corners.astype(np.int32)), colour)
    return image


def write_images(folder: Path, count: int = 6, captions: bool = True, **size: int) -> list[Path]:
    """`image0.png` ... with captions beside them; the image of a number is always the same."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"image{number}.png" for number in range(count)]
    for number, path in enumerate(paths):
        Image.fromarray(scene(number, **size)).save(path)
        if captions:
            path.with_suffix(".txt").write_text(f"scene {number}\n")
    return paths


def encoded(image: np.ndarray, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, format=kind)
    return stream.getvalue()


def write_archive(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` but what is kept for later runs."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in found
        if ".controlkit" not in path.relative_to(folder).parts
    }
