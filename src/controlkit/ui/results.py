"""The files of a result: what the page shows, compares and offers to download."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from controlkit.images import resize_cover
from controlkit.server.spec import Spec, image_name
from controlkit.ui.files import PAGE_FIELDS, write_result

SIDES = ("condition image", "image", "start image")
"""What a result can be compared with: the condition image and the image of the first control, and the image that
sampling started from."""


def write_files(
    spec: Spec,
    sent: Mapping[str, bytes],
    values: Mapping[str, Any],
    images: Sequence[bytes],
    maps: Sequence[bytes],
    start: Sequence[bytes],
) -> tuple[dict[str, list[str]], Path]:
    """Write the files of a result.

    Args:
        sent: name -> bytes of the images of the request.
        values: the result's `seeds`, `used` and so on.
        images: PNG files, as are `maps` (condition images) and `start` (the image that sampling started from).

    Returns:
        Paths of the `images` and of each of `SIDES`, and of the ZIP to download.
    """
    request, named = restorable(spec, values["seeds"])
    files = {file: sent[name] for file, name in named.items()}
    own = [{name: use.get(name) for name in PAGE_FIELDS} for use in spec.request.get("controls", ())]
    settings = {"request": request, "used": values["used"], "page": {"controls": own}}
    drawn, conditions, archive = write_result(images, maps, values["seeds"], settings, files)
    begun = []
    if start:
        begun.append(drawn[0].with_name("start.png"))
        begun[0].write_bytes(start[0])
    sides = dict(zip(SIDES, (conditions, _as_drawn(sent, spec, drawn[0]), begun), strict=True))
    return {name: [str(path) for path in paths] for name, paths in {"images": drawn, **sides}.items()}, archive


def restorable(spec: Spec, seeds: Sequence[int]) -> tuple[dict[str, Any], dict[str, str]]:
    """Fields of `GenerateRequest` that draw the images again from the files of a result.

    Returns:
        The fields; and of the files besides the condition images, name of the file -> name of the image in `spec`.
    """
    request = {name: value for name, value in spec.request.items() if value is not None}
    named: dict[str, str] = {}
    for name in ("image", "mask"):
        if name in request:
            named[f"{name}.png"], request[name] = request[name], f"{name}.png"
    uses = []
    for index, use in enumerate(request.get("controls", ())):
        mask = None
        if use.get("mask") is not None:
            mask = f"mask{index}.png"
            named[mask] = use["mask"]
        image: dict[str, Any] = {"image": f"condition{index}.png"}
        if use.get("inputs") is not None:
            image = {"image": None, "inputs": {**use["inputs"], **image}}
        uses.append({**use, **image, "prepared": True, "parameters": None, "mask": mask})
    return {**request, "seeds": list(seeds), "controls": uses}, named


def _as_drawn(sent: Mapping[str, bytes], spec: Spec, like: Path) -> list[Path]:
    """The image of the first control as it was drawn or uploaded, in the size of a result."""
    uses = spec.request.get("controls", ())
    name = image_name(uses[0]) if uses else None
    if name is None or name not in sent:
        return []
    with Image.open(like) as result:
        size = result.size
    image = Image.open(io.BytesIO(sent[name])).convert("RGB")
    path = like.with_name("drawn.png")
    resize_cover(image, *size).save(path)
    return [path]
