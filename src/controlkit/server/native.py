"""controlkit's own API, `/controlkit/v1/`: submit, watch, fetch and cancel requests."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, HTTPException, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel, ConfigDict

from controlkit.conditions.condition import known_name
from controlkit.errors import UserError
from controlkit.sampling.request import DEFAULT_STEPS, SAMPLERS
from controlkit.sampling.seeds import settled_seeds
from controlkit.sampling.uses import MODES
from controlkit.server.bodies import Body, Number
from controlkit.server.catalogue import TASK, ControlEntry
from controlkit.server.parameters import check_parameters, computed_conditions, listed_condition, parameters_of
from controlkit.server.problems import responses
from controlkit.server.replies import checked_prompt, ended, in_words_of_clients, service_of
from controlkit.server.sent_images import decode_base64, encode_base64
from controlkit.server.service import Service
from controlkit.server.spec import Fit, SentImage, Spec
from controlkit.server.store import FINISHED, Job

router = APIRouter(prefix="/controlkit/v1", tags=["controlkit"], responses=responses())
_OF_ONE = responses(404)

_PLACE_EVERY = 5.0
"""Most seconds between events of a request that waits: its place changes without a signal."""

Plain = bool | int | Number | list[Any]


class _Body(Body, BaseModel):
    model_config = ConfigDict(extra="forbid")


class LoraBody(_Body):
    """A LoRA."""

    name: str
    """Its name in `models`."""
    weight: Number = 1.0


class ControlBody(_Body):
    """A control; the fields are those of `ControlUse`, with images as base64."""

    control: str
    """Its name in `models`."""
    image: str | None = None
    """Base64 of the image, for a control that takes one."""
    images: dict[str, str] = {}
    """Base64 of images by input, for a control with several inputs."""
    values: dict[str, Any] = {}
    """Its plain inputs, such as a task or boxes."""
    weight: Number = 1.0
    """Conditioning scale."""
    start: Number = 0.0
    """Fraction of the steps at which it starts, in [0, 1]."""
    end: Number = 1.0
    """Fraction of the steps at which it ends, in [0, 1]."""
    layers: list[Number] | None = None
    """One more factor for each of its residuals, from the outermost in."""
    mask: str | None = None
    """Base64 of a grey image: where the control acts."""
    prepared: bool = False
    """Whether the image is a condition image already."""
    condition: str | None = None
    """Condition to compute from the image in place of the control's own."""
    parameters: dict[str, Plain] = {}
    """Parameters of the condition: numbers, true and false, and lists of numbers."""
    mode: str | None = None
    """One of the modes in `models`; default: that of the base."""
    fit: Fit = "crop"
    """How its images get the size of the result."""


class GenerateBody(_Body):
    """A request for images; the fields are those of `GenerateRequest`, with images as base64 and names of `models`."""

    prompt: str = ""
    prompt_mode: Literal["none", "default", "automatic", "given"] = "given"
    negative_prompt: str = ""
    prompt_syntax: Literal["plain", "weighted"] = "plain"
    """Whether `(word:1.2)`, `[word]` and `BREAK` have a meaning."""
    clip_skip: int | None = None
    """Layer of the text encoder, counted from the last; default: that of the base."""
    embeddings: list[str] = []
    """Names of textual inversions."""
    loras: list[LoraBody] = []
    base: str | None = None
    """Name of the base; default: the first."""
    vae: str | None = None
    """Name of an autoencoder; default: the base's own."""
    controls: list[ControlBody] = []
    seeds: list[int] = [0]
    """One image for each; -1 is a random one."""
    steps: int | None = None
    """Denoising steps."""
    guidance: Number | None = None
    """Classifier-free guidance scale; default: that of the base."""
    width: int | None = None
    """In pixels; default: the size of the base."""
    height: int | None = None
    """In pixels; default: the size of the base."""
    image: str | None = None
    """Base64 of an image to start from."""
    strength: Number | None = None
    """Fraction of the steps that run on `image`, in (0, 1]."""
    mask: str | None = None
    """Base64 of a grey image of the size of `image`, white where it changes."""
    mask_blur: Number = 0.0
    """Standard deviation in pixels of the result."""
    only_masked: int | None = None
    """Padding in pixels of `image`: only the part around the mask is sampled; default: all of it."""
    hires: Number | None = None
    """Factor of a second pass, more than 1; default: none."""
    hires_strength: Number | None = None
    """`strength` of the second pass; default: 0.7."""
    sampler: str | None = None
    """Name of the solver; default: that of the base."""
    batch_size: int | None = None
    """Images per batch."""
    tiled: bool = False
    """Whether the autoencoder works in tiles."""


