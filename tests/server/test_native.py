"""controlkit's own API: submit, watch, fetch, cancel."""

from __future__ import annotations

import io
import json
import shutil
import tempfile
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from running import base64_of, drawing, image_of, in_thread

from controlkit.formats.load import shipped_controls
from controlkit.server.limits import Limits
from controlkit.server.native import ControlBody, Images, _control
from refusals import refused

SMALL = {"prompt": "red apple", "steps": 2}
LONG = {"prompt": "red apple", "steps": 150, "seeds": list(range(8)), "batch_size": 1}


def test_a_request_is_submitted_watched_and_fetched(server):
    control = {"control": "nano/palette", "image": base64_of(drawing()), "parameters": {"cells": 4}, "weight": 0.9}
    name = server.submit(**SMALL, controls=[control], seeds=[3, 4])
    status = server.wait(name)
    assert (status["state"], status["progress"], status["place"]) == ("done", 1, 0)
    result = server.get(f"/controlkit/v1/jobs/{name}/result")
    assert [image_of(text).size for text in result["images"]] == [(64, 64)] * 2
    assert len(result["conditions"]) == 1
    assert result["info"]["seeds"] == [3, 4] and result["info"]["used"]["width"] == 64
    assert server.get("/controlkit/v1/jobs")[0]["id"] == name


def test_a_condition_of_another_kind_and_a_prepared_image(server):
    edges = server.submit(**SMALL, controls=[{"control": "canny", "image": base64_of(drawing()), "condition": "canny"}])
    server.wait(edges)
    condition = server.get(f"/controlkit/v1/jobs/{edges}/result")["conditions"][0]
    prepared = server.submit(**SMALL, controls=[{"control": "canny", "image": condition, "prepared": True}])
    server.wait(prepared)
    images = [server.get(f"/controlkit/v1/jobs/{name}/result")["images"][0] for name in (edges, prepared)]
    assert np.array_equal(*[np.asarray(image_of(text)) for text in images])


