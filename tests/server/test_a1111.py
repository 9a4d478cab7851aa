"""A1111's vocabulary: what is taken, what is named as ignored, what is refused."""

from __future__ import annotations

import json
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from running import base64_of, drawing, image_of

from controlkit.conditions import find
from controlkit.images import resize_cover
from controlkit.server.a1111 import _loras
from controlkit.server.catalogue import list_models
from controlkit.server.limits import Limits
from controlkit.server.native import Images
from controlkit.server.units import enabled_units
from refusals import refused as user_error

SMALL = {"prompt": "red apple", "width": 64, "height": 64, "steps": 2, "seed": 1, "sampler_name": "DDIM"}


def drawn(server, path="txt2img", **body):
    answer = server.post(f"/sdapi/v1/{path}", {**SMALL, **body})
    assert answer.status_code == 200, answer.text
    values = answer.json()
    return [np.asarray(image_of(text)) for text in values["images"]], json.loads(values["info"])


def refused(server, *facts, path="/sdapi/v1/txt2img", code=None, **body):
    answer = server.post(path, {**SMALL, **body})
    assert answer.status_code == 422, answer.text
    assert code is None or answer.json()["code"] == code, answer.text
    for fact in facts:
        assert str(fact) in answer.text


def unit(**changes):
    return {"image": base64_of(drawing()), "module": "canny", "model": "canny", **changes}


@pytest.fixture(scope="module")
def catalogue_only():
    """The part of a service that reads a request, without a worker."""
    return SimpleNamespace(catalogue=list_models(), limits=Limits())


def with_units(*units, name="ControlNet"):
    return {"alwayson_scripts": {name: {"args": list(units)}}}


def test_keys_that_do_nothing_here_are_named():
    from controlkit.server.a1111 import _means_nothing

    assert _means_nothing("s_churn", 0) and _means_nothing("styles", []) and _means_nothing("script_name", None)
    assert not _means_nothing("s_churn", 0.5) and not _means_nothing("made_up", None)


def test_foreign_keys_scripts_and_options_are_named_in_info(server):
    scripts = {"ADetailer": {"args": [True, {"ad_model": "face"}]}, "Off": {"args": [False]}}
    _, info = drawn(
        server, tiling=True, made_up=1, alwayson_scripts=scripts, override_settings={"eta_noise_seed_delta": 31337}
    )
    expected = {"tiling", "made_up", "alwayson_scripts.ADetailer", "override_settings.eta_noise_seed_delta"}
    assert set(info["ignored"]) == expected


def test_script_names_and_keys_of_units_are_matched_in_any_case(server):
    spellings = [with_units(unit(), name=name) for name in ("ControlNet", "controlnet", "CONTROLNET")]
    spellings += [
        with_units({change(key): value for key, value in unit().items()}) for change in (str.upper, str.title)
    ]
    first, *others = [drawn(server, **body)[0] for body in spellings]
    assert all(np.array_equal(each, first) for each in others)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"wieght": 1}, "unknown-key"),
        ({"weight": "much"}, "wrong-type"),
        ({"model": "no such"}, "unknown-name"),
        ({"model": "None"}, "missing-setting"),
        ({"module": "no such"}, "unknown-name"),
        ({"module": "identity"}, "unsupported"),
        ({"image": ""}, "missing-setting"),
        ({"image": "/etc/passwd"}, "bad-image"),
        ({"image": "http://127.0.0.1/x.png"}, "bad-image"),
        ({"image": base64_of(Image.new("RGB", (1100, 1000)))}, "bad-image"),
        ({"control_mode": "Loud"}, "unknown-name"),
        ({"resize_mode": "Loud"}, "unknown-name"),
        ({"guidance_start": 0.9, "guidance_end": 0.1}, "out-of-range"),
        ({"batch_images": "/etc"}, "unsupported"),
        ({"hr_option": "Low res only"}, "unsupported"),
    ],
)
def test_units_that_cannot_be_used_are_refused_before_they_are_queued(server, change, code):
    before = server.get("/controlkit/v1/jobs", params={"limit": 1})
    refused(server, code=code, **with_units(unit(**change)))
    assert server.get("/controlkit/v1/jobs", params={"limit": 1}) == before