class Status(BaseModel):
    """The current state of a request."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    id: str
    kind: str
    state: Literal["pending", "running", "done", "failed", "cancelled"]
    place: int
    """Number of requests before it, the running one included; 0 if it does not wait."""
    step: int
    steps: int
    progress: float
    """In [0, 1]."""
    eta_seconds: float | None
    """Estimated seconds until it ends; null before its second step and when it does not run."""
    created: float
    started: float | None
    finished: float | None
    """Unix times in seconds."""
    error: str | None
    code: str | None


class Result(BaseModel):
    """The images of a request."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    id: str
    state: Literal["done", "cancelled"]
    images: list[str]
    """Base64 of PNG files."""
    conditions: list[str]
    """Base64 of the condition images."""
    info: dict[str, Any]
    """Seeds, settings that were used, and notes."""


@router.post("/jobs", status_code=202, responses=responses(503))
async def submit(body: GenerateBody, request: Request) -> Status:
    """Queue a request for images; the response has its id."""
    service = service_of(request)
    spec, files = await run_in_threadpool(build, body, service)
    return await _status(service, await service.submit(spec, files))


@router.get("/jobs")
async def jobs(request: Request, limit: Annotated[int, Query(ge=1, le=100)] = 20) -> list[Status]:
    """The last requests, the newest first."""
    service = service_of(request)
    return [await _status(service, job) for job in await run_in_threadpool(service.store.recent, limit)]


@router.get("/jobs/{id}", responses=_OF_ONE)
async def status(id: str, request: Request) -> Status:
    """The current state of a request."""
    service = service_of(request)
    return await _status(service, await _known(service, id))


@router.get("/jobs/{id}/result", responses=responses(404, 409))
async def result(id: str, request: Request) -> Result:
    """The images of a request that is done or cancelled; 409 if it has not ended."""
    service = service_of(request)
    job = await _known(service, id)
    if job.state not in FINISHED:
        raise HTTPException(409, f"the request is {job.state}; ask again when it is done")
    ended(job)
    images, maps = [[encode_base64(data) for data in await service.files(id, role)] for role in ("images", "maps")]
    state: Any = job.state
    info = dict(job.result or {})
    info["notes"] = [in_words_of_clients(note, service.catalogue) for note in info.get("notes", ())]
    return Result(id=id, state=state, images=images, conditions=maps, info=info)


@router.get(
    "/jobs/{id}/preview",
    response_class=Response,
    responses={**_OF_ONE, 200: {"content": {"image/png": {}}}, 204: {"description": "There is no preview yet"}},
)
async def preview(id: str, request: Request) -> Response:
    """A small PNG of the running request's first image; 204 if there is none yet."""
    service = service_of(request)
    progress = service.progress_of(await _known(service, id))
    if progress is None or progress.preview is None:
        return Response(status_code=204)
    return Response(progress.preview, media_type="image/png")


@router.post("/jobs/{id}/cancel", responses=_OF_ONE)
async def cancel(id: str, request: Request) -> Status:
    """Cancel a request: at once if it waits, within a step if it runs."""
    service = service_of(request)
    job = await service.cancel(id)
    if job is None:
        raise _unknown(id)
    return await _status(service, job)


