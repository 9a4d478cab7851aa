"""Run one request in the worker: prepare its images, generate, and describe the result."""

from __future__ import annotations

import dataclasses
import io
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from controlkit import conditions
from controlkit.bases.base import Base
from controlkit.bases.prompt_encoding import TextOptions
from controlkit.conditions.condition import BLACK, background_of, is_of_labels
from controlkit.errors import UserError
from controlkit.images import decode_image, decode_rgb, resize_cover, upright
from controlkit.sampling.generation import Generation
from controlkit.sampling.inputs import check_layers
from controlkit.sampling.models import Models
from controlkit.sampling.request import GenerateRequest
from controlkit.sampling.residual_cache import ResidualCache
from controlkit.sampling.single import generate_single
from controlkit.sampling.step import Step
from controlkit.server.catalogue import Catalogue
from controlkit.server.infotext import infotext
from controlkit.server.limits import Limits
from controlkit.server.spec import Execution, Fit, SentImage, Spec


class Cancelled(Exception):
    """The request was cancelled while it ran."""


@dataclass
class Result:
    """The result of a request, as the queue keeps it."""

    values: dict[str, Any] = field(default_factory=dict)
    """Seeds, settings that were used, and notes; values of JSON."""
    files: dict[str, list[bytes]] = field(default_factory=dict)
    """Role -> PNG files: `images`, `maps` (condition images) and `start` (the image that sampling starts from)."""


@dataclass(kw_only=True)
class Studio:
    """The state that the worker keeps between requests: models, cache and settings of the server."""

    catalogue: Catalogue
    limits: Limits
    execution: Execution = field(default_factory=Execution)
    models: Models = field(default_factory=Models)
    cache: ResidualCache = field(default_factory=lambda: ResidualCache(256))
    """Limited to 256 MiB; it saves time and changes no result."""

    def use(self, catalogue: Catalogue) -> None:
        """Use the models of `catalogue`. Controls are loaded again if it is another: a file may have been replaced."""
        if catalogue != self.catalogue:
            self.catalogue = catalogue
            self.models.keep_only(GenerateRequest(prompt=""))

    def draw(
        self, spec: Spec, files: Mapping[str, bytes], on_step: Callable[[Step], object]
    ) -> tuple[Result, Cancelled | None]:
        """Generate the images of a request.

        Args:
            files: name -> bytes of the images that the client sent.
            on_step: called after every step; raising `Cancelled` in it cancels.

        Returns:
            The result, and None; or, if it was cancelled, the images that were finished and the exception.

        Raises:
            UserError: an image, a model or a setting cannot be used.
        """
        with tempfile.TemporaryDirectory(prefix="controlkit-") as folder:
            try:
                return self._draw(spec, files, on_step, Path(folder))
            except UserError as error:
                raise UserError(self._public(str(error), folder), error.code) from error

    def _public(self, text: str, folder: str | Path) -> str:
        """A note or an error without paths of the server.

        Args:
            folder: that of the images of the request.
        """
        return self.catalogue.without_paths(text.replace(f"{folder}{os.sep}", ""))

    def _draw(
        self, spec: Spec, files: Mapping[str, bytes], on_step: Callable[[Step], object], folder: Path
    ) -> tuple[Result, Cancelled | None]:
        request = spec.to_request(
            self.catalogue, lambda name: str(folder / f"{name}.png"), **dataclasses.asdict(self.execution)
        )
        base = self.models.base(request)
        width, height = request.width or base.size, request.height or base.size
        self.limits.check_size(width, height, request.hires)
        base.check_size(width, height)
        covered = _covered(spec, files, width, height)
        self.limits.check_size(*covered, None)  # the size of the result, if only a part of the image is sampled
        for name, image in spec.images.items():
            hole = None if image.hole is None else spec.images[image.hole]
            data = prepared(
                image, files[image.file], image.file, *covered, hole=None if hole is None else (hole, files[hole.file])
            )
            (folder / f"{name}.png").write_bytes(data)
        notes = list(spec.notes)
        if spec.lenient:
            if base.reads_guidance and spec.read_guidance is not None:
                request = dataclasses.replace(request, guidance=spec.read_guidance)
            request, changed = _as_the_base_can(request, base)
            notes += changed
        check_layers([request])
        finished = Generation(request)

        def keep(generation: Generation) -> None:
            nonlocal finished
            finished = dataclasses.replace(generation, images=list(generation.images))

        cancelled = None
        try:
            finished = generate_single(
                request,
                base=None,
                controls=None,
                given={},
                cache=self.cache,
                on_step=on_step,
                on_images=keep,
                models=self.models,
            )
        except Cancelled as error:
            cancelled = error
        finally:
            self.models.keep_only(request)
        notes = [self._public(note, folder) for note in (*notes, *finished.notes)]
        return self._result(spec, finished, notes, base), cancelled

    def _result(self, spec: Spec, made: Generation, notes: list[str], base: Base) -> Result:
        request, used = made.request, made.used
        names = {"base": self.catalogue.find("bases", spec.request.get("base") or self.catalogue.base)}
        values: dict[str, Any] = {
            **names,
            "seeds": [each.seed for each in made.images],
            "prompt": request.prompt,
            "negative_prompt": request.negative_prompt,
            "steps": request.steps,
            "width": request.width or base.size,
            "height": request.height or base.size,
            "clip_skip": request.clip_skip,
            "used": {key: value for key, value in used.items() if key != "device"},
            "seconds": made.seconds,
            "notes": notes,
            "ignored": list(spec.ignored),
        }
        values["infotexts"] = [
            infotext(spec, request, self.catalogue, values, each.seed, reads_guidance=base.reads_guidance)
            for each in made.images
        ]
        images = [
            _png(each.image, {"parameters": text}) for each, text in zip(made.images, values["infotexts"], strict=True)
        ]
        stems = list(made.conditions)
        maps = [
            _png(made.conditions[stem])
            for stem in stems
            if any(stem == f"condition{index}" or stem.startswith(f"condition{index}-") for index in spec.maps)
        ]
        start = [_png(made.start_images["image"])] if spec.start_image and "image" in made.start_images else []
        return Result(values, {"images": images, "maps": maps, "start": start})

    def detect(self, spec: Mapping[str, Any], files: Mapping[str, bytes]) -> Result:
        """Compute condition images.

        Args:
            spec: `module`, the condition, or None for the images as they are; its `parameters`; `side`, the length in
                pixels to which the short side is scaled first, or None for no scaling; and optionally `invert`, whether
                colours are inverted, and `holes`, the name of the mask of each image that has one.
            files: name -> bytes of the images, in order, and of the masks.

        Raises:
            UserError: an image or a parameter cannot be used. Its message names no path of the server.
        """
        holes: Mapping[str, str] = spec.get("holes") or {}
        try:
            images = [
                _png(self._detected(spec, data, name, files.get(holes.get(name, "")), holes.get(name, "")))
                for name, data in files.items()
                if name not in holes.values()
            ]
        except UserError as error:
            raise UserError(self.catalogue.without_paths(str(error)), error.code) from error
        return Result({"module": spec["module"]}, {"images": images})

    def _detected(
        self, spec: Mapping[str, Any], data: bytes, name: str, hole: bytes | None, name_of_hole: str
    ) -> Image.Image:
        image = decode_rgb(data, name)
        mask = None if hole is None else _mask_of(image, SentImage(file=name_of_hole, mask=True), hole, name)
        if spec["side"] is not None:
            factor = spec["side"] / min(image.size)
            size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
            if size[0] * size[1] > self.limits.input_pixels:
                raise UserError(f"{name} would be scaled to {size[0]} x {size[1]}; that is too large", "bad-image")
            image = image.resize(size, Image.Resampling.LANCZOS)
            mask = None if mask is None else mask.resize(size, Image.Resampling.LANCZOS)
        if spec.get("invert"):
            image = image.point(lambda value: 255 - value)
        if mask is not None:
            return _with_hole(image, mask)
        if spec["module"] is None:
            return image
        return Image.fromarray(conditions.find(spec["module"])(np.asarray(image), **spec["parameters"]))


