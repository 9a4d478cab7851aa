"""A request -> images, with their settings in them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from PIL import Image

from controlkit._version import __version__
from controlkit.bases.base import Base
from controlkit.bases.load import PRECISIONS, choose_device, choose_dtype, load_base
from controlkit.controls.control import Control
from controlkit.controls.hints import Hint
from controlkit.errors import UserError
from controlkit.files import writable_folder, write_json
from controlkit.formats.load import control_class, load_control
from controlkit.images import sequence_note, to_images, to_tensor, write_png
from controlkit.sampling.identity import base_sha256, companion_sha256, control_sha256, pixels_sha256
from controlkit.sampling.inputs import Kind, ReadImage, values_of, with_named_inputs
from controlkit.sampling.notes import crop_note, flat_note, request_notes
from controlkit.sampling.plan import ActiveControl
from controlkit.sampling.request import ControlUse, GenerateRequest, condition_name
from controlkit.sampling.residual_cache import ResidualCache
from controlkit.sampling.sampler import sample


@dataclass(frozen=True)
class GeneratedImage:
    """One image that was drawn."""

    image: Image.Image
    seed: int


@dataclass
class Generation:
    """What a request gave."""

    request: GenerateRequest
    images: list[GeneratedImage] = field(default_factory=list)
    conditions: dict[str, Image.Image] = field(default_factory=dict)
    """The condition images of each control, in the order of the request, by the names that `save` gives their files:
    `condition0`, or `condition1-canny` for the input `canny` of a control with inputs by name."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Where the time went."""
    used: dict[str, Any] = field(default_factory=dict)
    """What the request leaves open, as it was: `device`, `precision`, `width` and `height` in pixels, `guidance`,
    `sampler`."""
    sha256: dict[str, Any] = field(default_factory=dict)
    """Of the files that were read, in hex: `base`, and for each of `controls` its `image`, `control`, `companion`
    (the control that it found beside it) and `condition` (the pixels of the condition image). None for a base, and left
    out for controls, that were loaded by the caller. Where inputs have names, `image` and `condition` stand under
    `inputs` and their names."""
    notes: list[str] = field(default_factory=list)
    """What a person should know about it."""

    def save(self, folder: str | Path) -> list[Path]:
        """Write the images, the condition images and the settings into `folder`; returns the images' paths.

        Each PNG carries what draws it again (`sampling.drawn.read_settings`), in its text chunk `controlkit`.
        """
        folder = writable_folder(folder)
        settings = {
            "controlkit": __version__,
            "request": self.request.to_json(),
            "used": self.used,
            "sha256": self.sha256,
        }
        paths = []
        for drawn in self.images:
            path = folder / f"seed{drawn.seed}.png"
            own = dataclasses.replace(self.request, seeds=(drawn.seed,)).to_json()
            text = json.dumps({**settings, "request": own})
            write_png(path, drawn.image, {"controlkit": text, "prompt": self.request.prompt})
            paths.append(path)
        for name, condition in self.conditions.items():
            write_png(folder / f"{name}.png", condition)
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
        # Inputs first: a wrong path should not cost the loading of a model.
        kinds: Sequence[Kind] = controls or [control_class(use.control) for use in request.controls]
        made.request = request = with_named_inputs(request, kinds)
        images = [ReadImage.read(use, kind) for use, kind in zip(request.controls, kinds, strict=True)]
        hashes = [_hashes(use, own) for use, own in zip(request.controls, images, strict=True)]
        made.sha256 = {"base": None, "controls": hashes}
        if base is None:
            device = choose_device(request.device)
            text_device = None if request.text_device is None else choose_device(request.text_device)
            dtype = choose_dtype(request.precision, device)
            base = load_base(request.base, device=device, dtype=dtype, text_device=text_device)
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
            "sampler": request.sampler or base.default_sampler,
        }
        if controls is None:
            shared: dict[str, Control] = {}
            controls = [load_control(use.control, base, shared=shared) for use in request.controls]
            for use, control, told in zip(request.controls, controls, made.sha256["controls"], strict=True):
                told["control"] = control_sha256(use.control)
                told["companion"] = companion_sha256(control, shared)
    made.notes += request_notes(request, base, width, height)
    made.notes += [
        note
        for image in chain(*images)
        for note in (*sequence_note(image.data, image.path), *crop_note(image.path, image.image, width, height))
    ]
    with _timed(made, "condition"):
        uses = [
            ActiveControl.in_mode(
                use.mode,
                base,
                control=control,
                hint=_hint(made, index, control, images[index], base),
                weight=use.weight,
                start=use.start,
                end=use.end,
            )
            for index, (use, control) in enumerate(zip(request.controls, controls, strict=True))
        ]
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
    made.images = [GeneratedImage(image, seed) for image, seed in zip(images_made, request.seeds, strict=True)]
    return made


def _hashes(use: ControlUse, images: Sequence[ReadImage]) -> dict[str, Any]:
    """SHA-256 of the images of a use."""
    made = {one.input.name: {"image": hashlib.sha256(one.data).hexdigest()} for one in images}
    return next(iter(made.values())) if use.inputs is None else {"inputs": made}


def _hint(made: Generation, index: int, control: Control, images: Sequence[ReadImage], base: Base) -> Hint:
    """What a control encodes of its inputs; its condition images and what there is to say of them go into `made`."""
    use, told = made.request.controls[index], made.sha256["controls"][index]
    inputs = values_of(use, control)
    for one in images:
        name = None if use.inputs is None else one.input.name
        image = one.condition_image(control, made.used["width"], made.used["height"])
        made.conditions[condition_name(index, name)] = image
        (told if name is None else told["inputs"][name])["condition"] = pixels_sha256(image)
        made.notes += flat_note(one, control, image)
        inputs[one.input.name] = to_tensor([image]).to(base.device)
    if len(control.inputs) == 1 and images:
        return control.encode(inputs[images[0].input.name], base)
    return control.encode(inputs, base)


def refuse_overwriting(request: GenerateRequest, folder: str | Path) -> None:
    """Refuse a folder in which the images of `request` would take the place of one that it is given.

    Args:
        request: of `with_named_inputs`.

    Raises:
        UserError: they would.
    """
    written = [f"seed{seed}" for seed in request.seeds]
    given = []
    for index, use in enumerate(request.controls):
        named = {None: use.image} if use.inputs is None else use.inputs
        written += [condition_name(index, name) for name in named]
        given += [(use.control, value) for value in named.values() if isinstance(value, str) and os.path.exists(value)]
    for path in (Path(folder) / f"{name}.png" for name in written):
        for control, image in given:
            if path.exists() and path.samefile(image):
                raise UserError(
                    f"{path} would be written over, and it is the image given to {control}; give another folder"
                )


@contextmanager
def _timed(made: Generation, name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    made.seconds[name] = time.perf_counter() - start
