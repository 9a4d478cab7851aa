"""Generate the images of a request."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from controlkit.bases.base import Base
from controlkit.bases.load import PRECISIONS, choose_device, choose_dtype, load_base
from controlkit.bases.prompt_encoding import TextOptions
from controlkit.controls.control import Control
from controlkit.controls.hints import Hint
from controlkit.formats.load import control_class, load_control
from controlkit.images import sequence_note, to_images, to_tensor
from controlkit.sampling.axes import expand_folders, points_of
from controlkit.sampling.canvas import Canvas
from controlkit.sampling.embeddings import embedding_file, embedding_notes, read_embeddings
from controlkit.sampling.file_names import HIRES_PREFIX, condition_name, mask_name
from controlkit.sampling.graphs import GraphReport, NetworkCalls
from controlkit.sampling.identity import (
    base_sha256,
    companion_sha256,
    control_sha256,
    file_sha256,
    pixels_sha256,
    vae_sha256,
)
from controlkit.sampling.inputs import (
    ControlImage,
    Frame,
    ImageFile,
    Kind,
    check_layers,
    values_of,
    with_named_inputs,
)
from controlkit.sampling.loras import lora_file, merged, read_lora
from controlkit.sampling.notes import crop_note, flat_note, prompt_notes, request_notes
from controlkit.sampling.passes import Pass, enlarged_size, hires_strength
from controlkit.sampling.plan import ActiveControl
from controlkit.sampling.prompts import find_captioner, first_prompt
from controlkit.sampling.request import ControlUse, GenerateRequest, check_spans
from controlkit.sampling.residual_cache import ResidualCache
from controlkit.sampling.sampler import sample_prompts
from controlkit.sampling.step import Step


@dataclass(frozen=True)
class GeneratedImage:
    """A generated image and its seed."""

    image: Image.Image
    seed: int


class Models:
    """The base and the controls of the last request, kept for the next one."""

    def __init__(self) -> None:
        self.shared: dict[str, Control] = {}
        """Companions of the controls, as `load_control` keeps them."""
        self._base: tuple[object, Base] | None = None
        self._controls: dict[tuple[int, str], Control] = {}

    def base(self, request: GenerateRequest) -> Base:
        """The base of a request."""
        key = base_key(request)
        if self._base is None or self._base[0] != key:
            self._base = None  # its memory is free before the next one is loaded
            self._controls, self.shared = {}, {}
            device = choose_device(request.device)
            text_device = None if request.text_device is None else choose_device(request.text_device)
            dtype = choose_dtype(request.precision, device)
            self._base = (
                key,
                load_base(request.base, device=device, dtype=dtype, text_device=text_device, vae=request.vae),
            )
        return self._base[1]

    def control(self, index: int, name: str, base: Base) -> Control:
        """The control at `index` of a request on `base`, the last one."""
        if (index, name) not in self._controls:
            self._controls[index, name] = load_control(name, base, shared=self.shared)
        return self._controls[index, name]

    def keep_only(self, request: GenerateRequest) -> None:
        """Forget all controls but those of `request`, and the companions that none of them has."""
        names = {(index, use.control) for index, use in enumerate(request.controls)}
        self._controls = {key: control for key, control in self._controls.items() if key in names}
        kept = {id(module) for control in self._controls.values() for module in control.modules()}
        self.shared = {name: control for name, control in self.shared.items() if id(control) in kept}


def base_key(request: GenerateRequest) -> tuple[object, ...]:
    """What decides how the base is loaded."""
    return request.base, request.device, request.text_device, request.precision, request.vae


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
    `image`, `mask`, `control`, `companion` (such as the base control of an adapter) and `condition` (the pixels of the
    condition image, of the first pass). None for a base, and left out for a VAE and controls, that the caller loaded.
    `image` and `condition` of named inputs are under `inputs` and their names. `image` and `mask` are of the files that
    sampling starts from."""
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
        """
        from controlkit.sampling.image_folder import ImageFolder

        return ImageFolder(folder).finish(self)


def generate(
    request: GenerateRequest,
    *,
    base: Base | None = None,
    controls: Sequence[Control] | None = None,
    cache: ResidualCache | None = None,
    on_step: Callable[[Step], object] | None = None,
    on_images: Callable[[Generation], object] | None = None,
) -> Generation:
    """Generate the images of `request`.

    Args:
        base: a loaded base; default: load that of the request.
        controls: loaded controls, in the order of the request's.
        cache: keeps residuals that do not depend on the noise, for the next request under the same condition.
        on_step: called after every denoising step, for progress and previews. An exception that it raises cancels the
            request.
        on_images: called with the generation after every batch of images, to save or show what is done so far.

    Raises:
        UserError: an image, control, base or setting cannot be used.
    """
    request = expand_folders(request)
    if base is None and controls is None:
        check_layers(point.request for point in points_of(request))
    if request.vary or request.xy:
        from controlkit.sampling.varied import generate_varied

        return generate_varied(request, base=base, controls=controls, cache=cache, on_step=on_step, on_images=on_images)
    return generate_one(
        request, base=base, controls=controls, cache=cache, on_step=on_step, on_images=on_images, models=Models()
    )


def generate_one(
    request: GenerateRequest,
    *,
    base: Base | None,
    controls: Sequence[Control] | None,
    cache: ResidualCache | None,
    on_step: Callable[[Step], object] | None,
    on_images: Callable[[Generation], object] | None,
    models: Models,
) -> Generation:
    """`generate` for a request without axes; `models` keeps what is loaded for the next one."""
    generation = Generation(request)
    with _timed(generation, "load"):
        # Inputs first: a wrong path should not cost the loading of a model.
        kinds: Sequence[Kind] = controls or [control_class(use.control) for use in request.controls]
        generation.request = request = with_named_inputs(request, kinds)
        images = [ControlImage.read(use, kind) for use, kind in zip(request.controls, kinds, strict=True)]
        masks = [ImageFile.read_mask(use.mask) for use in request.controls]
        start_file = None if request.image is None else ImageFile.read(request.image)
        start_mask = ImageFile.read_mask(request.mask)
        hashes = [_hashes(*each) for each in zip(request.controls, images, masks, strict=True)]
        lora_hashes = [file_sha256(lora_file(use.file)) for use in request.loras]
        started = {"image": start_file, "mask": start_mask}
        generation.sha256 = {"base": None, "controls": hashes, **_file_hashes(request, lora_hashes, started)}
        if base is None:
            base = models.base(request)
            generation.sha256 |= _base_hashes(request)
        width, height = request.width or base.size, request.height or base.size
        base.check_size(width, height)
        larger = None if request.hires is None else enlarged_size(request, base, width, height)
        canvas = None if start_file is None else Canvas.of(request, start_file, start_mask, width, height)
        frame = Frame(width, height) if canvas is None else canvas.frame
        prompt = first_prompt(request.prompt_mode, request.prompt, base)
        captioner = find_captioner(request.captioner, base) if request.prompt_mode == "automatic" else None
        generation.used = _resolved(request, base, (width, height), larger)
        start = None if canvas is None else canvas.start(_strength(request))
        if canvas is not None and start is not None:
            check_spans(request.controls, request.steps - start.first_step(base, request.steps))
            generation.used["strength"] = _strength(request)
            made = {"image": canvas.image, "mask": canvas.mask}
            generation.start_images = {name: image for name, image in made.items() if image is not None}
        embeddings = read_embeddings(request.embeddings, base)
        text = TextOptions(syntax=request.prompt_syntax, clip_skip=request.clip_skip, embeddings=embeddings)
        loras = [(read_lora(use, base), use.weight) for use in request.loras]
        lora_key = [(sha256, use.weight) for sha256, use in zip(lora_hashes, request.loras, strict=True)]
        generation.notes += [note for lora, _ in loras for note in lora.notes]
        if request.prompt_mode != "given":
            generation.used["prompts"] = [prompt] * len(request.seeds)
        if controls is None:
            controls = [models.control(index, use.control, base) for index, use in enumerate(request.controls)]
            for use, control, sha256 in zip(request.controls, controls, hashes, strict=True):
                sha256["control"] = control_sha256(use.control)
                sha256["companion"] = companion_sha256(control, models.shared)
        controls = [
            control.with_values(values_of(use, control))
            for use, control in zip(request.controls, controls, strict=True)
        ]
    generation.notes += request_notes(request, base, width, height, embeddings)
    generation.notes += embedding_notes(embeddings, request)
    files = [*(image.file for image in chain(*images)), *masks, *started.values()]
    generation.notes += _file_notes(files, frame)
    with _timed(generation, "condition"):
        uses = _uses(generation, controls, images, masks, base, frame)
        strength = None if start is None else start.strength
        passes = [Pass(width=width, height=height, uses=uses, start=start, strength=strength)]
        if larger is not None:
            uses = _uses(generation, controls, images, masks, base, Frame(*larger), HIRES_PREFIX)
            passes.append(Pass(width=larger[0], height=larger[1], uses=uses, strength=hires_strength(request)))
        rounds = passes if captioner is None else [passes[0], *passes]
        lengths = [each.number_of_steps(base, request) for each in rounds]
    calls = NetworkCalls(base, request.graphs, low_memory=request.low_memory)
    generation.graphs = calls.report

    def draw(phase: str, prompts: Sequence[str], turn: int) -> None:
        """Draw one image per seed, in the round `turn`."""
        here, before = rounds[turn], sum(lengths[:turn])
        batches = sample_prompts(
            base,
            prompts=prompts,
            negative_prompt=request.negative_prompt,
            uses=here.uses,
            seeds=request.seeds,
            steps=request.steps,
            guidance=request.guidance,
            sampler=request.sampler,
            width=here.width,
            height=here.height,
            batch_size=request.batch_size,
            start=here.start,
            text=text,
            cache=cache,
            low_memory=request.low_memory,
            calls=calls,
            on_step=None if on_step is None else lambda step: on_step(step.among(before, sum(lengths))),
        )
        made: list[GeneratedImage] = []
        with _timed(generation, phase), merged(base, loras, lora_key), base.tiling(request.tiled):
            for batch in batches:
                finished = [image if canvas is None else canvas.finished(image) for image in to_images(batch)]
                made += map(GeneratedImage, finished, request.seeds[len(made) :])
                if on_images is not None and turn == len(rounds) - 1:
                    generation.images = made
                    on_images(generation)
        generation.images = made

    prompts = [prompt]
    draw("sample", prompts, 0)
    if captioner is not None:
        generation.first_images, generation.images = generation.images, []
        with _timed(generation, "caption"):
            prompts = captioner([first.image for first in generation.first_images])
        generation.notes += prompt_notes(prompts, base, embeddings)
        generation.used["prompts"] = list(prompts)
        draw("sample again", prompts, 1)
    if larger is not None:
        rounds[-1] = rounds[-1].starting_from([small.image for small in generation.images])
        generation.images = []
        draw("sample enlarged", prompts, len(rounds) - 1)
    return generation


def _resolved(
    request: GenerateRequest, base: Base, size: tuple[int, int], larger: tuple[int, int] | None
) -> dict[str, Any]:
    """What the request leaves to the base.

    Args:
        size: width and height in pixels.
        larger: those of the second pass.
    """
    used = {
        "device": str(base.device),
        "precision": next((name for name, dtype in PRECISIONS.items() if dtype == base.dtype), str(base.dtype)),
        "width": size[0],
        "height": size[1],
        "guidance": base.default_guidance if request.guidance is None else request.guidance,
        "mode": base.default_mode,
        "sampler": request.sampler or base.default_sampler,
    }
    if larger is None:
        return used
    return {
        **used,
        "hires_width": larger[0],
        "hires_height": larger[1],
        "hires_strength": hires_strength(request),
    }


def _strength(request: GenerateRequest) -> float:
    """The strength of a request with an image; its defaults are those of diffusers' pipelines of Stable Diffusion."""
    if request.strength is not None:
        return request.strength
    return 0.8 if request.mask is None else 1.0


