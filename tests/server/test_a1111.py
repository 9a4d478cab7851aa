"""A1111's vocabulary: what is taken, what is named as ignored, what is refused."""

from __future__ import annotations

import json
import threading
import tracemalloc
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from running import base64_of, drawing, image_of, in_thread

from controlkit.conditions import find
from controlkit.images import resize_cover
from controlkit.server.a1111 import ImageToImage, TextToImage, _image_order, _loras, _text_order
from controlkit.server.catalogue import list_models
from controlkit.server.limits import Limits
from controlkit.server.modules import named_module, named_modules
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


def test_region_and_weight_and_mode_of_a_unit(server):
    white, black = [base64_of(Image.new("L", (64, 64), level)) for level in (255, 0)]
    free, _ = drawn(server)
    plain, _ = drawn(server, **with_units(unit()))
    for mask, expected in ((white, plain), (black, free)):
        made, _ = drawn(server, **with_units(unit(effective_region_mask=mask)))
        assert np.array_equal(made[0], expected[0])
    assert np.array_equal(drawn(server, **with_units(unit(weight=0)))[0][0], free[0])
    balanced, soft = [drawn(server, **with_units(unit(control_mode=mode)))[0][0] for mode in (0, 1)]
    words, _ = drawn(server, **with_units(unit(control_mode="My prompt is more important")))
    assert np.array_equal(words[0], soft) and not np.array_equal(balanced, soft)


