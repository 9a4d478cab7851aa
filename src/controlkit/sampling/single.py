"""Generate the images of a request without axes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from controlkit.bases.base import Base
from controlkit.bases.devices import PRECISIONS
from controlkit.bases.prompt_encoding import TextOptions
from controlkit.controls.control import Control
from controlkit.formats.load import control_class
from controlkit.images import to_images
from controlkit.sampling.canvas import Canvas
from controlkit.sampling.conditioning import active_controls
from controlkit.sampling.embeddings import embedding_file, embedding_notes, read_embeddings
from controlkit.sampling.file_names import HIRES_PREFIX
from controlkit.sampling.generation import GeneratedImage, Generation
from controlkit.sampling.graphs import NetworkCalls
from controlkit.sampling.identity import (
    base_sha256,
    companion_sha256,
    control_sha256,
    file_sha256,
    pixels_sha256,
    vae_sha256,
)
from controlkit.sampling.input_images import Frame, RequestImages
from controlkit.sampling.inputs import Kind, values_of, with_named_inputs
from controlkit.sampling.loras import Lora, lora_file, merged, read_lora, replacement_notes
from controlkit.sampling.models import Models
from controlkit.sampling.notes import prompt_notes, request_notes
from controlkit.sampling.passes import Pass, enlarged_size, hires_strength
from controlkit.sampling.prompts import Captioner, find_captioner, first_prompt
from controlkit.sampling.request import GenerateRequest
from controlkit.sampling.residual_cache import ResidualCache
from controlkit.sampling.sampler import sample_prompts
from controlkit.sampling.start_image import first_step
from controlkit.sampling.step import Step
from controlkit.sampling.uses import check_spans


def generate_single(
    request: GenerateRequest,
    *,
    base: Base | None,
    controls: Sequence[Control] | None,
    given: Mapping[str, bytes],
    cache: ResidualCache | None,
    on_step: Callable[[Step], object] | None,
    on_images: Callable[[Generation], object] | None,
    models: Models,
) -> Generation:
    """`generate` for a request without axes.

    Args:
        given: content of files in memory, by the name that stands for each in the request.
        models: keeps what is loaded for the next request.
    """
    generation = Generation(request)
    with _timed(generation, "load"):
        loaded = _load(generation, base, controls, given, models)
    with _timed(generation, "condition"), loaded.base.tiling(request.tiled):
        passes = _passes(generation, loaded)
    draw = _Draw(generation, loaded, passes, cache, on_step, on_images)
    prompts = [loaded.prompt]
    draw("sample", prompts)
    if loaded.captioner is not None:
        generation.first_images, generation.images = generation.images, []
        with _timed(generation, "caption"):
            prompts = loaded.captioner([first.image for first in generation.first_images])
        generation.used["prompts"] = list(prompts)
        generation.notes += loaded.prompt_notes(prompts)
        draw("sample again", prompts)
    if request.hires is not None:
        draw("sample enlarged", prompts)
    return generation


@dataclass(frozen=True, kw_only=True)
class _Loaded:
    """The files and models of a request."""

    base: Base
    controls: Sequence[Control]
    images: RequestImages
    canvas: Canvas | None
    width: int
    height: int
    """Both of the first pass, in pixels."""
    larger: tuple[int, int] | None
    """Width and height of the second pass."""
    text: TextOptions
    loras: Sequence[tuple[Lora, float]]
    lora_key: Sequence[Any]
    """What identifies `loras`, in order."""
    prompt: str
    """Of the first images."""
    captioner: Captioner | None
    """Makes the prompts of the second images; None if there are none."""

    @property
    def frame(self) -> Frame:
        """The first pass."""
        return Frame(self.width, self.height) if self.canvas is None else self.canvas.frame

    def prompt_notes(self, prompts: Sequence[str]) -> list[str]:
        """Notes on prompts that are cut; weighted ones never are."""
        return prompt_notes(prompts, self.base, self.text.embeddings) if self.text.syntax == "plain" else []


def _load(
    generation: Generation,
    base: Base | None,
    controls: Sequence[Control] | None,
    given: Mapping[str, bytes],
    models: Models,
) -> _Loaded:
    """Read all files and load all models; adds hashes, resolved values and notes to `generation`."""
    request = generation.request
    # Inputs first: a wrong path should not cost the loading of a model.
    kinds: Sequence[Kind] = controls or [control_class(use.control) for use in request.controls]
    generation.request = request = with_named_inputs(request, kinds)
    images = RequestImages.read(request, kinds, given)
    lora_hashes = [file_sha256(lora_file(use.file)) for use in request.loras]
    generation.sha256 = _hashes(request, images, lora_hashes)
    if base is None:
        base = models.base(request)
        generation.sha256 |= _base_hashes(request)
    width, height = request.width or base.size, request.height or base.size
    base.check_size(width, height)
    larger = None if request.hires is None else enlarged_size(request, base, width, height)
    canvas = None if images.start is None else Canvas.of(request, images.start, images.start_mask, width, height)
    generation.used = _resolved(request, base, (width, height), larger)
    if canvas is not None:
        check_spans(request.controls, request.steps - first_step(base, request.steps, _strength(request)))
        generation.used["strength"] = _strength(request)
        made = {"image": canvas.image, "mask": canvas.mask}
        generation.start_images = {name: image for name, image in made.items() if image is not None}
        generation.sha256 |= {f"{name}_pixels": pixels_sha256(image) for name, image in generation.start_images.items()}
    embeddings = read_embeddings(request.embeddings, base)
    loras = [(read_lora(use, base), use.weight) for use in request.loras]
    prompt = first_prompt(request.prompt_mode, request.prompt, base)
    captioner = find_captioner(request.captioner, base) if request.prompt_mode == "automatic" else None
    if request.prompt_mode != "given":
        generation.used["prompts"] = [prompt] * len(request.seeds)
    controls = _load_controls(generation, base, models) if controls is None else controls
    loaded = _Loaded(
        base=base,
        controls=_with_values(request, controls),
        images=images,
        canvas=canvas,
        width=width,
        height=height,
        larger=larger,
        text=TextOptions(syntax=request.prompt_syntax, clip_skip=request.clip_skip, embeddings=embeddings),
        loras=loras,
        lora_key=[(sha256, use.weight) for sha256, use in zip(lora_hashes, request.loras, strict=True)],
        prompt=prompt,
        captioner=captioner,
    )
    generation.notes += [note for lora, _ in loras for note in lora.notes]
    named = [(use.file, lora) for use, (lora, _) in zip(request.loras, loras, strict=True)]
    acting = [(use.control, each) for use, each in zip(request.controls, controls, strict=True) if use.weight]
    generation.notes += replacement_notes(named, acting, base)
    generation.notes += request_notes(request, base, width, height, embeddings)
    generation.notes += embedding_notes(embeddings, request)
    generation.notes += images.notes(loaded.frame)
    return loaded


def _load_controls(generation: Generation, base: Base, models: Models) -> list[Control]:
    """The controls of the request; adds their hashes to `generation`."""
    uses = generation.request.controls
    controls = [models.control(index, use.control, base) for index, use in enumerate(uses)]
    for use, control, sha256 in zip(uses, controls, generation.sha256["controls"], strict=True):
        sha256["control"] = control_sha256(use.control)
        sha256["companion"] = companion_sha256(control, models.shared)
    return controls


def _with_values(request: GenerateRequest, controls: Sequence[Control]) -> list[Control]:
    """The controls with the inputs of `request` that are no images."""
    return [
        control.with_values(values_of(use, control)) for use, control in zip(request.controls, controls, strict=True)
    ]


def _passes(generation: Generation, loaded: _Loaded) -> list[Pass]:
    """The first pass, and the second if there is one; adds condition images to `generation`."""
    request, base, images = generation.request, loaded.base, loaded.images
    start = None if loaded.canvas is None else loaded.canvas.start(_strength(request))
    uses = active_controls(generation, loaded.controls, images, base, loaded.frame)
    strength = None if start is None else start.strength
    passes = [Pass(width=loaded.width, height=loaded.height, uses=uses, start=start, strength=strength)]
    if loaded.larger is not None:
        width, height = loaded.larger
        uses = active_controls(generation, loaded.controls, images, base, Frame(width, height), HIRES_PREFIX)
        passes.append(Pass(width=width, height=height, uses=uses, strength=hires_strength(request)))
    return passes


class _Draw:
    """Draws one image per seed at each call, in one round after another.

    Args:
        generation: gets the images, the times of the rounds, and the report on graphs.
    """

    def __init__(
        self,
        generation: Generation,
        loaded: _Loaded,
        passes: Sequence[Pass],
        cache: ResidualCache | None,
        on_step: Callable[[Step], object] | None,
        on_images: Callable[[Generation], object] | None,
    ) -> None:
        request = generation.request
        self._generation, self._loaded, self._cache = generation, loaded, cache
        self._on_step, self._on_images = on_step, on_images
        self._rounds = list(passes) if loaded.captioner is None else [passes[0], *passes]
        self._lengths = [each.number_of_steps(loaded.base, request) for each in self._rounds]
        self._turn = 0
        self._calls = NetworkCalls(loaded.base, request.graphs, low_memory=request.low_memory)
        generation.graphs = self._calls.report

    def __call__(self, phase: str, prompts: Sequence[str]) -> None:
        """Draw the images of the next round; those of a second pass start from the images that are there.

        Args:
            phase: its name in `Generation.seconds`.
            prompts: one for all images, or one for each.
        """
        generation, loaded, request, turn = self._generation, self._loaded, self._generation.request, self._turn
        here, before, total = self._rounds[turn], sum(self._lengths[:turn]), sum(self._lengths)
        if here.start is None and here.strength is not None:
            here = here.starting_from([small.image for small in generation.images])
            generation.images = []
        on_step = self._on_step
        batches = sample_prompts(
            loaded.base,
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
            text=loaded.text,
            cache=self._cache,
            low_memory=request.low_memory,
            calls=self._calls,
            on_step=None if on_step is None else lambda step: on_step(step.among(before, total)),
        )
        self._turn += 1
        images: list[GeneratedImage] = []
        weights = merged(loaded.base, loaded.loras, loaded.lora_key)
        with _timed(generation, phase), weights, loaded.base.tiling(request.tiled):
            for batch in batches:
                made = to_images(batch)
                finished = made if loaded.canvas is None else [loaded.canvas.finished(image) for image in made]
                images += map(GeneratedImage, finished, request.seeds[len(images) :])
                if self._on_images is not None and self._turn == len(self._rounds):
                    generation.images = images
                    self._on_images(generation)
        generation.images = images


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


def _hashes(request: GenerateRequest, images: RequestImages, loras: list[str]) -> dict[str, Any]:
    """SHA-256 of all files but models, as far as there are any.

    Args:
        loras: those of the LoRAs.
    """
    embeddings = [file_sha256(embedding_file(entry)[1]) for entry in request.embeddings]
    listed = {name: hashes for name, hashes in (("embeddings", embeddings), ("loras", loras)) if hashes}
    controls = [images.control_hashes(use, index) for index, use in enumerate(request.controls)]
    return {"base": None, "controls": controls, **listed, **images.start_hashes()}


def _base_hashes(request: GenerateRequest) -> dict[str, Any]:
    """SHA-256 of the base and of the autoencoder in place of its own."""
    of_base = {"base": base_sha256(request.base)}
    return of_base if request.vae is None else {**of_base, "vae": vae_sha256(request.vae)}


@contextmanager
def _timed(generation: Generation, name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    generation.seconds[name] = time.perf_counter() - start