def test_disabled_units_do_nothing_but_their_keys_are_checked(server):
    plain, _ = drawn(server)
    off, _ = drawn(server, **with_units({"enabled": False, "input_image": "", "model": ""}))
    assert np.array_equal(plain, off)
    refused(server, "made_up", code="unknown-key", **with_units({"enabled": False, "made_up": 1}))


def test_models_are_found_by_the_names_that_clients_send_back(server):
    names = [*(f"{name}{hash}" for name in ("canny", "Canny") for hash in ("", " [d14c016b]")), "canny.safetensors"]
    first, *others = [drawn(server, **with_units(unit(model=name)))[0] for name in names]
    assert all(np.array_equal(each, first) for each in others)
    assert np.array_equal(drawn(server, **with_units(unit(model="edges_v2")))[0], first)


def test_modules_compute_the_condition_image(server):
    given = np.asarray(drawing())
    edges = find("canny")(given)
    prepared = unit(module="none", image=base64_of(Image.fromarray(edges)))
    own, none, auto = [drawn(server, **with_units(each))[0] for each in (unit(), prepared, unit(module="auto"))]
    assert np.array_equal(own[1], edges) and np.array_equal(own, auto)
    assert np.array_equal(own[0], none[0]) and len(none) == 1
    other, _ = drawn(server, **with_units(unit(module="scribble")))
    assert np.array_equal(other[1], find("scribble")(given)) and not np.array_equal(other[0], own[0])
    quiet, _ = drawn(server, **with_units(unit(save_detected_map=False)))
    assert len(quiet) == 1 and np.array_equal(quiet[0], own[0])


def test_thresholds_outside_of_their_limits_mean_the_defaults(server):
    default, outside = [drawn(server, **with_units(unit(**each)))[0] for each in ({}, {"threshold_a": -1})]
    assert np.array_equal(default, outside)
    low, _ = drawn(server, **with_units(unit(threshold_a=10, threshold_b=20)))
    assert np.array_equal(low[1], find("canny")(np.asarray(drawing()), low=10, high=20))


def test_resize_modes(server):
    wide = drawing().resize((96, 48))
    maps = {}
    for mode in ("Just Resize", 1, "Resize and Fill"):
        send = unit(image=base64_of(wide), module="grayscale", resize_mode=mode)
        maps[mode] = drawn(server, **with_units(send))[0][1]
    assert np.array_equal(maps[1], find("grayscale")(np.asarray(resize_cover(wide, 64, 64))))
    assert np.array_equal(
        maps["Just Resize"], find("grayscale")(np.asarray(wide.resize((64, 64), Image.Resampling.LANCZOS)))
    )
    assert (maps["Resize and Fill"][:10] == maps["Resize and Fill"][0, 0]).all()


def test_masks_and_weight_and_mode_of_a_unit(server):
    white, black = [base64_of(Image.new("L", (64, 64), level)) for level in (255, 0)]
    free, _ = drawn(server)
    plain, _ = drawn(server, **with_units(unit()))
    for mask, expected in ((white, plain), (black, free)):
        for key in ("mask", "mask_image", "effective_region_mask"):
            made, _ = drawn(server, **with_units(unit(**{key: mask})))
            assert np.array_equal(made[0], expected[0])
    assert np.array_equal(drawn(server, **with_units(unit(weight=0)))[0][0], free[0])
    balanced, soft = [drawn(server, **with_units(unit(control_mode=mode)))[0][0] for mode in (0, 1)]
    words, _ = drawn(server, **with_units(unit(control_mode="My prompt is more important")))
    assert np.array_equal(words[0], soft) and not np.array_equal(balanced, soft)