@router.get("/jobs/{id}/events", response_class=StreamingResponse, responses=_OF_ONE)
async def events(id: str, request: Request, previews: bool = False) -> StreamingResponse:
    """Server-sent events until the request ends: a `status` at each change; `previews` adds the base64 of new ones."""
    service = service_of(request)
    await _known(service, id)
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(_events(service, id, previews), media_type="text/event-stream", headers=headers)


async def _events(service: Service, id: str, previews: bool) -> AsyncIterator[str]:
    shown, last = 0, ""
    with service.watch(id) as event:
        while True:
            event.clear()
            job = await service.job(id)
            if job is None:
                return
            values = (await _status(service, job)).model_dump()
            progress = service.progress_of(job)
            if previews and progress is not None and progress.preview is not None and progress.previews != shown:
                shown = progress.previews
                values["preview"] = encode_base64(progress.preview)
            text = json.dumps(values)
            yield f"event: status\ndata: {text}\n\n" if text != last else ": waiting\n\n"
            last = text
            if job.state in FINISHED:
                return
            await service.wait_for_change(event, _PLACE_EVERY)


@router.get("/models")
async def models(request: Request) -> dict[str, Any]:
    """Names of models, conditions with their parameters, samplers and modes; and the limits."""
    service = service_of(request)
    catalogue, computed = service.catalogue, computed_conditions()
    return {
        "bases": list(catalogue.bases),
        "controls": {
            name: {
                "kind": entry.kind,
                "condition": entry.condition,
                "images": entry.images,
                "values": entry.values,
                "tasks": entry.tasks,
            }
            for name, entry in catalogue.controls.items()
        },
        "loras": list(catalogue.loras),
        "vaes": list(catalogue.vaes),
        "embeddings": list(catalogue.embeddings),
        "conditions": list(computed),
        "parameters": {
            name: {
                each.name: {"default": each.default, "limits": None if each.limits is None else list(each.limits)}
                for each in parameters_of(kind)
            }
            for name, kind in computed.items()
        },
        "samplers": list(SAMPLERS),
        "modes": list(MODES),
        "limits": vars(service.limits),
    }


def build(body: GenerateBody, service: Service) -> tuple[Spec, dict[str, bytes]]:
    """Turn a body into a spec.

    Returns:
        The spec, and its images: name -> bytes.

    Raises:
        UserError: an image, a name or a value cannot be used, or is above the limits.
    """
    collected = Images(service)
    values = body.model_dump(exclude={"controls", "loras", "image", "mask"})
    values["prompt"] = checked_prompt(body.prompt, "prompt")
    values["negative_prompt"] = checked_prompt(body.negative_prompt, "negative_prompt")
    values["steps"] = min(DEFAULT_STEPS, service.limits.steps) if body.steps is None else body.steps
    service.limits.check("images", len(body.seeds))
    values["seeds"] = list(settled_seeds(body.seeds))  # here, so that a request that runs again is the same
    values["loras"] = [{"file": lora.name, "weight": lora.weight} for lora in body.loras]
    for name in ("image", "mask"):
        values[name] = collected.add(name, getattr(body, name))
    service.limits.check("controls", len(body.controls))
    values["controls"] = [_control(use, index, collected, service) for index, use in enumerate(body.controls)]
    spec = Spec(request=values, images=collected.images, maps=tuple(range(len(body.controls))))
    return spec, collected.files


class Images:
    """Collects the images of a request from its body.

    `images` has how each is prepared (name -> `SentImage`), `files` their bytes (name -> bytes).
    """

    def __init__(self, service: Service) -> None:
        self._limits = service.limits
        self.images: dict[str, SentImage] = {}
        self.files: dict[str, bytes] = {}

    def add(self, name: str, text: str | None, **done: Any) -> str | None:
        """Add an image that was sent as base64.

        Args:
            text: base64; None for no image.
            done: fields of `SentImage`: how it is prepared.

        Returns:
            `name`; None for no image.

        Raises:
            UserError: it is not base64 or no image, or is above the limits.
        """
        return None if text is None else self.add_bytes(name, decode_base64(text, name, self._limits), **done)

    def add_bytes(self, name: str, data: bytes, **done: Any) -> str:
        """Add an image whose bytes were checked; otherwise as `add`."""
        self.files[name] = data
        self.images[name] = SentImage(file=name, **done)
        return name

    def add_again(self, name: str, other: str, **done: Any) -> None:
        """Add the file of an image that was added as `other`, prepared in another way."""
        self.images[name] = SentImage(file=self.images[other].file, **done)