def half(size: int = 64) -> Image.Image:
    """A mask of the right half."""
    mask = Image.new("L", (size, size))
    mask.paste(255, (size // 2, 0, size, size))
    return mask


def blackened(image: Image.Image, mask: Image.Image) -> np.ndarray:
    pixels = np.array(image)
    pixels[np.asarray(mask) > 127] = 0
    return pixels


@pytest.mark.parametrize("module", ["inpaint", "auto"])
def test_the_mask_of_a_unit_is_the_hole_of_inpainting(server, module):
    expected = blackened(drawing(), half())
    filled, _ = drawn(server, **with_units(unit(model="nano/inpaint", module=module, mask=base64_of(half()))))
    assert np.array_equal(filled[1], expected)
    given = unit(model="nano/inpaint", module="none", image=base64_of(Image.fromarray(expected)))
    assert np.array_equal(filled[0], drawn(server, **with_units(given))[0][0])
    body = {"controlnet_module": "inpaint", "controlnet_images": [base64_of(drawing())]}
    detected = server.post("/controlnet/detect", {**body, "controlnet_masks": [base64_of(half())]}).json()["images"]
    assert np.array_equal(np.asarray(image_of(detected[0])), expected)
    assert server.post("/controlnet/detect", body).json()["code"] == "missing-setting"


def test_a_unit_without_an_image_uses_that_of_img2img_and_its_mask(server):
    own, none = unit(model="nano/inpaint", module="inpaint", mask=base64_of(half())), {"resize_mode": 1}
    body = {"init_images": [base64_of(drawing())], "mask": base64_of(half()), "mask_blur": 0, "inpaint_full_res": False}
    without = {key: own[key] for key in ("module", "model")}
    first, second = [
        drawn(server, path="img2img", **{**body, **none, **with_units(each)})[0] for each in (own, without)
    ]
    assert np.array_equal(first[0], second[0]) and np.array_equal(second[1], blackened(drawing(), half()))
    (edges,) = [drawn(server, path="img2img", **{**body, **with_units({"module": "canny", "model": "canny"})})[0][1]]
    assert np.array_equal(edges, find("canny")(np.asarray(drawing())))


def units_of(service, *units, **more):
    collected = Images(service)
    return enabled_units({"ControlNet": {"args": list(units)}}, service, collected, **more), collected


@pytest.mark.parametrize(
    ("changes", "code", "facts"),
    [
        ({"mask": base64_of(half())}, "unsupported", ("effective_region_mask", "canny")),
        ({"module": "inpaint"}, "missing-setting", ("mask",)),
        ({"module": "inpaint_only"}, "unsupported", ("inpaint",)),
        ({"input_image": base64_of(half())}, "contradiction", ("image", "input_image")),
        ({"mask": "a", "mask_image": "b"}, "contradiction", ("mask", "mask_image")),
        ({"threshold_a": "100"}, "wrong-type", ("threshold_a", "'100'")),
        ({"module": "auto", "threshold_b": "much"}, "wrong-type", ("threshold_b",)),
        ({"enabled": "maybe"}, "wrong-type", ("enabled", "'maybe'")),
    ],
)
def test_values_of_a_unit_without_a_use_are_refused(catalogue_only, changes, code, facts):
    with user_error(code, "unit 0", *facts):
        units_of(catalogue_only, unit(**changes))


@pytest.fixture(scope="module")
def with_unions(unions):
    return SimpleNamespace(catalogue=unions, limits=Limits())


@pytest.mark.parametrize(
    ("changes", "task"),
    [
        ({"union_control_type": "Hard Edge", "module": "lineart"}, "canny"),
        ({"union_control_type": "Hard Edge", "module": "canny"}, "canny"),
        ({"union_control_type": "depth", "module": "none"}, "depth"),
        ({"union_control_type": "Hard Edge", "module": "auto"}, "canny"),
        ({"union_control_type": "Unknown", "module": "canny"}, "canny"),
        ({"module": "depth_midas"}, "depth"),
    ],
)
def test_a_unit_names_the_task_of_a_control_with_several(with_unions, changes, task):
    (found,), _ = units_of(with_unions, unit(model="union", **changes))
    assert found.control["inputs"] == {"image": "unit0", "task": task} and found.ignored == ()


def test_the_type_of_a_union_is_checked_and_ignored_by_other_controls(with_unions):
    for module in ("none", "auto", "grayscale"):
        with user_error("missing-setting", "unit 0", "canny, depth", "union_control_type", "hard edge"):
            units_of(with_unions, unit(model="union", module=module))
    with user_error("unknown-name", "unit 0", "'Hard Edges'", "hard edge"):
        units_of(with_unions, unit(model="union", union_control_type="Hard Edges"))
    with user_error("unknown-name", "unit 0", "'Tile'", "canny, depth"):
        units_of(with_unions, unit(model="union", union_control_type="Tile"))
    (found,), _ = units_of(with_unions, unit(union_control_type="Hard Edge"))
    assert found.ignored == ("alwayson_scripts.ControlNet.args[0].union_control_type",)


def test_a_file_that_records_a_task_keeps_it_unless_the_module_is_another(with_unions):
    for module in ("none", "auto", "grayscale"):
        (found,), _ = units_of(with_unions, unit(model="depth", module=module))
        assert found.control["image"] == "unit0"
    (found,), _ = units_of(with_unions, unit(model="depth", module="canny"))
    assert found.control["inputs"]["task"] == "canny"


def test_a_type_means_any_task_of_it(with_unions):
    entry = replace(with_unions.catalogue.controls["union"], tasks=("softedge_sobel", "scribble", "blur"))
    catalogue = replace(with_unions.catalogue, controls={"union": entry})
    only = SimpleNamespace(catalogue=catalogue, limits=Limits())
    for kind, module, task in (
        ("Soft Edge", "none", "scribble"),
        ("Soft Edge", "softedge_sobel", "softedge_sobel"),
        ("Tile", "none", "blur"),
    ):
        (found,), _ = units_of(only, unit(model="union", union_control_type=kind, module=module))
        assert found.control["inputs"]["task"] == task


def test_a_union_draws_by_its_tasks(unions, tmp_path):
    edges = base64_of(Image.fromarray(find("canny")(np.asarray(drawing()))))
    with in_thread(tmp_path / "server", catalogue=unions) as running:
        units = [
            unit(model="union", union_control_type="Hard Edge"),
            unit(model="union", union_control_type="Hard Edge", module="none", image=edges),
            unit(model="union", union_control_type="Depth", module="none", image=edges),
            unit(model="depth", module="none", image=edges),
        ]
        (canny, told), (prepared, _), (depth, _), (recorded, _) = (
            (images[0], info) for images, info in (drawn(running, **with_units(each)) for each in units)
        )
        listed = running.get("/controlkit/v1/models")["controls"]
    assert np.array_equal(canny, prepared) and np.array_equal(depth, recorded)
    assert not np.array_equal(canny, depth)
    assert "Module: canny, Model: union" in told["infotexts"][0]
    assert listed["union"]["tasks"] == ["canny", "depth"] and listed["canny"]["tasks"] == []


def test_two_names_of_a_key_may_have_the_same_value(catalogue_only):
    found, _ = units_of(catalogue_only, unit(input_image=base64_of(drawing()), lowvram=True, low_vram=True))
    assert len(found) == 1


@pytest.mark.parametrize("off", [False, 0, "false", "False", "0", "no"])
def test_switches_are_read_as_a1111_reads_them(catalogue_only, off):
    assert units_of(catalogue_only, unit(enabled=off))[0] == []
    assert len(units_of(catalogue_only, unit(enabled="true"))[0]) == 1


def test_modules_under_the_names_of_a1111(catalogue_only):
    def image(module, **settings):
        return units_of(catalogue_only, unit(module=module, **settings))[1].images["unit0"]

    assert (image("softedge_hedsafe").condition, image("softedge_hedsafe").parameters) == ("hed", {"safe": True})
    assert (image("softedge_pidisafe").condition, image("lineart_coarse").parameters) == ("pidinet", {"coarse": True})
    for settings, sigma in (({}, 9 / 512), ({"threshold_a": 4, "processor_res": 256}, 4 / 256)):
        assert image("blur_gaussian", **settings).parameters == {"sigma": sigma}
    assert (image("invert").condition, image("Invert (from white bg & black line)").invert) == (None, True)


def test_inverted_condition_images(server):
    edges = find("canny")(np.asarray(drawing()))
    dark = unit(module="invert", image=base64_of(Image.fromarray(255 - edges)))
    inverted, light = [drawn(server, **with_units(each))[0] for each in (dark, unit())]
    assert np.array_equal(inverted, light)


def test_every_listed_module_but_auto_is_known_to_detect():
    names = named_modules()
    assert "auto" not in names
    for name in names:
        named_module(name, {}, "detect")


def test_detect_names_what_it_does_not_use(server):
    body = {"controlnet_module": "canny", "controlnet_images": [base64_of(drawing())]}
    answer = server.post("/controlnet/detect", {**body, "controlnet_pixel_perfect": True}).raise_for_status()
    assert answer.headers["X-Controlkit-Ignored"] == "controlnet_pixel_perfect"
    for changes in ({"controlnet_masks": [base64_of(half())]}, {"controlnet_module": "auto"}):
        assert server.post("/controlnet/detect", {**body, **changes}).json()["code"] == "unsupported"


def test_detect_keeps_the_order_of_its_images(catalogue_only):
    from controlkit.server.controlnet import _decoded
    from controlkit.server.replies import in_words_of_clients

    names = list(_decoded("controlnet_images", [base64_of(half(8))] * 101, catalogue_only.limits))
    assert names == sorted(names)
    said = in_words_of_clients(f"{names[100]} is damaged, {names[0]} is not", catalogue_only.catalogue)
    assert said == "controlnet_images[100] is damaged, controlnet_images[0] is not"


def test_unsupported_options_are_named(server):
    answer = server.post("/sdapi/v1/options", {**server.get("/sdapi/v1/options"), "eta_ddim": 0.5}).raise_for_status()
    assert answer.headers["X-Controlkit-Ignored"] == "eta_ddim"
    fixed = {"samples_format": "webp", "sd_checkpoint_hash": "abc"}
    answer = server.post("/sdapi/v1/options", fixed).raise_for_status()
    assert answer.headers["X-Controlkit-Ignored"] == "samples_format, sd_checkpoint_hash"


@pytest.mark.parametrize("script", [{"units": [unit()]}, {"arg": [unit()]}, unit(), {"args": [unit()], "units": []}])
def test_units_in_another_place_than_args_are_refused(catalogue_only, script):
    with user_error("unknown-key", "alwayson_scripts.controlnet", "args"):
        enabled_units({"controlnet": script}, catalogue_only, Images(catalogue_only))
    assert enabled_units({"controlnet": {}}, catalogue_only, Images(catalogue_only)) == []


def order_of(catalogue_only, kind, **body):
    build, model = {"txt2img": (_text_order, TextToImage), "img2img": (_image_order, ImageToImage)}[kind]
    return build(model(**{**SMALL, **body}), catalogue_only, {})


def test_sizes_of_an_image_to_start_from(catalogue_only):
    def fit(**body):
        order = order_of(catalogue_only, "img2img", init_images=[base64_of(drawing())], **body)
        return order.collected.images["init_images[0]"].fit, order.notes

    assert fit() == fit(resize_mode=0) == ("stretch", [])
    assert (fit(resize_mode=1)[0], fit(resize_mode=2)[0]) == ("crop", "fill")
    latent, notes = fit(resize_mode=3)
    assert latent == "stretch" and "resize_mode is 3" in notes[0]


def test_blur_of_a_mask(catalogue_only):
    def blur(**body):
        images = {"init_images": [base64_of(drawing())], "mask": base64_of(half())}
        return order_of(catalogue_only, "img2img", **images, **body).values["mask_blur"]

    assert (blur(), blur(mask_blur=2), blur(mask_blur=2, mask_blur_x=7)) == (4, 2, 2)
    assert blur(mask_blur_x=3, mask_blur_y=3) == 3
    with user_error("unsupported", "mask_blur_x", 3, 4):
        blur(mask_blur_x=3)


@pytest.mark.parametrize(
    ("sampler", "eta", "is_named"),
    [
        ("DDIM", None, False),
        ("DDIM", 0, False),
        ("DDIM", 1, True),
        ("Euler a", 1, False),
        ("Euler a", 0, True),
        ("DPM++ 2M", 1, False),
        (None, 1, True),
    ],
)
def test_eta_is_named_where_it_would_have_an_effect(catalogue_only, sampler, eta, is_named):
    order = order_of(catalogue_only, "txt2img", sampler_name=sampler, eta=eta)
    assert ("eta" in order.ignored) == is_named


@pytest.mark.parametrize("scheduler", [None, "", "Automatic"])
@pytest.mark.parametrize(
    ("name", "sampler"),
    [
        ("DPM++ 2M", "dpm++-karras"),
        ("DPM2", "dpm2-karras"),
        ("DPM2 a", "dpm2-a-karras"),
        ("DPM++ 2M Karras", "dpm++-karras"),
        ("DPM++ 2M SDE Karras", "dpm++-2m-sde-karras"),
        ("Euler", "euler"),
        ("Euler a", "euler-a"),
        ("Heun", "heun"),
        ("DDIM", "ddim"),
    ],
)
def test_samplers_have_their_schedule_of_a1111(catalogue_only, name, sampler, scheduler):
    order = order_of(catalogue_only, "txt2img", sampler_name=name, scheduler=scheduler)
    assert (order.values["sampler"], order.notes) == (sampler, [])


def test_a_schedule_that_is_chosen_is_used_and_one_that_is_missing_is_named(catalogue_only):
    def sampler(**body):
        order = order_of(catalogue_only, "txt2img", **body)
        return order.values["sampler"], order.notes

    assert sampler(sampler_name="DPM++ 2M", scheduler="Uniform") == ("dpm++", [])
    assert sampler(sampler_name="Euler", scheduler="Karras") == ("euler-karras", [])
    for scheduler in ("Automatic", "Exponential"):
        found, (note,) = sampler(sampler_name="DPM++ 2M SDE", scheduler=scheduler)
        assert found == "dpm++-2m-sde" and "exponential" in note.lower()


def test_a_base_without_karras_spacing_keeps_the_sampler(server):
    _, info = drawn(server, sampler_name="DPM++ 2M", scheduler="Automatic")
    assert info["sampler_name"] == "DPM++ 2M"
    assert any("dpm++-karras" in note for note in info["notes"])


def test_zero_steps_and_a_zero_scale_are_refused(server):
    refused(server, "steps", code="out-of-range", steps=0)
    refused(server, "hr_scale", code="out-of-range", enable_hr=True, hr_scale=0)
    images, _ = drawn(server, enable_hr=True, hr_scale=0, hr_resize_x=96, hr_resize_y=96)
    assert images[0].shape == (96, 96, 3)


@pytest.mark.parametrize("path", ["/sdapi/v1/txt2img", "/controlkit/v1/jobs", "/v1/images/generations"])
def test_deep_bodies_are_refused_before_they_are_queued(server, path):
    deep: object = 1
    for _ in range(260):
        deep = [deep]
    before = server.get("/controlkit/v1/jobs", params={"limit": 1})
    control = {"control": "canny", "image": base64_of(drawing()), "values": {"x": deep}}
    body = (
        {"prompt": "x", "controls": [control]} if path.startswith("/controlkit") else {"prompt": "x", "made_up": deep}
    )
    answer = server.post(path, body)
    assert answer.status_code == 422 and "nested" in answer.text, answer.text
    assert server.get("/controlkit/v1/jobs", params={"limit": 1}) == before


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/controlkit/v1/jobs", {"seeds": [[]] * 50_000}),
        ("/controlkit/v1/jobs", {"controls": [{"control": "canny", "values": {"x": [[1] * 100] * 200}}]}),
        ("/controlkit/v1/jobs", {str(key): 1 for key in range(50_000)}),
        ("/sdapi/v1/options", {str(key): 1 for key in range(50_000)}),
        ("/controlnet/detect", {"controlnet_images": [1] * 50_000}),
    ],
)
def test_bodies_of_too_many_items_are_refused_by_one_error(server, path, body):
    answer = server.post(path, body)
    assert answer.status_code == 422 and "more than 10000 items" in answer.json()["message"], answer.text
    assert len(answer.json()["detail"]) == 1