def _file_notes(files: Sequence[ImageFile | None], frame: Frame) -> list[str]:
    """Notes on images of several pages and on crops."""
    read = [file for file in files if file is not None]
    notes = [(*sequence_note(file.data, file.path), *crop_note(file.path, file.image, *frame.covered)) for file in read]
    return list(chain(*notes))


def _base_hashes(request: GenerateRequest) -> dict[str, Any]:
    """SHA-256 of the base and of the autoencoder in place of its own."""
    of_base = {"base": base_sha256(request.base)}
    return of_base if request.vae is None else {**of_base, "vae": vae_sha256(request.vae)}


def _file_hashes(request: GenerateRequest, loras: list[str], started: Mapping[str, ImageFile | None]) -> dict[str, Any]:
    """SHA-256 of embeddings, LoRAs and the files that sampling starts from, as far as there are any."""
    embeddings = [file_sha256(embedding_file(entry)[1]) for entry in request.embeddings]
    listed = {"embeddings": embeddings, "loras": loras}
    return {name: hashes for name, hashes in listed.items() if hashes} | {
        name: file.sha256 for name, file in started.items() if file is not None
    }


def _hashes(use: ControlUse, images: Sequence[ControlImage], mask: ImageFile | None) -> dict[str, Any]:
    """SHA-256 of the images and the mask of a control."""
    hashes = {each.input.name: {"image": each.file.sha256} for each in images}
    of_control: dict[str, Any] = next(iter(hashes.values())) if use.inputs is None else {"inputs": hashes}
    return of_control if mask is None else {**of_control, "mask": mask.sha256}


