"""The image and mask of a request: scaled and cropped for sampling, and put back around what was sampled."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageFilter

from controlkit.errors import UserError
from controlkit.images import resize_cover, to_tensor
from controlkit.sampling.input_images import Frame, ImageFile
from controlkit.sampling.request import GenerateRequest
from controlkit.sampling.start_image import StartImage


@dataclass(frozen=True)
class Canvas:
    """The image that a request starts from, and what it does with a sampled one."""

    frame: Frame
    """How this and other images of the request become those that are sampled."""
    image: Image.Image
    """RGB, of the size of the results."""
    mask: Image.Image | None
    """Grey, of that size, not blurred."""
    blur: float = 0.0
    """Standard deviation of the blur of the mask in pixels."""

    @classmethod
    def of(cls, request: GenerateRequest, image: ImageFile, mask: ImageFile | None, width: int, height: int) -> Canvas:
        """Scale the image and mask of a request.

        Args:
            width: of what is sampled, in pixels.

        Raises:
            UserError: the mask does not fit the image, or is black.
        """
        if mask is None:
            return cls(Frame(width, height), resize_cover(image.image, width, height), None)
        of_image, of_mask = image.image.size, mask.image.size
        if abs(of_mask[0] * of_image[1] / of_mask[1] - of_image[0]) > 1:
            raise UserError(
                f"mask {mask.path} is {of_mask[0]} x {of_mask[1]}, and image {image.path} {of_image[0]} x"
                f" {of_image[1]}; make the mask of the image's size",
                "wrong-size",
            )
        if request.only_masked is None:
            scaled = mask.grey(Frame(width, height))
            return cls(Frame(width, height), resize_cover(image.image, width, height), scaled, request.mask_blur)
        canvas = cls(Frame(*of_image), image.image, mask.grey(Frame(*of_image)), request.mask_blur)
        soft = canvas.soft_mask
        if soft is None or soft.getbbox() is None:
            raise UserError(f"mask {mask.path} is black everywhere; paint white what is to be replaced", "out-of-range")
        region = VaeImageProcessor.get_crop_region(soft, width, height, pad=request.only_masked)
        return cls(Frame(width, height, of_image, region), canvas.image, canvas.mask, canvas.blur)

    @property
    def soft_mask(self) -> Image.Image | None:
        """The mask, blurred."""
        if self.mask is None or not self.blur:
            return self.mask
        return self.mask.filter(ImageFilter.GaussianBlur(self.blur))

    def start(self, strength: float) -> StartImage:
        """What sampling starts from."""
        mask = None
        if (soft := self.soft_mask) is not None:
            grey = np.asarray(self._framed(soft).convert("L"), dtype=np.float32) / 255
            mask = torch.from_numpy(grey)[None, None]
        return StartImage(pixels=to_tensor([self._framed(self.image)]) * 2 - 1, strength=strength, mask=mask)

    def finished(self, sampled: Image.Image) -> Image.Image:
        """A sampled image with the original one outside the mask, blended where the mask is grey."""
        soft = self.soft_mask
        if soft is None:
            return sampled
        return VaeImageProcessor().apply_overlay(soft, self.image, sampled, self.frame.region)

    def _framed(self, image: Image.Image) -> Image.Image:
        """An image of the size of the results as it is sampled."""
        return image if self.frame.region is None else self.frame(image)