def test_events_tell_each_step_to_the_end(server):
    name = server.submit(**{**SMALL, "steps": 12})
    events = []
    with server.client.stream("GET", f"/controlkit/v1/jobs/{name}/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if line.startswith("data: "):
                events.append(json.loads(line[6:]))
    steps = [event["step"] for event in events if event["state"] == "running"]
    assert steps == sorted(steps) and events[-1]["state"] == "done"


def test_waiting_requests_know_their_place_and_are_cancelled_at_once(server):
    running, *waiting = [server.submit(**LONG) for _ in range(3)]
    server.wait(running, "running")
    assert [server.status(name)["place"] for name in waiting] == [1, 2]
    status = server.post(f"/controlkit/v1/jobs/{waiting[0]}/cancel").json()
    assert status["state"] == "cancelled" and server.status(waiting[1])["place"] == 1
    with server.client.stream("GET", f"/controlkit/v1/jobs/{running}/events?previews=true") as answer:
        for line in answer.iter_lines():
            if line.startswith("data: "):
                event = json.loads(line[6:])
                if "preview" in event and event["step"] > 1:  # before, there is no estimate
                    break
    assert image_of(event["preview"]).size == (64, 64)
    assert event["eta_seconds"] is not None and 0 < event["step"] < event["steps"] == 1200
    preview = server.client.get(f"/controlkit/v1/jobs/{running}/preview")
    assert preview.headers["content-type"] == "image/png"
    assert server.client.get(f"/controlkit/v1/jobs/{running}/result").status_code == 409
    for name in (running, waiting[1]):
        server.post(f"/controlkit/v1/jobs/{name}/cancel")
    assert server.wait(running)["state"] == server.wait(waiting[1])["state"] == "cancelled"
    # The worker is free, and unharmed.
    assert server.wait(server.submit(**SMALL))["state"] == "done"


def test_unknown_requests(server):
    for path in ("", "/result", "/preview", "/events"):
        assert server.client.get(f"/controlkit/v1/jobs/none{path}").status_code == 404
    assert server.post("/controlkit/v1/jobs/none/cancel").status_code == 404


IMAGE = base64_of(drawing())


@pytest.mark.parametrize(
    "body",
    [
        {"made_up": 1},
        {"base": "/etc/passwd"},
        {"vae": "../own"},
        {"loras": [{"name": "/etc/passwd"}]},
        {"embeddings": ["/etc/passwd"]},
        {"image": "/etc/passwd"},
        {"image": "file:///etc/passwd"},
        {"image": IMAGE, "mask": "/etc/passwd"},
        {"controls": [{"control": "/etc/passwd", "image": IMAGE}]},
        {"controls": [{"control": "canny", "image": "/etc/passwd"}]},
        {"controls": [{"control": "canny", "values": {"image": "/etc/passwd"}}]},
        {"controls": [{"control": "canny", "images": {"image": "/etc/passwd"}}]},
        {"controls": [{"control": "canny", "image": IMAGE, "mask": "/etc/passwd"}]},
        {"controls": [{"control": "canny", "image": IMAGE, "condition": "hed", "parameters": {"model": "/etc"}}]},
        {"controls": [{"control": "canny", "image": IMAGE, "parameters": {"low": ["/etc/passwd"]}}]},
        {"controls": [{"control": "canny"}]},
        {"captioner": "/etc"},
        {"device": "cuda:9"},
        {"vary": [{"base": ["/etc/passwd"]}]},
        {"seeds": []},
        {"strength": 0.5},
        {"steps": 0},
    ],
)
def test_no_path_and_no_nonsense_is_queued(server, body):
    answer = server.post("/controlkit/v1/jobs", {**SMALL, **body})
    assert answer.status_code == 422, answer.text


@pytest.mark.parametrize(
    "change",
    [{"condition": "hed", "prepared": True}, {"condition": "no such", "prepared": True}, {"images": {"image": IMAGE}}],
)
def test_fields_of_a_control_that_contradict_each_other_are_refused(server, change):
    control = {"control": "canny", "image": IMAGE, **change}
    answer = server.post("/controlkit/v1/jobs", {**SMALL, "controls": [control]})
    assert answer.status_code == 422 and answer.json()["code"] == "contradiction", answer.text


def test_what_only_the_base_can_refuse_ends_as_failed_with_a_code(server):
    status = server.wait(server.submit(**SMALL, width=65, height=64))
    assert (status["state"], status["code"]) == ("failed", "wrong-size")
    status = server.wait(server.submit(**SMALL, sampler="euler"))
    assert (status["state"], status["code"]) == ("failed", "contradiction")
    answer = server.client.get(f"/controlkit/v1/jobs/{status['id']}/result")
    assert answer.status_code == 422 and "euler" in answer.json()["detail"]


def test_a_task_says_how_an_image_is_decoded_and_has_to_be_chosen(unions):
    service = SimpleNamespace(catalogue=unions, limits=Limits())
    image = base64_of(drawing())

    def shown(control, **values):
        collected = Images(service)
        _control(ControlBody(control=control, image=image, prepared=True, values=values), 0, collected, service)
        return collected.images["control0"].shows

    assert shown("union", task="canny") == shown("depth", task="Canny") == "canny" and shown("depth") == "depth"
    with refused("missing-setting", "union", "canny, depth", "values.task"):
        shown("union")


def test_models_are_listed_with_what_they_take(server):
    models = server.get("/controlkit/v1/models")
    assert models["controls"]["canny"] == {
        "kind": "controlnet",
        "condition": "canny",
        "images": ["image"],
        "values": [],
        "tasks": [],
    }
    assert (models["bases"], models["loras"], models["vaes"]) == (["nano"], ["styles/wild"], ["own"])
    assert "canny" in models["conditions"] and "bbox" not in models["conditions"]
    assert models["parameters"]["canny"]["low"] == {"default": 100, "limits": [0, 1530]}
    assert models["parameters"]["softedge_sobel"]["safe"] == {"default": False, "limits": None}
    assert list(models["parameters"]) == models["conditions"] and "model" not in models["parameters"]["hed"]


def _wide(colour: str = "teal") -> str:
    return base64_of(Image.new("RGB", (160, 64), colour))


def test_notes_and_errors_name_no_path_of_the_server(server):
    blank, start = {"control": "canny", "image": _wide()}, {"image": _wide("red"), "strength": 0.5}
    name = server.submit(**SMALL, controls=[blank, {**blank, "prepared": True}], **start)
    assert server.wait(name)["state"] == "done"
    result = server.get(f"/controlkit/v1/jobs/{name}/result")
    notes = result["info"]["notes"]
    # Cropped images and flat condition images, of which each names its file.
    assert len([note for note in notes if "cropped" in note]) == 3 and len([n for n in notes if "flat" in n]) == 2
    unit = {"image": _wide(), "model": "canny", "module": "canny"}
    body = {"prompt": "x", "steps": 1, "alwayson_scripts": {"controlnet": {"args": [unit]}}}
    info = server.post("/sdapi/v1/txt2img", body).raise_for_status().json()["info"]
    assert "cropped" in info
    mask = server.submit(**SMALL, image=_wide(), mask=base64_of(drawing()))
    error = server.wait(mask)
    assert error["code"] == "wrong-size"
    detail = server.client.get(f"/controlkit/v1/jobs/{mask}/result").text
    for text in (json.dumps(result["info"]), info, error["error"], detail):
        assert tempfile.gettempdir() not in text and "controlkit-" not in text


@pytest.mark.parametrize(
    "control",
    [
        {"image": IMAGE, "start": 0.9, "end": 0.1},
        {"image": IMAGE, "values": {}, "images": {"image": IMAGE}},
        {},
        {"image": IMAGE, "mode": "loud"},
        {"image": IMAGE, "parameters": {"made_up": 1}},
    ],
)
def test_refusals_name_no_path_of_the_server(server, control):
    answer = server.post("/controlkit/v1/jobs", {**SMALL, "controls": [{"control": "canny", **control}]})
    if answer.status_code == 202:
        answer = server.client.get(f"/controlkit/v1/jobs/{server.wait(answer.json()['id'])['id']}/result")
    assert answer.status_code == 422
    assert "safetensors" not in answer.text and "assets" not in answer.text and ".png" not in answer.text, answer.text


def test_images_are_named_by_their_fields(server):
    name = server.submit(**SMALL, controls=[{"control": "canny", "image": _wide()}], image=_wide("red"), strength=0.5)
    server.wait(name)
    notes = server.get(f"/controlkit/v1/jobs/{name}/result")["info"]["notes"]
    cropped = [note.partition(" is ")[0] for note in notes if "cropped" in note]
    assert cropped == ["controls[0].image", "image"] and not any("--" in note for note in notes)


def test_random_seeds_are_chosen_once(server):
    name = server.submit(**SMALL, seeds=[-1, 5])
    stored = server.service.store.get(name).spec["request"]["seeds"]
    assert stored[1] == 5 and stored[0] >= 0
    server.wait(name)
    assert server.get(f"/controlkit/v1/jobs/{name}/result")["info"]["seeds"] == stored


def test_the_limit_of_pixels_holds_for_the_result_of_masked_inpainting(server):
    large, mask = [base64_of(Image.new("RGB", (512, 512), colour)) for colour in ("teal", "white")]
    name = server.submit(**SMALL, width=64, height=64, image=large, mask=mask, only_masked=0)
    status = server.wait(name)
    assert (status["state"], status["code"]) == ("failed", "out-of-range") and "512 x 512" in status["error"]


def test_condition_images_are_not_kept_and_take_the_place_of_no_result(tmp_path):
    with in_thread(tmp_path, limits=Limits(kept=2)) as running:
        kept = [running.submit(**SMALL) for _ in range(2)]
        for name in kept:
            running.wait(name)
        body = {"controlnet_module": "canny", "controlnet_images": [base64_of(drawing())]}
        for _ in range(3):
            assert len(running.post("/controlnet/detect", body).raise_for_status().json()["images"]) == 1
        damaged = {**body, "controlnet_module": "canny", "controlnet_images": [base64_of(Image.new("RGB", (8, 8)))]}
        assert running.post("/controlnet/detect", damaged).status_code == 422
        assert [each["id"] for each in running.get("/controlkit/v1/jobs")] == kept[::-1]
        for name in kept:
            assert running.get(f"/controlkit/v1/jobs/{name}/result")["images"]


def test_a_control_is_offered_without_a_restart_and_again_when_its_file_changes(tmp_path):
    """`offer_control` is what the page calls when a training has ended."""
    file = tmp_path / "mine.safetensors"
    request = {**SMALL, "controls": [{"control": "mine", "image": base64_of(drawing()), "prepared": True}]}
    with in_thread(tmp_path) as running:
        assert running.post("/controlkit/v1/jobs", request).status_code == 422

        def image() -> np.ndarray:
            name = running.submit(**request)
            assert running.wait(name)["state"] == "done"
            (text,) = running.get(f"/controlkit/v1/jobs/{name}/result")["images"]
            return np.asarray(image_of(text))

        found = []
        for shipped in ("nano/palette", "nano/scribble"):
            shutil.copyfile(shipped_controls()[shipped], file)
            running.service.offer_control("mine", file)
            found.append(image())
            assert running.get("/controlkit/v1/models")["controls"]["mine"]["condition"] == shipped.partition("/")[2]
        assert not np.array_equal(*found)
        assert np.array_equal(found[1], image())
        assert "mine" in running.get("/controlnet/model_list")["model_list"]
        with refused("wrong-kind"):
            running.service.offer_control("none", shipped_controls()["nano/base"])


def test_openai_fields_that_change_nothing_are_named(server):
    body = {"prompt": "sailboat", "seed": 1, "quality": "hd", "user": "x", "a\r\nSet-Cookie: b\u2603": 1, "": 2}
    answer = server.post("/v1/images/generations", body).raise_for_status()
    assert answer.headers["X-Controlkit-Ignored"] == 'quality, user, a%0D%0ASet-Cookie%3A%20b%E2%98%83, ""'
    assert "set-cookie" not in answer.headers
    known = server.post("/v1/images/generations", {"prompt": "sailboat", "n": 1}).raise_for_status()
    assert "X-Controlkit-Ignored" not in known.headers
    buffer = io.BytesIO()
    drawing().save(buffer, format="PNG")
    files = {"image": ("a.png", buffer.getvalue(), "image/png")}
    assert server.client.post("/v1/images/edits", files=files).json()["error"]["code"] == "missing-setting"
    form = {"prompt": "sailboat", "quality": "high"}
    edited = server.client.post("/v1/images/edits", data=form, files=files).raise_for_status()
    assert edited.headers["X-Controlkit-Ignored"] == "quality"


def test_openai_masks_and_images_are_uploaded_files(server):
    buffer = io.BytesIO()
    drawing().save(buffer, format="PNG")
    image, mask = [(name, ("a.png", buffer.getvalue(), "image/png")) for name in ("image", "mask")]
    for text in (IMAGE, f"data:image/png;base64,{IMAGE}", ""):
        for field, files in (("mask", [image]), ("image", [mask])):
            answer = server.client.post("/v1/images/edits", data={"prompt": "x", field: text}, files=files)
            assert answer.status_code == 422 and f"one {field}" in answer.text, answer.text
    answer = server.client.post("/v1/images/edits", data={"prompt": "x"}, files=[image, mask, mask])
    assert answer.status_code == 422 and "one mask" in answer.text


def test_openai_masks_are_transparent_somewhere_and_text_is_no_file(server):
    buffer = io.BytesIO()
    drawing().convert("RGBA").save(buffer, format="PNG")
    image, mask = [(name, ("a.png", buffer.getvalue(), "image/png")) for name in ("image", "mask")]
    answer = server.client.post("/v1/images/edits", data={"prompt": "x"}, files=[image, mask])
    assert answer.status_code == 422 and "no transparent pixel" in answer.json()["error"]["message"]
    for field in ("prompt", "n"):
        files = [image, (field, (f"{field}.txt", b"2", "text/plain"))]
        answer = server.client.post("/v1/images/edits", data={"prompt": "x"} if field == "n" else {}, files=files)
        assert answer.status_code == 422 and f"{field} is an uploaded file" in answer.json()["error"]["message"]


def test_openai_takes_controls_too(server):
    body = {"prompt": "sailboat", "seed": 1, "controls": [{"control": "canny", "image": IMAGE}]}
    steered, free = [
        server.post("/v1/images/generations", each).raise_for_status().json()["data"][0]["b64_json"]
        for each in (body, {**body, "controls": []})
    ]
    assert steered != free
    for wrong in ({"size": "big"}, {"response_format": "url"}, {"model": "dall-e-2"}, {"n": 0}, {"n": 9}):
        assert server.post("/v1/images/generations", {**body, **wrong}).status_code == 422
    assert [each["id"] for each in server.get("/v1/models")["data"]] == ["nano"]