def test_a_mask_beside_the_image_is_that_of_the_unit(catalogue_only):
    image, mask, other = [base64_of(Image.new("RGB", (64, 64), colour)) for colour in ("red", "white", "black")]

    def masks(**changes):
        collected = Images(catalogue_only)
        (found,) = enabled_units({"ControlNet": {"args": [unit(**changes)]}}, catalogue_only, collected)
        return collected.files.get(found.control["mask"])

    own = masks(image=image, mask=mask)
    assert own is not None and masks(image=image) is None
    assert masks(image={"image": image, "mask": mask}) == own
    assert masks(image={"image": image, "mask": mask}, mask=mask) == own
    assert masks(image={"image": image}, mask=mask) == own
    with user_error("contradiction", "unit 0"):
        masks(image={"image": image, "mask": mask}, mask=other)


def test_thresholds_that_auto_does_not_use_are_named(catalogue_only):
    def ignored(**changes):
        (found,) = enabled_units({"ControlNet": [unit(**changes)]}, catalogue_only, Images(catalogue_only))
        return found.ignored

    place = "alwayson_scripts.ControlNet.args[0]"
    assert ignored(module="auto", threshold_a=20, threshold_b=40) == (f"{place}.threshold_a", f"{place}.threshold_b")
    assert ignored(module="auto", threshold_b=40) == (f"{place}.threshold_b",)
    for nothing in ({}, {"threshold_a": -1, "threshold_b": None}, {"threshold_a": 100, "threshold_b": 200}):
        assert ignored(module="auto", **nothing) == ()
    assert ignored(module="canny", threshold_a=20, threshold_b=40) == ()


def test_loras_are_taken_out_of_the_prompt(server):
    plain, _ = drawn(server)
    wild, info = drawn(server, prompt="red apple <lora:styles/wild:0.8>")
    assert not np.array_equal(wild, plain) and info["prompt"] == "red apple"
    none, info = drawn(server, prompt="red apple<lora:styles/wild:0>")
    assert np.array_equal(none, plain)
    _, info = drawn(server, prompt="red apple <lora:../../secret:1>")
    assert any("../../secret" in note for note in info["notes"])


def test_options_choose_models_and_stay(server):
    plain, _ = drawn(server)
    own, info = drawn(server, override_settings={"sd_vae": "own"})
    assert info["sd_vae_name"] == "own" and np.array_equal(own, plain)
    assert server.post("/sdapi/v1/options", {"sd_vae": "own"}).is_success
    assert server.get("/sdapi/v1/options")["sd_vae"] == "own"
    assert drawn(server)[1]["sd_vae_name"] == "own"
    assert server.post("/sdapi/v1/options", {"sd_vae": "Automatic"}).is_success
    assert drawn(server)[1]["sd_vae_name"] is None
    for name in ("/etc/passwd", "../own", "nobody/nothing"):
        refused(server, code="unknown-name", override_settings={"sd_model_checkpoint": name})
        assert server.post("/sdapi/v1/options", {"sd_model_checkpoint": name}).status_code == 422


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"steps": 151}, "out-of-range"),
        ({"batch_size": 3, "n_iter": 3}, "out-of-range"),
        ({"width": 264, "height": 256}, "out-of-range"),
        ({"width": 128, "height": 128, "enable_hr": True, "hr_scale": 3}, "out-of-range"),
        ({"width": 65}, "wrong-size"),
        ({"prompt": "x" * 10_001}, "out-of-range"),
        ({"sampler_name": "Made up"}, "unknown-name"),
        ({"seed": 2**64}, "out-of-range"),
        ({"cfg_scale": 0.5}, "out-of-range"),
        ({"width": "wide"}, "wrong-type"),
        (with_units(unit(), unit(), unit(), unit()), "out-of-range"),
    ],
)
def test_more_than_the_limits_or_than_makes_sense_is_refused(server, body, code):
    refused(server, code=code, **body)


