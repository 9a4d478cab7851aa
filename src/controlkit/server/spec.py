"""The form in which the queue stores a request: settings, names of models and names of images, as JSON.

A spec becomes a `GenerateRequest` twice: before it is queued, to check it, and in the worker, where its images have
been written to a temporary folder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from controlkit.sampling.request import GenerateRequest, check_graphs
from controlkit.server.catalogue import Catalogue, word_of
from controlkit.server.limits import Limits

Fit = Literal["crop", "stretch", "fill"]
"""How an image gets the size of the result: scaled to cover it and cropped (`crop`), stretched, or scaled to fit inside
it with the rest in the colour of its border (`fill`). A1111: Crop and Resize, Just Resize, Resize and Fill."""


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How the server runs all requests; the fields are those of `GenerateRequest`."""

    device: str = "auto"
    precision: str = "auto"
    low_memory: bool = False
    graphs: str = "auto"

    def __post_init__(self) -> None:
        check_graphs(self.graphs)


@dataclass(frozen=True, kw_only=True)
class SentImage:
    """An image that a client sent, and how it is prepared."""

    file: str
    """Its name among the files of the request."""
    fit: Fit = "crop"
    mask: bool = False
    """Whether it is a mask, which is black where it is transparent."""
    invert: bool = False
    """Swap black and white, and other colours likewise."""
    transparent: bool = False
    """For a mask: white where the image is transparent (OpenAI's masks)."""
    by_alpha: bool = False
    """For a mask: of an image that is transparent anywhere, white where its alpha is above 128, else black (A1111's
    masks)."""
    shows: str | None = None
    """Condition that it shows already, which decides its colour where it is transparent and how it is scaled; None for
    others."""
    condition: str | None = None
    """Condition to compute from it; None for the image itself."""
    hole: str | None = None
    """Another image: a mask of the same size, where this one becomes black in place of the hole that `condition` would
    choose."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """Parameters of that condition."""


@dataclass(kw_only=True)
class Spec:
    """A request for images."""

    request: dict[str, Any]
    """Fields of `GenerateRequest`. Models are names in the catalogue, images names in `images`."""
    images: dict[str, SentImage] = field(default_factory=dict)
    lenient: bool = False
    """Whether a sampler and a reading of prompts that the base does not support are replaced by its own, with a note:
    for clients of A1111, which always send a sampler."""
    read_guidance: float | None = None
    """Guidance scale for a base that reads it, in place of the request's (`distilled_cfg_scale` of Forge)."""
    maps: tuple[int, ...] = ()
    """Indices of the controls whose condition images belong to the result."""
    ignored: tuple[str, ...] = ()
    """Names of unsupported keys and scripts that the client sent."""
    notes: tuple[str, ...] = ()
    """Sentences on values that were replaced."""
    start_image: bool = False
    """Whether the result includes the image that sampling starts from."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Spec:
        """The spec of `to_json`."""
        images = {name: SentImage(**image) for name, image in values["images"].items()}
        lists = {name: tuple(values[name]) for name in ("maps", "ignored", "notes")}
        return cls(**{**values, **lists, "images": images})

    def to_request(self, catalogue: Catalogue, path: Callable[[str], str], **settings: Any) -> GenerateRequest:
        """The request with paths of models and images.

        Args:
            path: name of an image -> its path.
            settings: fields that the server decides, such as `device`.

        Raises:
            UserError: a model is not listed, or a setting is out of range or contradicts another.
        """
        values = {**self.request, **settings}
        values["base"] = catalogue.bases[catalogue.find("bases", values.get("base") or catalogue.base)]
        for name in ("image", "mask"):
            if values.get(name) is not None:
                values[name] = path(values[name])
        if values.get("vae") is not None:
            values["vae"] = catalogue.vaes[catalogue.find("vaes", values["vae"])]
        values["loras"] = [
            {**use, "file": catalogue.loras[catalogue.find("loras", use["file"])]} for use in values.get("loras", ())
        ]
        words = [catalogue.find("embeddings", name) for name in values.get("embeddings", ())]
        values["embeddings"] = [f"{word_of(name)}={catalogue.embeddings[name]}" for name in words]
        values["controls"] = [_located(use, catalogue, path) for use in values.get("controls", ())]
        return GenerateRequest.from_json(values)

    def check(self, catalogue: Catalogue, limits: Limits) -> None:
        """Check everything that can be checked before models are loaded.

        Raises:
            UserError: as in `to_request`, or a value is above the limits.
        """
        request = self.to_request(catalogue, lambda name: f"{name}.png")
        limits.check("steps", request.steps)
        limits.check("images", len(request.seeds))
        limits.check("controls", len(request.controls))
        if request.width is not None and request.height is not None:
            limits.check_size(request.width, request.height, request.hires)


def image_name(use: Mapping[str, Any]) -> str | None:
    """Name of the image of a control of a request, which other inputs may stand beside."""
    name: str | None = use.get("image") or (use.get("inputs") or {}).get("image")
    return name


def _located(use: Mapping[str, Any], catalogue: Catalogue, path: Callable[[str], str]) -> dict[str, Any]:
    """A control with paths of its file and its images."""
    entry = catalogue.controls[catalogue.find("controls", use["control"])]
    found = {**use, "control": entry.path}
    for name in ("image", "mask"):
        if found.get(name) is not None:
            found[name] = path(found[name])
    if found.get("inputs") is not None:
        found["inputs"] = {
            name: path(value) if name in entry.images else value for name, value in found["inputs"].items()
        }
    return found