def _control(use: ControlBody, index: int, collected: Images, service: Service) -> dict[str, Any]:
    catalogue = service.catalogue
    entry = catalogue.controls[catalogue.find("controls", use.control)]
    for name in use.images:
        if name not in entry.images:
            raise UserError(f"{use.control} has no image {name!r}; it has {', '.join(entry.images)}", "unknown-key")
    for name in use.values:
        if name not in entry.values:
            raise UserError(f"{use.control} has no plain input {name!r}", "unknown-key")
    entry = _with_task(use, entry)
    first = entry.images[0] if entry.images else "image"
    if use.image is not None and first in use.images:
        raise UserError(f"{use.control}: image and images.{first} are the same input; send one", "contradiction")
    if use.prepared and use.condition is not None:
        raise UserError(
            f"{use.control}: nothing is computed from a prepared image; send it without condition {use.condition!r}",
            "contradiction",
        )
    check_parameters(use.parameters)
    own = use.condition is None
    done: dict[str, Any] = {"fit": use.fit}
    if use.condition is not None:
        condition = listed_condition(use.condition)
        done |= {"condition": condition, "parameters": use.parameters}
    values: dict[str, Any] = {
        "control": use.control,
        **{name: getattr(use, name) for name in ("weight", "start", "end", "layers", "mode")},
        "prepared": use.prepared or not own,
        "parameters": (use.parameters or None) if own else None,
        "mask": collected.add(f"control{index}-mask", use.mask, fit=use.fit, mask=True),
    }

    def shown(name: str | None) -> str | None:
        return entry.condition_of(name) if use.prepared else None

    image = collected.add(f"control{index}", use.image, **done, shows=shown(None))
    images = {
        name: collected.add(f"control{index}-{entry.images.index(name)}", text, **done, shows=shown(name))
        for name, text in use.images.items()
    }
    if not (images or use.values):
        return {**values, "image": image}
    if image is not None:
        images[first] = image
    return {**values, "inputs": {**use.values, **images}}


def _with_task(use: ControlBody, entry: ControlEntry) -> ControlEntry:
    """The entry of a control with the condition of the task that a request selects.

    Raises:
        UserError: the control has several, and none is selected.
    """
    task = use.values.get(TASK)
    if entry.tasks and task is None and entry.condition is None:
        raise UserError(
            f"{use.control} has the tasks {', '.join(entry.tasks)}; select one as values.{TASK}", "missing-setting"
        )
    return replace(entry, condition=known_name(task)) if entry.tasks and isinstance(task, str) else entry


async def _status(service: Service, job: Job) -> Status:
    progress = service.progress_of(job)
    return Status(
        id=job.id,
        kind=job.kind,
        state=job.state,
        place=await service.place(job),
        step=0 if progress is None else progress.done,
        steps=0 if progress is None else progress.total,
        progress=float(job.state == "done") if progress is None else progress.fraction,
        eta_seconds=None if progress is None else progress.seconds_left,
        created=job.created,
        started=job.started,
        finished=job.finished,
        error=None if job.error is None else in_words_of_clients(job.error, service.catalogue),
        code=job.code,
    )


async def _known(service: Service, id: str) -> Job:
    job = await service.job(id)
    if job is None:
        raise _unknown(id)
    return job


def _unknown(id: str) -> HTTPException:
    return HTTPException(404, "there is no request of this id, or its result has been removed")
