"""X/Y sheets of the page, with a server that answers with flat images."""

from __future__ import annotations

import asyncio
import io
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from controlkit.errors import UserError
from controlkit.server.catalogue import Catalogue
from controlkit.server.spec import Spec

pytest.importorskip("gradio")

RED, GREY = (255, 0, 0), (211, 211, 211)


class _Server:
    """Draws red images; the requests of `failing` numbers fail."""

    def __init__(self, failing=()):
        self.failing, self.asked = failing, []
        self.service = SimpleNamespace(
            catalogue=Catalogue(bases={"nano": "nano"}, controls={}, embeddings={"wavy": "wavy.safetensors"}),
            files=self._files,
        )

    async def submit(self, spec, files):
        self.asked.append(spec.request)
        return SimpleNamespace(id=str(len(self.asked)))

    async def watch(self, name):
        yield SimpleNamespace(line="step 1 of 1")
        if int(name) in self.failing:
            raise UserError("out of memory", "out-of-memory")

    async def _files(self, name, role):
        buffer = io.BytesIO()
        Image.new("RGB", (128, 128), RED).save(buffer, format="PNG")
        return [buffer.getvalue()]


def _drawn(server, axes, stopped=lambda: False) -> list:
    from controlkit.ui.xy_sheet import draw_sheet

    found = []

    async def draw():
        request = {"prompt": "house", "negative_prompt": "", "base": "nano", "seeds": [0], "steps": 2}
        async for each in draw_sheet(server, Spec(request=request), {}, axes, stopped, lambda job: None):
            found.append(each)

    try:
        asyncio.run(draw())
    except UserError as error:
        found.append(error)
    return found


def _cells(sheet: Image.Image) -> tuple[int, int]:
    """How many cells of 128 x 128 of a sheet are red, and grey."""
    pixels = np.asarray(sheet)
    return tuple(round((pixels == colour).all(-1).sum() / 128**2) for colour in (RED, GREY))


def test_cells_that_are_finished_stay_when_a_sheet_is_cancelled():
    server = _Server()
    *_, (line, sheet) = _drawn(server, [("guidance", "1, 2, 3")], lambda: len(server.asked) == 2)
    assert "2 of 3" in line and _cells(sheet) == (2, 1)
    *_, (line, sheet) = _drawn(_Server(), [("guidance", "1, 2, 3")], lambda: True)
    assert "0 of 3" in line and sheet is None


def test_cells_that_are_finished_stay_when_another_fails():
    *_, (_, sheet), error = _drawn(_Server(failing=[3]), [("guidance", "1, 2, 3, 4")])
    assert _cells(sheet) == (2, 2) and error.code == "out-of-memory"
    *_, (_, sheet), error = _drawn(_Server(failing=[1]), [("guidance", "1, 2")])
    assert sheet is None and error.code == "out-of-memory"


def test_each_cell_uses_the_embeddings_whose_words_its_prompts_have():
    server = _Server()
    *_, (_, sheet) = _drawn(server, [("prompt", "house | wavy house"), ("negative_prompt", "red | wavy")])
    assert _cells(sheet) == (4, 0)
    used = {(each["prompt"], each["negative_prompt"]): each["embeddings"] for each in server.asked}
    assert used == {
        ("house", "red"): [],
        ("house", "wavy"): ["wavy"],
        ("wavy house", "red"): ["wavy"],
        ("wavy house", "wavy"): ["wavy"],
    }


def test_what_cannot_be_a_sheet_is_refused():
    for axes in ([], [("image", "a.png")], [("seed", "0-64")]):
        (error,) = _drawn(_Server(), axes)
        assert isinstance(error, UserError)
