"""A folder of generated images with their settings, written while they are made."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from PIL import Image

from controlkit._version import __version__
from controlkit.errors import UserError
from controlkit.files import writable_folder, write_json
from controlkit.images import write_png
from controlkit.sampling.axes import points_of, values_at
from controlkit.sampling.file_names import HIRES_PREFIX, START_NAMES, condition_name, first_name, image_name, mask_name
from controlkit.sampling.generation import Generation
from controlkit.sampling.identity import pixels_sha256
from controlkit.sampling.inputs import with_named_inputs
from controlkit.sampling.request import GenerateRequest
from controlkit.sampling.sheets import sheets_of


class ImageFolder:
    """Images, condition images, sheets and `settings.json` of one generation.

    Args:
        folder: created if needed; files of the same names are replaced.

    Raises:
        UserError: it is not writable.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = writable_folder(folder)
        self._written: set[str] = set()
        self._firsts: set[str] = set()
        self._has_settings = False
        self._conditions: dict[tuple[str, str], str] = {}
        """Stem and hash of an image -> the stem of its file."""

    @property
    def images(self) -> int:
        """Generated images in the folder."""
        return len(self._written)

    def add(self, generation: Generation) -> None:
        """Write the images that are new, so that an interruption loses none that is finished."""
        for part in generation.parts or [generation]:
            self._add_part(part)
        if not self._has_settings:
            write_json(self.folder / "settings.json", self._settings(generation))
            self._has_settings = True

    def finish(self, generation: Generation) -> list[Path]:
        """Write everything that is not written yet; returns the paths of the images."""
        parts = generation.parts or [generation]
        for part in parts:
            self._add_part(part)
        settings = self._settings(generation)
        if generation.parts:
            points = points_of(generation.request)
            settings["parts"] = [
                {
                    "values": values_at(generation.request, point),
                    "images": [f"{image_name(part.name, image.seed)}.png" for image in part.images],
                    **self._used(part),
                }
                for point, part in zip(points, parts, strict=True)
            ]
        self._draw_sheets(generation)
        write_json(self.folder / "settings.json", settings)
        return [self.folder / f"{image_name(part.name, image.seed)}.png" for part in parts for image in part.images]

    def _add_part(self, part: Generation) -> None:
        """Write the images of one request without axes."""
        prompts = part.used.get("prompts", [part.request.prompt] * len(part.request.seeds))
        for generated, prompt in zip(part.images, prompts, strict=False):
            name = image_name(part.name, generated.seed)
            if name not in self._written:
                self._write(name, generated.image, part, generated.seed, prompt)
                self._written.add(name)
        for first in part.first_images:
            name = first_name(first.seed, part.name)
            if name not in self._firsts:
                write_png(self.folder / f"{name}.png", first.image)
                self._firsts.add(name)

    def _write(self, name: str, image: Image.Image, part: Generation, seed: int, prompt: str) -> None:
        settings = {"controlkit": __version__, **self._used(part)}
        request = dataclasses.replace(part.request, seeds=(seed,)).to_json()
        used = {**part.used, "prompts": [prompt]} if "prompts" in part.used else part.used
        text = json.dumps({**settings, "request": request, "used": used})
        write_png(self.folder / f"{name}.png", image, {"controlkit": text, "prompt": prompt})

    def _settings(self, generation: Generation) -> dict[str, Any]:
        settings = {"controlkit": __version__, "request": generation.request.to_json()}
        return settings | ({"used": generation.used, "sha256": {}} if generation.parts else self._used(generation))

    def _used(self, part: Generation) -> dict[str, Any]:
        """What restores the images of one request without axes, besides the request."""
        files = self._condition_files(part)
        return {"used": part.used, "sha256": part.sha256} | ({"files": files} if files else {})

    def _condition_files(self, part: Generation) -> dict[str, str]:
        """Write condition images and masks; returns stem -> the stem of its file, where another part has the stem."""
        renamed = {}
        for stem, image in {**part.conditions, **part.masks, **part.start_images}.items():
            key = (stem, pixels_sha256(image))
            if key not in self._conditions:
                count = sum(known == stem for known, _ in self._conditions)
                self._conditions[key] = f"{stem}.{count}" if count else stem
                write_png(self.folder / f"{self._conditions[key]}.png", image)
            if self._conditions[key] != stem:
                renamed[stem] = self._conditions[key]
        return renamed

    def _draw_sheets(self, generation: Generation) -> None:
        sheets = sheets_of(generation.request)
        if not sheets:
            return
        images = {
            image_name(part.name, generated.seed): generated.image
            for part in generation.parts
            for generated in part.images
        }
        for sheet in sheets:
            write_png(self.folder / f"{sheet.name}.png", sheet.draw(images))
        write_json(self.folder / "xy.json", {"sheets": [sheet.to_json() for sheet in sheets]})


def _is_file(image: object) -> bool:
    return isinstance(image, (str, os.PathLike)) and os.path.exists(image)


def refuse_overwriting(request: GenerateRequest, folder: str | Path) -> None:
    """Refuse to write the results of `request` over its own input images.

    Args:
        request: images in memory are in no folder.
        folder: where the images are about to be written.

    Raises:
        UserError: a result has the path of an input image.
    """
    written = ["preview", *(sheet.name for sheet in sheets_of(request))]
    shared: dict[str, None] = {}  # stems of condition images, masks and start images
    read = []
    points = points_of(request)
    for point in points:
        written += [image_name(point.name, seed) for seed in point.request.seeds]
        if request.prompt_mode == "automatic":
            written += [first_name(seed, point.name) for seed in point.request.seeds]
        asked = point.request
        if any((use.image or "").lower().endswith(".json") for use in asked.controls):
            asked = with_named_inputs(asked)
        for index, use in enumerate(asked.controls):
            named = {None: use.image} if use.inputs is None else use.inputs
            stems = [condition_name(index, name) for name in named]
            stems += [mask_name(index)] if use.mask is not None else []
            shared |= dict.fromkeys(stems)
            shared |= {} if asked.hires is None else dict.fromkeys(f"{HIRES_PREFIX}{stem}" for stem in stems)
            given = [*named.values(), use.mask]
            read += [(use.control, value) for value in given if _is_file(value)]
        for name in START_NAMES:
            if (given_path := getattr(asked, name)) is not None:
                shared[name] = None
                read += [("the request", given_path)] if _is_file(given_path) else []
    written += shared
    if len(points) > 1:  # those that differ between the combinations are numbered
        written += [path.stem for path in Path(folder).glob("*.png") if _without_number(path.stem) in shared]
    inputs = {os.path.realpath(image): control for control, image in read}
    for path in (Path(folder) / f"{name}.png" for name in written):
        control = inputs.get(os.path.realpath(path))
        if control is not None:
            raise UserError(
                f"{path} would be overwritten, but it is an image or mask of {control}; choose another folder",
                "would-overwrite",
            )


def _without_number(stem: str) -> str | None:
    """`condition0` of `condition0.1`; None if there is no number."""
    name, _, number = stem.rpartition(".")
    return name if number.isdecimal() else None