def _covered(spec: Spec, files: Mapping[str, bytes], width: int, height: int) -> tuple[int, int]:
    """The size that images are scaled to cover, as `Frame.covered`.

    Args:
        width: width of what is sampled in pixels, as is `height`.

    Raises:
        UserError: the image that sampling starts from is damaged.
    """
    start = spec.request.get("image")
    if start is None or spec.request.get("only_masked") is None:
        return width, height
    file = spec.images[start].file
    return decode_rgb(files[file], file).size  # a part of the image is sampled, and all of it is the result


def prepared(
    image: SentImage,
    data: bytes,
    name: str,
    width: int,
    height: int,
    *,
    hole: tuple[SentImage, bytes] | None = None,
) -> bytes:
    """An image file as sampling reads it: the bytes that were sent, or a PNG if anything was done to the image.

    Args:
        data: the bytes that were sent.
        name: the image's name in errors.
        width: width in pixels that sampling scales the image to cover, as is `height`.
        hole: a mask of the size of the image, which becomes black where it is white, and its bytes.

    Raises:
        UserError: it is damaged, or the mask has another size.
    """
    changes = (image.condition, image.invert, image.transparent, image.by_alpha)
    if image.fit == "crop" and not any(changes):
        return data
    found = _decoded(image, data, name)
    if hole is not None:
        mask = _mask_of(found, *hole, name)
        if image.fit != "crop":
            mask = _fitted(mask, image.fit, width, height, nearest=False, border=(255, 255, 255))
        mask = resize_cover(mask, width, height)
    if image.fit != "crop":
        found = _fitted(found, image.fit, width, height, nearest=is_of_labels(image.shows))
    if hole is not None:
        found = _with_hole(resize_cover(found, width, height), mask)
    elif image.condition is not None:
        found = resize_cover(found, width, height)
        found = Image.fromarray(conditions.find(image.condition)(np.asarray(found), **image.parameters))
    return _png(found)


