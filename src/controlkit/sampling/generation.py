"""The result of a request: images, condition images, and what was used to make them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from controlkit.sampling.graphs import GraphReport
from controlkit.sampling.request import GenerateRequest


@dataclass(frozen=True)
class GeneratedImage:
    """A generated image and its seed."""

    image: Image.Image
    seed: int


@dataclass
class Generation:
    """The result of a request."""

    request: GenerateRequest
    """As it was used: with named inputs and images of folders."""
    images: list[GeneratedImage] = field(default_factory=list)
    conditions: dict[str, Image.Image] = field(default_factory=dict)
    """Condition images in the order of the request's controls, by the stem of their files: `condition0`, or
    `condition1-canny` for the named input `canny`."""
    masks: dict[str, Image.Image] = field(default_factory=dict)
    """Masks of the controls that have one, grey, by the stem of their files: `mask0`."""
    start_images: dict[str, Image.Image] = field(default_factory=dict)
    """The `image` and `mask` that sampling starts from, before blur, by the stem of their files."""
    first_images: list[GeneratedImage] = field(default_factory=list)
    """In prompt mode `automatic`, the images from which the prompts were made, one per seed."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall-clock time of each phase."""
    used: dict[str, Any] = field(default_factory=dict)
    """Resolved values of what the request leaves open: `device`, `precision`, `width` and `height` in pixels,
    `guidance`, `mode`, `sampler`; `strength` with an image to start from; `hires_width`, `hires_height` and
    `hires_strength` with a second pass; unless the prompt is given, `prompts`, one
    per seed."""
    sha256: dict[str, Any] = field(default_factory=dict)
    """Hex SHA-256 of the files read: `base`, `vae`, each of `embeddings` and `loras`, and for each of `controls` its
    `image`, `mask`, `control`, `companion` (such as the base control of an adapter), `condition` and `mask_pixels` (the
    pixels of the condition image and mask as saved, of the first pass). None for a base, and left out for a VAE and
    controls, that the caller loaded. `image` and `condition` of named inputs are under `inputs` and their names.
    `image` and `mask` are of the files that sampling starts from, `image_pixels` and `mask_pixels` of their
    `start_images`."""
    notes: list[str] = field(default_factory=list)
    """Remarks for the user, such as a cropped image or a cut prompt."""
    graphs: GraphReport = field(default_factory=GraphReport)
    """How the networks were called: as CUDA graphs or eagerly, and why."""
    name: str = ""
    """Beginning of its file names, for one combination of a request with axes."""
    parts: list[Generation] = field(default_factory=list)
    """Of a request with axes, the result of each combination that has images; `images` are those of all, `used` has
    what all share, and condition images, masks and hashes are found in the parts."""

    def save(self, folder: str | Path) -> list[Path]:
        """Write images, condition images, sheets and `settings.json` into `folder`; returns the paths of the images.

        Each PNG stores its settings in the text chunk `controlkit`, which `read_settings` reads.

        Raises:
            UserError: an image would replace one that the request reads.
        """
        from controlkit.sampling.image_folder import ImageFolder, refuse_overwriting

        refuse_overwriting(self.request, folder)
        return ImageFolder(folder).finish(self)
