"""The images of a request as read from their files, and the part of them that is sampled."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image

from controlkit import conditions
from controlkit.conditions.condition import BLACK, WHITE, Condition, background_of, is_of_labels
from controlkit.controls.control import Control
from controlkit.controls.inputs import Input
from controlkit.errors import UserError
from controlkit.images import decode_rgb, is_flat, read_bytes, resize_cover, sequence_note
from controlkit.sampling.inputs import Kind, check_keys, images_of, parameters_of
from controlkit.sampling.request import GenerateRequest
from controlkit.sampling.uses import ControlUse


@dataclass(frozen=True)
class Frame:
    """The size of what is sampled, and the part of images that it shows."""

    width: int
    height: int
    """Both in pixels."""
    full: tuple[int, int] | None = None
    """Width and height of the image that `region` is a part of."""
    region: tuple[int, int, int, int] | None = None
    """Left, top, right and bottom in pixels of that image. None is all of it."""

    @property
    def part(self) -> tuple[float, float, float, float] | None:
        """Left, top, right and bottom of the region in fractions of the whole image; None if it is all of it."""
        if self.region is None:
            return None
        width, height = self.covered
        left, top, right, bottom = self.region
        return left / width, top / height, right / width, bottom / height

    @property
    def covered(self) -> tuple[int, int]:
        """The size that images are scaled to cover."""
        return self.full or (self.width, self.height)

    def __call__(self, image: Image.Image, *, nearest: bool = False) -> Image.Image:
        """Scale an image to cover the whole size, crop it at the centre, and take the region, as diffusers does.

        Args:
            nearest: nearest-neighbour resampling, for maps whose colours are labels.
        """
        image = resize_cover(image, *self.covered, nearest=nearest)
        if self.region is None:
            return image
        from diffusers.image_processor import VaeImageProcessor

        processor = VaeImageProcessor(resample="nearest" if nearest else "lanczos")
        return processor.resize(image.crop(self.region), self.height, self.width, resize_mode="fill")


@dataclass(frozen=True)
class ImageFile:
    """An image or mask, as read from its file."""

    path: str
    data: bytes
    """Content of the file."""
    image: Image.Image
    """Upright, RGB."""

    @classmethod
    def read(
        cls, path: str, background: tuple[int, int, int] = WHITE, given: Mapping[str, bytes] = MappingProxyType({})
    ) -> ImageFile:
        """Read an image; where it is transparent, it shows `background`.

        Args:
            given: content of files in memory, by path.

        Raises:
            UserError: the file is missing, damaged or not an image.
        """
        data = given[path] if path in given else read_bytes(path)
        return cls(path, data, decode_rgb(data, path, background))

    @classmethod
    def read_mask(cls, path: str | None, given: Mapping[str, bytes] = MappingProxyType({})) -> ImageFile | None:
        """Read a mask, if there is one; black where it is transparent.

        Raises:
            UserError: as `read`.
        """
        return None if path is None else cls.read(path, BLACK, given)

    @property
    def sha256(self) -> str:
        """Hex SHA-256 of the file."""
        return hashlib.sha256(self.data).hexdigest()

    def grey(self, frame: Frame) -> Image.Image:
        """As grey levels, of what `frame` shows."""
        return frame(self.image).convert("L")


@dataclass(frozen=True)
class ControlImage:
    """An image input of a control, as read from its file."""

    use: ControlUse
    input: Input
    file: ImageFile
    """Decoded as a photo: transparent over white."""

    @classmethod
    def read(cls, use: ControlUse, kind: Kind, given: Mapping[str, bytes]) -> list[ControlImage]:
        """Read all images of a control.

        Raises:
            UserError: a file is missing, damaged or not an image.
        """
        known = {each.name: each for each in kind.inputs}
        return [cls(use, known[name], ImageFile.read(path, given=given)) for name, path in images_of(use, kind).items()]

    def condition_image(self, control: Control, frame: Frame) -> Image.Image:
        """The condition image for `control`, of what `frame` shows.

        Raises:
            UserError: the control records no condition, and the image is not `prepared`.
        """
        condition, use = self.condition(control), self.use
        if not use.prepared:
            if condition is None:
                raise UserError(
                    f"{use.control} records no condition; compute the condition image with `controlkit condition` and"
                    " pass it with --prepared",
                    "missing-setting",
                )
            image = frame(self.file.image)
            parameters = parameters_of(use, self.input.name)
            check_keys(parameters, condition, control)
            return Image.fromarray(conditions.find(condition)(np.asarray(image), **parameters))
        background, image = background_of(condition), self.file.image
        if background != Condition.background:
            image = decode_rgb(self.file.data, self.file.path, background)
        return frame(image, nearest=is_of_labels(condition))

    def flat_note(self, control: Control, condition_image: Image.Image) -> list[str]:
        """A note if the condition image is one flat colour."""
        if not is_flat(np.asarray(condition_image)):
            return []
        if self.use.prepared:
            what = f"{self.file.path}, the condition image of {self.use.control},"
            why = "check its polarity and transparency, or drop --prepared if it is a photo"
        else:
            what, why = f"{self.condition(control)} of {self.file.path}", "nothing was detected in the image"
        return [f"{what} is one flat colour: {why}"]

    def condition(self, control: Control) -> str | None:
        """The condition of the input, or else of the control."""
        return self.input.condition or control.condition


@dataclass(frozen=True)
class RequestImages:
    """All images and masks of a request."""

    start: ImageFile | None
    """The image that sampling starts from; `start_mask` is its mask."""
    start_mask: ImageFile | None
    controls: Sequence[Sequence[ControlImage]]
    """The images of each control."""
    masks: Sequence[ImageFile | None]
    """The mask of each control."""

    @classmethod
    def read(cls, request: GenerateRequest, kinds: Sequence[Kind], given: Mapping[str, bytes]) -> RequestImages:
        """Read them.

        Args:
            request: with named inputs.
            kinds: the systems of its controls.
            given: content of files in memory, by path.

        Raises:
            UserError: a file is missing, damaged or not an image.
        """
        uses = request.controls
        return cls(
            controls=[ControlImage.read(use, kind, given) for use, kind in zip(uses, kinds, strict=True)],
            masks=[ImageFile.read_mask(use.mask, given) for use in uses],
            start=None if request.image is None else ImageFile.read(request.image, given=given),
            start_mask=ImageFile.read_mask(request.mask, given),
        )

    def notes(self, frame: Frame) -> list[str]:
        """Notes on images of several frames and on crops."""
        files = [*(each.file for each in chain(*self.controls)), *self.masks, self.start, self.start_mask]
        read = [file for file in files if file is not None]
        return [note for file in read for note in (*sequence_note(file.data, file.path), *_crop_note(file, frame))]

    def start_hashes(self) -> dict[str, str]:
        """SHA-256 of the `image` and `mask` that sampling starts from, as far as there are any."""
        files = {"image": self.start, "mask": self.start_mask}
        return {name: file.sha256 for name, file in files.items() if file is not None}

    def control_hashes(self, use: ControlUse, index: int) -> dict[str, Any]:
        """SHA-256 of the images and the mask of the control at `index`, which `use` is."""
        hashes = {each.input.name: {"image": each.file.sha256} for each in self.controls[index]}
        of_control: dict[str, Any] = next(iter(hashes.values())) if use.inputs is None else {"inputs": hashes}
        mask = self.masks[index]
        return of_control if mask is None else {**of_control, "mask": mask.sha256}


def _crop_note(file: ImageFile, frame: Frame) -> list[str]:
    """A note if scaling and cropping to the size of the result cuts a pixel or more off an image."""
    image, (width, height) = file.image, frame.covered
    factor = max(width / image.width, height / image.height)
    across, down = image.width * factor - width, image.height * factor - height
    if max(across, down) < 1:
        return []
    where = "at the sides" if across > down else "at the top and bottom"
    return [
        f"{file.path} is {image.width} x {image.height}; scaled to cover {width} x {height}, it is cropped {where}."
        " Choose a width and height of its aspect ratio, or crop it yourself"
    ]