def _decoded(image: SentImage, data: bytes, name: str) -> Image.Image:
    """An image in RGB at its own size; arguments and errors as of `prepared`."""
    if image.transparent or image.by_alpha:
        alpha = upright(decode_image(data, name)).convert("RGBA").getchannel("A")
    if image.transparent:
        found = alpha.point(lambda value: 255 - value).convert("RGB")
    elif image.by_alpha and alpha.getextrema() != (255, 255):
        found = alpha.point(lambda value: 255 if value > 128 else 0).convert("RGB")
    else:
        found = decode_rgb(data, name, BLACK if image.mask else background_of(image.shows))
    return found.point(lambda value: 255 - value) if image.invert else found


def _mask_of(image: Image.Image, mask: SentImage, data: bytes, name: str) -> Image.Image:
    """The mask of an image.

    Args:
        name: the image's name in errors.

    Raises:
        UserError: it is damaged, or not of the size of the image.
    """
    found = _decoded(mask, data, mask.file)
    if found.size != image.size:
        sizes = [f"{each.width} x {each.height}" for each in (found, image)]
        raise UserError(f"{mask.file} is {sizes[0]} and {name} is {sizes[1]}; send a mask of its size", "wrong-size")
    return found


def _with_hole(image: Image.Image, mask: Image.Image) -> Image.Image:
    """An image that is black where its mask is light (above 127)."""
    pixels = np.array(image)
    pixels[np.asarray(mask.convert("L")) > 127] = 0
    return Image.fromarray(pixels)


def _fitted(
    image: Image.Image,
    fit: Fit,
    width: int,
    height: int,
    *,
    nearest: bool,
    border: tuple[int, int, int] | None = None,
) -> Image.Image:
    """An image scaled to the size of the result without cropping: stretched, or filled up.

    Args:
        border: colour of what is filled up; default: that of the image's border.
    """
    method = Image.Resampling.NEAREST if nearest else Image.Resampling.LANCZOS
    if fit == "stretch":
        return image.resize((width, height), method)
    factor = min(width / image.width, height / image.height)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    whole = Image.new("RGB", (width, height), border or _border_colour(image, nearest=nearest))
    place = ((width - size[0]) // 2, (height - size[1]) // 2)
    whole.paste(image.resize(size, method), place)
    return whole


def _border_colour(image: Image.Image, *, nearest: bool) -> tuple[int, int, int]:
    """The median colour of an image's border; of labels (`nearest`), the most frequent."""
    pixels = np.asarray(image)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    colours, counts = np.unique(border, axis=0, return_counts=True)
    red, green, blue = colours[counts.argmax()] if nearest else np.median(border, axis=0)
    return int(red), int(green), int(blue)


def _as_the_base_can(request: GenerateRequest, base: Base) -> tuple[GenerateRequest, list[str]]:
    """The request with a sampler and a reading of prompts that the base supports, and notes on what was replaced."""
    notes = []
    if request.sampler is not None:
        sampler = _supported_sampler(request.sampler, request.steps, base)
        if sampler != request.sampler:
            used = sampler or base.default_sampler
            notes.append(f"{base.name} does not support the sampler {request.sampler}; used: {used}")
            request = dataclasses.replace(request, sampler=sampler)
    weighted = TextOptions(syntax="weighted")
    if (request.prompt_syntax != "plain" or request.embeddings) and not _reads_prompts(base, weighted):
        if request.prompt_syntax != "plain":
            notes.append(f"{base.name} does not support weights in prompts; read as they stand")
        if request.embeddings:
            notes.append(f"{base.name} does not support textual inversions; their words are read as they stand")
        request = dataclasses.replace(request, prompt_syntax="plain", embeddings=())
    if request.clip_skip is not None and not _reads_prompts(base, TextOptions(clip_skip=request.clip_skip)):
        notes.append(f"{base.name} does not support clip_skip; left out")
        request = dataclasses.replace(request, clip_skip=None)
    return request, notes


def _reads_prompts(base: Base, options: TextOptions) -> bool:
    """Whether the base supports a way of reading prompts."""
    try:
        base.encode_text([""], options=options)
    except UserError as error:
        if error.code != "unsupported":
            raise
        return False
    return True


def _supported_sampler(name: str, steps: int, base: Base) -> str | None:
    """The sampler if the base supports it, else the same without Karras spacing; None if it supports neither."""
    for each in (name, name.removesuffix("-karras")):
        try:
            base.schedule.solver(each, steps, "cpu", base.name)
        except UserError:
            continue
        return each
    return None


def preview(step: Step) -> bytes | None:
    """A PNG of the current estimate of a batch's first image; None if the base has no previews."""
    try:
        image = step.preview()[0]
    except UserError:
        return None
    return _png(
        image.resize((image.width * step.base.factor, image.height * step.base.factor), Image.Resampling.BICUBIC)
    )


def _png(image: Image.Image, text: Mapping[str, str] | None = None) -> bytes:
    info, buffer = PngInfo(), io.BytesIO()
    for key, value in (text or {}).items():
        info.add_itxt(key, value) if not value.isascii() else info.add_text(key, value)
    image.save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()
