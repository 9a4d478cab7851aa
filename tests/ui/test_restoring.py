"""Settings of files as the page can use them."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from controlkit.sampling.saved_settings import read_settings
from controlkit.server.catalogue import list_models
from controlkit.server.spec import SentImage, Spec
from refusals import refused

pytest.importorskip("gradio")

_REQUEST = {"prompt": "house", "seeds": [3], "steps": 9}


def _file(folder, request, **others):
    path = folder / "settings.json"
    path.write_text(json.dumps({"request": {**_REQUEST, **request}, **others}))
    return path


def _notes(folder, request) -> str:
    from controlkit.ui.files import settings_in
    from controlkit.ui.restoring import Restored

    found = Restored.of(settings_in(_file(folder, request)), list_models(), 3)
    return " ".join(found.notes)


@pytest.mark.parametrize(
    ("request_", "named"),
    [
        ({"prompt_syntax": "weighted"}, "prompt_syntax"),
        ({"tiled": True}, "tiled"),
        ({"prompt": "", "prompt_mode": "none"}, "prompt_mode"),
        ({"xy": [{"guidance": [1, 3]}]}, "xy"),
        ({"controls": [{"control": "canny", "image": "a.png", "layers": [0, 1]}]}, "layers of canny"),
        ({"controls": [{"control": "canny", "image": "a.png", "mask": "m.png"}]}, "mask of canny"),
        ({"controls": [{"control": "canny", "image": "a.png", "parameters": {"lows": [1]}}]}, "lows of canny"),
    ],
)
def test_settings_that_the_page_cannot_hold_are_named(tmp_path, request_, named):
    assert named in _notes(tmp_path, request_)


def test_a_task_is_restored(tmp_path, unions):
    from controlkit.ui.files import settings_in
    from controlkit.ui.restoring import Restored

    def notes(**inputs):
        control = {"control": "union", "inputs": {"image": "a.png", **inputs}, "parameters": {"low": 40}}
        return " ".join(Restored.of(settings_in(_file(tmp_path, {"controls": [control]})), unions, 3).notes)

    assert notes(task="canny") == notes(task="Canny") == ""
    assert "task palette of union" in notes(task="palette")
    assert "input depth of union" in notes(task="canny", depth="b.png")


def test_an_embedding_that_is_not_here_is_named(tmp_path):
    assert "no embedding wavy" in _notes(tmp_path, {"embeddings": ["wavy=x/y.safetensors"], "prompt": "wavy"})


def test_settings_that_the_page_holds_are_not_noted(tmp_path):
    control = {"control": "canny", "image": "a.png", "weight": 0.5, "parameters": {"low": 40}, "mode": "soft"}
    assert _notes(tmp_path, {"controls": [control], "clip_skip": 2, "batch_size": 2, "precision": "fp32"}) == ""


@pytest.mark.parametrize("name", ["palette", "nano/palette", "Nano/Palette"])
def test_controls_of_the_command_line_are_found_by_their_names(tmp_path, name):
    from controlkit.ui.files import settings_in
    from controlkit.ui.restoring import Restored

    path = _file(tmp_path, {"controls": [{"control": name, "image": "a.png"}]})
    found = Restored.of(settings_in(path), list_models(), 3)
    assert [use["control"] for use in found.controls] == ["nano/palette"] and found.notes == ()


def test_a_transparent_condition_image_lies_over_the_background_of_its_condition():
    from controlkit.ui.control_rows import drawn

    image = Image.new("RGBA", (8, 8), (255, 255, 255, 0))
    image.putpixel((3, 3), (255, 255, 255, 255))
    assert drawn({"composite": image}, (0, 0, 0)).getpixel((0, 0)) == (0, 0, 0)
    assert drawn({"composite": image}).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("parts", ["seed3.png", "settings.json"])
def test_a_result_has_the_controls_of_the_page_and_of_its_files(tmp_path, prepared, parts, monkeypatch):
    """The page restores how condition images were computed; `generate --from` uses those that were."""
    from controlkit.ui.files import VARIABLE, png_bytes, settings_in
    from controlkit.ui.results import write_files

    monkeypatch.setenv(VARIABLE, str(tmp_path))
    data = png_bytes(Image.new("RGB", (64, 64)))
    parameters = None if prepared else {"low": 40}
    control = {"control": "canny", "image": "control0", "prepared": prepared, "parameters": parameters}
    spec = Spec(request={**_REQUEST, "controls": [control]}, images={"control0": SentImage(file="control0")})
    found, _ = write_files(spec, {"control0": data}, {"seeds": [3], "used": {}}, [data], [data], [])
    path = tmp_path / found["images"][0]
    (use,) = settings_in(path.with_name(parts))["controls"]
    assert (use["prepared"], use["parameters"]) == (prepared, parameters)
    (use,) = read_settings(path.with_name(parts)).request.controls
    assert (use.prepared, use.parameters, use.image) == (True, None, "condition0.png")


def test_a_result_of_a_task_has_it_in_its_files(tmp_path, unions, monkeypatch):
    from controlkit.ui.files import VARIABLE, png_bytes, settings_in
    from controlkit.ui.restoring import Restored
    from controlkit.ui.results import write_files

    monkeypatch.setenv(VARIABLE, str(tmp_path))
    data = png_bytes(Image.new("RGB", (64, 64)))
    inputs = {"image": "control0", "task": "canny"}
    control = {"control": "union", "image": None, "inputs": inputs, "prepared": False, "parameters": {"low": 40}}
    spec = Spec(request={**_REQUEST, "controls": [control]}, images={"control0": SentImage(file="control0")})
    found, _ = write_files(spec, {"control0": data}, {"seeds": [3], "used": {}}, [data], [data], [])
    assert len(found["image"]) == len(found["condition image"]) == 1
    path = tmp_path / found["images"][0]
    stored = Restored.of(settings_in(path), unions, 3)
    (use,) = stored.controls
    assert (use["inputs"]["task"], use["prepared"], use["parameters"]) == ("canny", False, {"low": 40})
    assert stored.notes == ()
    (use,) = read_settings(path.with_name("settings.json")).request.controls
    assert use.prepared and use.inputs == {"image": "condition0.png", "task": "canny"}


def test_values_of_a_page_are_checked_as_others(tmp_path):
    from controlkit.ui.files import settings_in

    control = {"control": "canny", "image": "condition0.png", "prepared": True}
    page = {"controls": [{"prepared": False, "parameters": "low"}]}
    with refused("wrong-type"):
        settings_in(_file(tmp_path, {"controls": [control]}, page=page))