def test_a_mask_beside_the_image_is_that_of_the_unit(catalogue_only):
    image, mask, other = [base64_of(Image.new("RGB", (64, 64), colour)) for colour in ("red", "white", "black")]

    def masks(**changes):
        _, collected = units_of(catalogue_only, unit(**{"module": "inpaint", **changes}))
        return collected.files[collected.images["unit0"].hole]

    own = masks(image=image, mask=mask)
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
    assert np.array_equal(drawn(server, prompt="red apple <lyco:styles/wild:0.8>")[0], wild)
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


def test_the_start_image_and_its_mask_return_in_the_parameters_if_asked(server):
    sent = {"init_images": [base64_of(drawing())], "mask": base64_of(half())}
    for body, expected in (({}, {"init_images": None, "mask": None}), ({"include_init_images": True}, sent)):
        answer = server.post("/sdapi/v1/img2img", {**SMALL, **sent, **body}).raise_for_status().json()
        assert len(answer["images"]) == 1
        assert {key: answer["parameters"][key] for key in sent} == expected


def test_batches_have_one_image_as_in_a1111(catalogue_only):
    values = order_of(catalogue_only, "txt2img", n_iter=3).values
    assert (values["batch_size"], len(values["seeds"])) == (1, 3)
    values = order_of(catalogue_only, "txt2img", n_iter=3, batch_size=2).values
    assert (values["batch_size"], len(values["seeds"])) == (2, 6)


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("img2img", {"denoising_strength": 2}, "denoising_strength is 2"),
        ("txt2img", {"enable_hr": True, "denoising_strength": 2}, "denoising_strength is 2"),
        ("txt2img", {"enable_hr": True, "hr_scale": 0.5}, "hr_scale is 0.5"),
        ("txt2img", {"cfg_scale": 0.5}, "cfg_scale is 0.5"),
        ("txt2img", {"negative_prompt": "<lora:x:1>"}, "not in negative_prompt"),
    ],
)
def test_errors_have_the_names_of_a1111(server, path, body, field):
    start = {"init_images": [base64_of(drawing())]} if path == "img2img" else {}
    answer = server.post(f"/sdapi/v1/{path}", {**SMALL, **start, **body})
    assert answer.status_code == 422 and field in answer.json()["message"], answer.text


def test_a_waiting_client_keeps_only_what_it_sent(server, monkeypatch):
    from controlkit.server import replies

    noise = np.random.default_rng(0).integers(0, 256, (600, 600, 3), np.uint8)
    image, wait, kept = base64_of(Image.fromarray(noise)), replies._waited, []

    async def measured(*values):
        job = await wait(*values)
        kept.append(tracemalloc.get_traced_memory()[0] - before)
        return job

    monkeypatch.setattr(replies, "_waited", measured)
    body = json.dumps({**SMALL, "init_images": [image], **with_units(unit(enabled=False))}).encode()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0] + len(body)  # FastAPI keeps the bytes
        headers = {"Content-Type": "application/json"}
        server.client.post("/sdapi/v1/img2img", content=body, headers=headers).raise_for_status()
    finally:
        tracemalloc.stop()
    assert kept[0] < len(body) / 2


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