def _uses(
    generation: Generation,
    controls: Sequence[Control],
    images: Sequence[Sequence[ControlImage]],
    masks: Sequence[ImageFile | None],
    base: Base,
    frame: Frame,
    prefix: str = "",
) -> list[ActiveControl]:
    """The controls with their hints; `prefix` is of the stems of the images that are added to `generation`."""
    return [
        ActiveControl.in_mode(
            use.mode,
            base,
            control=control,
            hint=_hint(generation, index, control, images[index], base, frame, prefix),
            weight=use.weight,
            layers=use.layers,
            mask=_mask(generation, index, masks[index], frame, prefix),
            start=use.start,
            end=use.end,
        )
        for index, (use, control) in enumerate(zip(generation.request.controls, controls, strict=True))
    ]


def _hint(
    generation: Generation,
    index: int,
    control: Control,
    images: Sequence[ControlImage],
    base: Base,
    frame: Frame,
    prefix: str,
) -> Hint:
    """The hint of a control; adds its condition images, and those of the first pass's hashes and notes on them, to
    `generation`."""
    use, hashes = generation.request.controls[index], generation.sha256["controls"][index]
    inputs = values_of(use, control)
    for source in images:
        name = None if use.inputs is None else source.input.name
        image = source.condition_image(control, frame)
        generation.conditions[prefix + condition_name(index, name)] = image
        if not prefix:
            (hashes if name is None else hashes["inputs"][name])["condition"] = pixels_sha256(image)
            generation.notes += flat_note(source, control, image)
        inputs[source.input.name] = to_tensor([image]).to(base.device)
    if len(control.inputs) == 1 and images:
        return control.encode(inputs[images[0].input.name], base)
    return control.encode(inputs, base)


def _mask(generation: Generation, index: int, mask: ImageFile | None, frame: Frame, prefix: str) -> Tensor | None:
    """The mask of a control `[1, 1, H, W]` in [0, 1], which is added to `generation`."""
    if mask is None:
        return None
    grey = mask.grey(frame)
    generation.masks[prefix + mask_name(index)] = grey
    return torch.from_numpy(np.asarray(grey, dtype=np.float32) / 255)[None, None]


@contextmanager
def _timed(generation: Generation, name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    generation.seconds[name] = time.perf_counter() - start
