"""X/Y sheets of the page: one request for each cell, put together here."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import AsyncIterator, Callable, Mapping, Sequence

from fastapi.concurrency import run_in_threadpool
from PIL import Image

from controlkit.errors import UserError
from controlkit.sampling.axes import parse_axis, points_of
from controlkit.sampling.file_names import image_name
from controlkit.sampling.request import GenerateRequest
from controlkit.sampling.sheets import sheets_of
from controlkit.server.spec import Spec
from controlkit.ui.client import Client

AXES = (
    *("seed", "weight", "start", "end", "span", "mode", "prompt", "negative_prompt", "steps", "guidance", "sampler"),
    *("hires", "hires_strength"),
)
"""Settings that may vary. None names an image or a model: their names would be looked up as paths."""
_MOST_CELLS = 64


async def draw_sheet(
    client: Client,
    spec: Spec,
    files: Mapping[str, bytes],
    axes: Sequence[tuple[str, str]],
    stopped: Callable[[], bool],
    begun: Callable[[str], object],
) -> AsyncIterator[tuple[str, Image.Image | None]]:
    """Draw the cells one after the other; yields progress in words, and at the end the sheet.

    If it is stopped or a cell fails, the sheet has the finished cells, and others are grey.

    Args:
        axes: setting and values, as `--xy` takes them; the first are the columns.
        stopped: whether to end.
        begun: called with the id of each request.

    Raises:
        UserError: an axis or the request cannot be used.
        QueueFull: too many requests wait.
    """
    request, catalogue = sheet_request(spec, axes), client.service.catalogue
    points = points_of(request)
    if len(points) > _MOST_CELLS:
        raise UserError(f"the sheet has {len(points)} cells; at most {_MOST_CELLS}", "out-of-range")
    images: dict[str, Image.Image] = {}
    try:
        for number, point in enumerate(points):
            if stopped():
                break
            words = catalogue.embeddings_in(f"{point.request.prompt}\n{point.request.negative_prompt}")
            values = {**point.request.to_json(), "embeddings": words}
            job = await client.submit(dataclasses.replace(spec, request=values, maps=()), files)
            begun(job.id)
            async for now in client.watch(job.id):
                yield f"cell {number + 1} of {len(points)}: {now.line}", None
            drawn = await client.service.files(job.id, "images")
            if not drawn:
                break
            images[image_name(point.name, point.request.seeds[0])] = Image.open(io.BytesIO(drawn[0]))
    except Exception:
        if images:
            yield f"{len(images)} of {len(points)} cells", await run_in_threadpool(_sheet, request, images)
        raise
    done = f"{len(points)} cells"
    if len(images) < len(points):
        done = f"cancelled after {len(images)} of {len(points)} cells"
    yield done, await run_in_threadpool(_sheet, request, images) if images else None


def _sheet(request: GenerateRequest, images: Mapping[str, Image.Image]) -> Image.Image:
    """The sheet of a request, grey where there is no image."""
    (sheet,) = sheets_of(request)
    blank = Image.new("RGB", next(iter(images.values())).size, "lightgrey")
    return sheet.draw({cell: images.get(cell, blank) for row in sheet.cells for cell in row})


def sheet_request(spec: Spec, axes: Sequence[tuple[str, str]]) -> GenerateRequest:
    """The request of a sheet, with names of the server in place of paths and one seed.

    Raises:
        UserError: an axis cannot be used.
    """
    if not axes:
        raise UserError("choose a setting for X", "missing-setting")
    values = {name: value for name, value in spec.request.items() if value is not None}
    request = GenerateRequest.from_json({**values, "seeds": values["seeds"][:1]})
    found = []
    for name, text in axes:
        if name not in AXES:
            raise UserError(f"{name} cannot vary on a sheet", "unknown-key")
        found.append(parse_axis(f"{name}={text}", request, "axis"))
    return dataclasses.replace(request, xy=tuple(found))
