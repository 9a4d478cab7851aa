"""A request -> pictures, with their settings in them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from controlkit import conditions
from controlkit._version import __version__
from controlkit.bases.base import Base
from controlkit.bases.load import PRECISIONS, choose_device, choose_dtype, load_base
from controlkit.conditions.condition import Condition, background_of
from controlkit.controls.control import Control
from controlkit.errors import UserError
from controlkit.files import writable_folder, write_json
from controlkit.formats.load import load_control
from controlkit.images import decode_rgb, read_bytes, resize_cover, sequence_note, to_images, to_tensor, write_png
from controlkit.sampling.cache import ResidualCache
from controlkit.sampling.identity import base_sha256, companion_sha256, control_sha256, pixels_sha256
from controlkit.sampling.notes import crop_note, flat_note, request_notes
from controlkit.sampling.plan import ActiveControl
from controlkit.sampling.request import ControlUse, GenerateRequest
from controlkit.sampling.sampler import sample


@dataclass(frozen=True)
class Picture:
    """One picture that was drawn."""

    image: Image.Image
    seed: int


@dataclass
class Generation:
    """What a request gave."""

    request: GenerateRequest
    pictures: list[Picture] = field(default_factory=list)
    conditions: list[Image.Image] = field(default_factory=list)
    """The condition image of each control, in the order of the request."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Where the time went."""
    used: dict[str, Any] = field(default_factory=dict)
    """What the request leaves open, as it was: `device`, `precision`, `width` and `height` in pixels, `guidance`."""
    sha256: dict[str, Any] = field(default_factory=dict)
    """Of the files that were read, in hex: `base`, and for each of `controls` its `image`, `control`, `companion`
    (what an adapter of CtrLoRA found) and `condition` (the pixels of the condition image). None for a base, and left
    out for controls, that were loaded by the caller."""
    notes: list[str] = field(default_factory=list)
    """What a person should know about it."""

    def save(self, folder: str | Path) -> list[Path]:
        """Write the pictures, the condition images and the settings into `folder`; returns the pictures' paths.

        Each PNG carries what draws it again (`sampling.drawn.read_drawn`), in its text chunk `controlkit`.
        """
        folder = writable_folder(folder)
        settings = {
            "controlkit": __version__,
            "request": self.request.to_json(),
            "used": self.used,
            "sha256": self.sha256,
        }
        paths = []
        for picture in self.pictures:
            path = folder / f"seed{picture.seed}.png"
            own = dataclasses.replace(self.request, seeds=(picture.seed,)).to_json()
            text = json.dumps({**settings, "request": own})
            write_png(path, picture.image, {"controlkit": text, "prompt": self.request.prompt})
            paths.append(path)
        for index, image in enumerate(self.conditions):
            write_png(folder / f"condition{index}.png", image)
        write_json(folder / "settings.json", settings)
        return paths


def generate(
    request: GenerateRequest,
    *,
    base: Base | None = None,
    controls: Sequence[Control] | None = None,
    cache: ResidualCache | None = None,
) -> Generation:
    """Draw what `request` asks for.

    Args:
        base: one that is loaded already; else the request's is loaded.
        controls: loaded already, in the order of the request's.
        cache: keeps what does not depend on the noise for the next request under the same condition.

    Raises:
        UserError: something that the request names cannot be used; nothing was drawn.
    """
    made = Generation(request)
    with _timed(made, "load"):
        # Pictures first: a wrong path should not cost the loading of a model.
        files = [read_bytes(use.image) for use in request.controls]
        images = [decode_rgb(data, use.image) for use, data in zip(request.controls, files, strict=True)]
        made.sha256 = {"base": None, "controls": [{"image": hashlib.sha256(data).hexdigest()} for data in files]}
        if base is None:
            device = choose_device(request.device)
            base = load_base(request.base, device=device, dtype=choose_dtype(request.precision, device))
            made.sha256["base"] = base_sha256(request.base)
        width, height = request.width or base.size, request.height or base.size
        base.check_size(width, height)
        made.used = {
            "device": str(base.device),
            "precision": next((name for name, dtype in PRECISIONS.items() if dtype == base.dtype), str(base.dtype)),
            "width": width,
            "height": height,
            "guidance": base.default_guidance if request.guidance is None else request.guidance,
            "mode": base.default_mode,
        }
        if controls is None:
            shared: dict[str, Control] = {}
            controls = [load_control(use.control, base, shared=shared) for use in request.controls]
            for use, control, told in zip(request.controls, controls, made.sha256["controls"], strict=True):
                told["control"] = control_sha256(use.control)
                told["companion"] = companion_sha256(control, shared)
    made.notes += request_notes(request, base, width, height)
    for use, image, data in zip(request.controls, images, files, strict=True):
        made.notes += [*sequence_note(data, use.image), *crop_note(use, image, width, height)]
    with _timed(made, "condition"):
        uses = []
        for index, (use, control, image) in enumerate(zip(request.controls, controls, images, strict=True)):
            labels = use.prepared and _is_of_labels(control)
            background = background_of(control.condition)
            if use.prepared and background != Condition.background:
                image = decode_rgb(files[index], use.image, background)
            condition_image = prepare_condition(use, control, resize_cover(image, width, height, nearest=labels))
            made.conditions.append(condition_image)
            made.sha256["controls"][index]["condition"] = pixels_sha256(condition_image)
            made.notes += flat_note(use, control, condition_image)
            hint = control.encode(to_tensor([condition_image]).to(base.device), base)
            uses.append(
                ActiveControl.in_mode(
                    use.mode, base, control=control, hint=hint, weight=use.weight, start=use.start, end=use.end
                )
            )
    with _timed(made, "sample"):
        batches = sample(
            base,
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            uses=uses,
            seeds=request.seeds,
            steps=request.steps,
            guidance=request.guidance,
            sampler=request.sampler,
            width=width,
            height=height,
            batch_size=request.batch_size,
            cache=cache,
        )
        images_made = [image for batch in batches for image in to_images(batch)]
    made.pictures = [Picture(image, seed) for image, seed in zip(images_made, request.seeds, strict=True)]
    return made


def prepare_condition(use: ControlUse, control: Control, image: Image.Image) -> Image.Image:
    """`image` as the condition image that `control` expects.

    Raises:
        UserError: the control's file does not say which condition it follows, and the image is not prepared.
    """
    if use.prepared:
        return image
    if control.condition is None:
        raise UserError(
            f"the file {use.control} does not say which condition it follows; make the condition image with"
            " `controlkit condition` and give it with --prepared"
        )
    return Image.fromarray(conditions.find(control.condition)(np.asarray(image)))


def refuse_overwriting(request: GenerateRequest, folder: str | Path) -> None:
    """Refuse a folder in which the pictures of `request` would take the place of one that it is given.

    Raises:
        UserError: they would.
    """
    names = [f"seed{seed}.png" for seed in request.seeds]
    names += [f"condition{index}.png" for index in range(len(request.controls))]
    for path in (Path(folder) / name for name in names):
        for use in request.controls:
            if path.exists() and os.path.exists(use.image) and path.samefile(use.image):
                raise UserError(
                    f"{path} would be written over, and it is the picture given to {use.control}; give another folder"
                )


def _is_of_labels(control: Control) -> bool:
    """Whether the colours of its condition's images are labels, which must not be mixed."""
    with suppress(UserError):  # files of others may name a condition that is not known here
        return control.condition is not None and conditions.find(control.condition).resize == "nearest"
    return False


@contextmanager
def _timed(made: Generation, name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    made.seconds[name] = time.perf_counter() - start
