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

    Args:
        axes: setting and values, as `--xy` takes them; the first are the columns.
        stopped: whether to end.
        begun: called with the id of each request.

    Raises:
        UserError: an axis or the request cannot be used.
        QueueFull: too many requests wait.
    """
    request = sheet_request(spec, axes)
    points = points_of(request)
    if len(points) > _MOST_CELLS:
        raise UserError(f"the sheet has {len(points)} cells; at most {_MOST_CELLS}", "out-of-range")
    images: dict[str, Image.Image] = {}
    for number, point in enumerate(points):
        if stopped():
            yield f"cancelled after {number} of {len(points)} cells", None
            return
        cell = dataclasses.replace(spec, request=point.request.to_json(), maps=())
        job = await client.submit(cell, files)
        begun(job.id)
        async for now in client.watch(job.id):
            yield f"cell {number + 1} of {len(points)}: {now.line}", None
        drawn = await client.service.files(job.id, "images")
        if not drawn:
            yield f"cancelled after {number} of {len(points)} cells", None
            return
        images[image_name(point.name, point.request.seeds[0])] = Image.open(io.BytesIO(drawn[0]))
    (sheet,) = sheets_of(request)
    yield f"{len(points)} cells", await run_in_threadpool(sheet.draw, images)


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