def test_damaged_images_are_refused_without_paths_of_the_server(server):
    text = base64_of(drawing())
    cut = text[: len(text) // 2 // 4 * 4]
    answer = server.post("/sdapi/v1/img2img", {**SMALL, "init_images": [cut]})
    assert answer.status_code == 422 and answer.json()["code"] == "bad-image"
    assert "/tmp" not in answer.text and "init_images[0]" in answer.text
    refused(server, path="/sdapi/v1/img2img", code="unsupported", init_images=[])


def test_hires_by_its_size(server):
    images, info = drawn(server, enable_hr=True, hr_resize_x=96, hr_resize_y=96, hr_upscaler="Lanczos")
    assert images[0].shape == (96, 96, 3) and info["notes"] == []
    refused(server, code="unsupported", enable_hr=True, hr_resize_x=96, hr_resize_y=128)


def test_an_image_returns_with_the_others_if_asked(server):
    images, _ = drawn(server, path="img2img", init_images=[base64_of(drawing())], include_init_images=True)
    assert np.array_equal(images[1], np.asarray(drawing()))


def test_interrupt_ends_the_running_request_within_a_step_and_returns_what_is_finished(server):
    long = {**SMALL, "steps": 150, "batch_size": 1, "n_iter": 8}
    answers = []
    thread = threading.Thread(target=lambda: answers.append(server.post("/sdapi/v1/txt2img", long)))
    thread.start()
    while True:
        progress = server.get("/sdapi/v1/progress")
        if progress["state"]["sampling_step"] >= 160:
            break
    assert 0 < progress["progress"] < 1 and progress["eta_relative"] > 0
    assert progress["state"]["sampling_steps"] == 8 * 150 and progress["state"]["job_count"] == 1
    assert image_of(progress["current_image"]).size == (64, 64)
    server.post("/sdapi/v1/interrupt").raise_for_status()
    thread.join(30)
    values = answers[0].json()
    info = json.loads(values["info"])
    assert answers[0].status_code == 200 and info["interrupted"]
    assert 1 <= len(values["images"]) < 8 and info["all_seeds"] == list(range(1, 1 + len(values["images"])))


@pytest.mark.parametrize(
    ("weight", "code"),
    [
        ("0.8:0.2", "unsupported"),
        ("te=0.2:unet=0.8", "unsupported"),
        ("abc", "wrong-type"),
        ("", "wrong-type"),
        ("0.5.", "wrong-type"),
        ("nan", "wrong-type"),
    ],
)
def test_weights_of_loras_are_one_number(server, weight, code):
    for name in ("styles/wild", "not listed"):
        refused(server, f"<lora:{name}:{weight}>", code=code, prompt=f"red apple <lora:{name}:{weight}>")


@pytest.mark.parametrize(("tail", "weight"), [("", 1), (":0.8", 0.8), (":-.5", -0.5), (": 2 ", 2)])
def test_weights_of_loras(tail, weight, models):
    service = SimpleNamespace(catalogue=list_models(loras=[str(models / "loras")]))
    prompt, loras, missing = _loras(f"red apple <lora:styles/wild{tail}>", service)
    assert (prompt, missing) == ("red apple", []) and loras == [{"file": "styles/wild", "weight": weight}]


def test_png_info_reads_any_image(server):
    assert server.post("/sdapi/v1/png-info", {"image": base64_of(drawing())}).json()["info"] == ""
    assert server.post("/sdapi/v1/png-info", {"image": "x"}).status_code == 422


def test_control_types_list_what_fits(server):
    types = server.get("/controlnet/control_types")["control_types"]
    assert types["canny"]["default_option"] == "canny" and types["canny"]["default_model"] == "canny"
    assert {"canny", "Edges_v2", "nano/canny"} <= set(types["canny"]["model_list"])
    models = server.get("/controlnet/model_list")["model_list"]
    assert types["All"]["model_list"] == ["None", *models]
    assert "nano/base" not in models and "broken" not in models
