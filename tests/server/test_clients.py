"""Unchanged clients get their images: `webuiapi` itself, and bodies as the sources of others build them."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image
from running import base64_of, drawing, image_of

from controlkit.conditions import find
from controlkit.sampling.generate import generate
from controlkit.sampling.request import GenerateRequest
from controlkit.sampling.uses import ControlUse


@pytest.fixture(scope="module")
def webui(server):
    webuiapi = pytest.importorskip("webuiapi")
    return webuiapi.WebUIApi(host="127.0.0.1", port=server.port, sampler="DDIM", steps=6)


# webuiapi


def test_webuiapi_draws_from_a_prompt(webui):
    result = webui.txt2img(prompt="red apple", width=64, height=64, seed=7, batch_size=2)
    assert [image.size for image in result.images] == [(64, 64)] * 2
    assert result.info["all_seeds"] == [7, 8]
    # It sends an eta of 1, with which A1111's DDIM adds noise.
    assert result.info["ignored"] == ["eta"] and result.parameters["prompt"] == "red apple"
    assert "Seed: 7" in result.image.info["parameters"]
    again = webui.txt2img(prompt="red apple", width=64, height=64, seed=8)
    # Batches of another size round differently.
    assert np.abs(np.asarray(again.image, int) - np.asarray(result.images[1], int)).max() <= 1


def test_webuiapi_whose_default_sampler_the_base_does_not_have_still_draws(webui):
    result = webui.txt2img(prompt="red apple", width=64, height=64, seed=1, sampler_name="Euler a", steps=2)
    assert result.image.size == (64, 64)
    assert any("euler-a" in note for note in result.info["notes"])
    assert result.info["sampler_name"] == "DDIM"


def test_webuiapi_has_a_second_pass(webui):
    result = webui.txt2img(
        prompt="red apple", width=64, height=64, seed=1, steps=4, enable_hr=True, hr_scale=1.5, denoising_strength=0.5
    )
    assert result.image.size == (96, 96)
    assert result.info["denoising_strength"] == 0.5
    assert any("Lanczos" in note for note in result.info["notes"])


def test_webuiapi_starts_from_an_image(webui):
    near, far = [
        webui.img2img(images=[drawing()], prompt="sailboat", width=64, height=64, seed=1, denoising_strength=strength)
        for strength in (0.2, 1.0)
    ]
    difference = [
        np.abs(np.asarray(result.image, np.int16) - np.asarray(drawing(), np.int16)).mean() for result in (near, far)
    ]
    assert difference[0] < 0.5 * difference[1]


@pytest.mark.parametrize("inverted", [0, 1])
def test_webuiapi_inpaints(webui, inverted):
    mask = Image.new("L", (64, 64))
    mask.paste(255, (32, 0, 64, 64))
    result = webui.img2img(
        images=[drawing()],
        mask_image=mask,
        prompt="red apple",
        width=64,
        height=64,
        seed=1,
        mask_blur=0,
        inpaint_full_res=False,
        inpainting_mask_invert=inverted,
    )
    kept = slice(32, None) if inverted else slice(None, 32)
    changed = np.abs(np.asarray(result.image, np.int16) - np.asarray(drawing(), np.int16)).mean(axis=(0, 2))
    assert changed[kept].mean() < 0.2 * np.delete(changed, np.arange(64)[kept]).mean()


def test_webuiapi_steers_by_a_unit_as_generate_does(webui, tmp_path):
    webuiapi = pytest.importorskip("webuiapi")
    unit = webuiapi.ControlNetUnit(
        image=drawing(), module="canny", model="canny", threshold_a=50, threshold_b=150, weight=0.9, guidance_end=0.8
    )
    settings = {"prompt": "sailboat", "width": 64, "height": 64, "seed": 2, "steps": 6}
    steered, free = webui.txt2img(**settings, controlnet_units=[unit]), webui.txt2img(**settings)
    assert not np.array_equal(np.asarray(steered.image), np.asarray(free.image))
    # As in A1111, the condition image follows the images.
    assert np.array_equal(np.asarray(steered.images[1]), find("canny")(np.asarray(drawing()), low=50, high=150))
    drawing().save(tmp_path / "drawing.png")
    use = ControlUse(
        control="canny",
        image=str(tmp_path / "drawing.png"),
        weight=0.9,
        end=0.8,
        mode="balanced",
        parameters={"low": 50, "high": 150},
    )
    made = generate(
        GenerateRequest(
            prompt="sailboat",
            prompt_syntax="weighted",
            controls=(use,),
            seeds=(2,),
            steps=6,
            guidance=7,
            sampler="ddim",
            device="cpu",
        )
    )
    assert np.array_equal(np.asarray(steered.image), np.asarray(made.images[0].image))


def test_webuiapi_detects(webui):
    result = webui.controlnet_detect([drawing(512)], module="canny", threshold_a=100, threshold_b=200)
    (image,) = result.images
    assert np.array_equal(np.asarray(image), find("canny")(np.asarray(drawing(512))))


def test_webuiapi_finds_its_way(webui):
    assert webui.has_controlnet
    assert webui.controlnet_version() > 1
    assert "canny" in webui.controlnet_model_list() and "canny" in webui.controlnet_module_list()
    assert "DDIM" in webui.util_get_sampler_names() and "karras" in webui.util_get_scheduler_names()
    assert webui.util_get_model_names() == ["nano"] and webui.util_get_current_model() == "nano"
    webui.util_set_model("nano")
    webui.util_wait_for_ready(0.1)
    assert webui.get_progress()["progress"] == 0
    for ask in ("cmd_flags", "upscalers", "latent_upscale_modes", "loras", "sd_vae", "embeddings", "memory"):
        getattr(webui, f"get_{ask}")()


# AbdullahAlfaraj/Auto-Photoshop-StableDiffusion-Plugin, commit 6f6d4907adf0b6a6e562d084238f02ed6b7503c1:
# utility/session.js (getSettings), typescripts/controlnet/entry.ts (mapPluginSettingsToControlNet)


def photoshop_unit(**changes):
    return {
        "enabled": False,
        "input_image": "",
        "mask": "",
        "module": "",
        "model": "",
        "weight": 1.0,
        "resize_mode": "Crop and Resize",
        "lowvram": True,
        "processor_res": 512,
        "threshold_a": 0,
        "threshold_b": 0,
        "guidance_start": 0,
        "guidance_end": 1,
        "control_mode": "Balanced",
        "pixel_perfect": True,
        **changes,
    }


def photoshop_body(units=(), **changes):
    body = {
        "prompt": "sailboat",
        "negative_prompt": "",
        "original_prompt": "sailboat",
        "original_negative_prompt": "",
        "clip_skip": 1,
        "steps": 6,
        "sampler_index": "DDIM",
        "width": 64,
        "height": 64,
        "denoising_strength": 0.7,
        "batch_size": 1,
        "cfg_scale": 7,
        "seed": "3",
        "mask_blur": 4,
        "use_sharp_mask": False,
        "use_prompt_shortcut": False,
        "prompt_shortcut_ui_dict": {},
        "uniqueDocumentId": "f0e1",
        "mode": "txt2img",
        "selection_info": {"left": 0, "top": 0, "width": 64, "height": 64},
        "restore_faces": False,
        "tiling": False,
        "alwayson_scripts": {},
    }
    if units:
        body |= {
            "controlnet_units": units,
            "subseed": -1,
            "override_settings": {},
            "override_settings_restore_afterwards": True,
            "alwayson_scripts": {"controlnet": {"args": units}},
        }
    return {**body, **changes}


def test_auto_photoshop_draws_with_units_of_which_two_are_off(server):
    unit = photoshop_unit(
        enabled=True, input_image=base64_of(drawing()), module="canny", model="canny", threshold_a=100, threshold_b=200
    )
    body = photoshop_body([unit, photoshop_unit(), photoshop_unit()], steps=10)
    answer = server.post("/sdapi/v1/txt2img", body).raise_for_status().json()
    assert len(answer["images"]) == 2  # the plugin takes what goes beyond batch_size for maps of its units
    info = json.loads(answer["info"])
    assert {"controlnet_units", "selection_info", "uniqueDocumentId", "original_prompt"} <= set(info["ignored"])
    assert info["seed"] == 3
    assert image_of(answer["images"][0]).size == (64, 64)
    # It reads the settings of each image by asking the server.
    text = server.post("/sdapi/v1/png-info", {"image": f"data:image/png;base64,{answer['images'][0]}"}).json()["info"]
    assert text.startswith("sailboat\n") and "Seed: 3" in text.splitlines()[-1]


def test_auto_photoshop_inpaints(server):
    mask = Image.new("RGB", (64, 64))
    mask.paste((255, 255, 255), (16, 16, 48, 48))
    body = photoshop_body(
        mode="inpaint",
        init_images=[base64_of(drawing())],
        mask=base64_of(mask),
        expanded_mask=base64_of(mask),
        mask_expansion=0,
        inpaint_full_res=True,
        inpaint_full_res_padding=0,
        inpainting_fill=0,
    )
    answer = server.post("/sdapi/v1/img2img", body).raise_for_status().json()
    assert image_of(answer["images"][0]).size == (64, 64)
    assert any("inpainting_fill" in note for note in json.loads(answer["info"])["notes"])


def test_auto_photoshop_fills_its_lists(server):
    assert server.get("/controlnet/settings")["control_net_unit_count"] == 3
    modules = server.get("/controlnet/module_list", params={"alias_names": "true"})
    assert set(modules["module_list"]) == set(modules["module_detail"])
    sliders = modules["module_detail"]["canny"]["sliders"]
    assert [slider["value"] for slider in sliders] == [512, 100, 200]
    body = {
        "controlnet_module": "canny",
        "controlnet_input_images": [base64_of(drawing())],
        "controlnet_processor_res": 64,
    }
    detected = server.post("/controlnet/detect", body).raise_for_status().json()["images"]
    assert image_of(detected[0]).size == (64, 64)
    progress = server.get("/sdapi/v1/progress", params={"skip_current_image": "false"})
    assert progress["current_image"] is None
    assert server.post("/sdapi/v1/interrupt").raise_for_status().json() == {}
    assert server.post("/sdapi/v1/options", {"sd_model_checkpoint": "nano"}).is_success
    assert server.post("/sdapi/v1/options", {"inpainting_mask_weight": 1}).is_success


# SillyTavern/SillyTavern, commit ba6f7b7a98cf7a5eaf4f0e81da9779a9a668ced4:
# public/scripts/extensions/stable-diffusion/index.js (generateAutoImage), src/endpoints/stable-diffusion.js


def test_sillytavern_draws(server):
    body = {
        "url": server.url,
        "auth": "name:secret",
        "prompt": "red apple",
        "negative_prompt": "lowres",
        "sampler_name": "DDIM",
        "scheduler": "automatic",
        "steps": 4,
        "cfg_scale": 7,
        "width": 64,
        "height": 64,
        "restore_faces": False,
        "enable_hr": True,
        "hr_upscaler": "Latent",
        "hr_scale": 1.5,
        "denoising_strength": 0.7,
        "hr_second_pass_steps": 0,
        "override_settings": {"CLIP_stop_at_last_layers": 1},
        "override_settings_restore_afterwards": True,
        "clip_skip": 1,
        "save_images": True,
        "send_images": True,
        "do_not_save_grid": False,
        "do_not_save_samples": False,
    }
    answer = server.post("/sdapi/v1/txt2img", body).raise_for_status()
    assert image_of(answer.json()["images"][0]).size == (96, 96)
    assert "secret" not in answer.text


def test_sillytavern_fills_its_lists(server):
    for path, field in (
        *(("upscalers", "name"), ("latent-upscale-modes", "name"), ("samplers", "name"), ("schedulers", "name")),
        *(("sd-vae", "model_name"), ("sd-models", "title")),
    ):
        assert all(isinstance(each[field], str) for each in server.get(f"/sdapi/v1/{path}"))
    assert server.get("/sdapi/v1/options")["sd_model_checkpoint"] == "nano"
    progress = server.get("/sdapi/v1/progress")
    assert progress["progress"] == 0 and progress["state"]["job_count"] == 0  # else it waits for a model to load


# open-webui/open-webui, commit 02530d501461ce58ab06231d7c2ef2024a141ddf:
# backend/open_webui/routers/images.py (set_image_model, get_models, image_generations, image_edits)


def test_open_webui_draws_as_of_a1111(server):
    names = [{"id": each["title"], "name": each["model_name"]} for each in server.get("/sdapi/v1/sd-models")]
    assert names == [{"id": "nano", "name": "nano"}]
    options = server.get("/sdapi/v1/options")
    assert server.post("/sdapi/v1/options", {**options, "sd_model_checkpoint": "nano"}).is_success
    body = {"prompt": "red apple", "batch_size": 2, "width": 64, "height": 64, "steps": 4, "negative_prompt": "lowres"}
    answer = server.post("/sdapi/v1/txt2img", body).raise_for_status().json()
    assert len(answer["images"]) == 2 and isinstance(answer["info"], str)


def test_open_webui_draws_as_of_openai(server):
    body = {"model": "nano", "prompt": "red apple", "n": 2, "size": "64x64", "response_format": "b64_json"}
    answer = server.post("/v1/images/generations", body).raise_for_status().json()
    assert [image_of(each["b64_json"]).size for each in answer["data"]] == [(64, 64)] * 2


@pytest.mark.parametrize("field", ["image", "image[]"])
def test_open_webui_edits_as_of_openai(server, field):
    buffer = io.BytesIO()
    drawing().save(buffer, format="PNG")
    form = {"model": "nano", "prompt": "sailboat", "n": "1", "size": "64x64", "response_format": "b64_json"}
    files = {field: ("5c1f.png", buffer.getvalue(), "image/png")}
    answer = server.client.post("/v1/images/edits", data=form, files=files).raise_for_status().json()
    assert image_of(answer["data"][0]["b64_json"]).size == (64, 64)


def test_masks_of_openai_are_transparent_where_the_image_changes(server):
    mask = Image.new("RGBA", (64, 64), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (32, 0, 64, 64))
    sent = {}
    for name, image in (("image", drawing()), ("mask", mask)):
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        sent[name] = (f"{name}.png", buffer.getvalue(), "image/png")
    answer = server.client.post("/v1/images/edits", data={"prompt": "red apple"}, files=sent).raise_for_status()
    image = image_of(answer.json()["data"][0]["b64_json"])
    changed = np.abs(np.asarray(image, np.int16) - np.asarray(drawing(), np.int16)).mean(axis=(0, 2))
    assert changed[:30].mean() < 0.2 * changed[34:].mean()


def test_the_settings_in_a_png_name_all_models_and_their_prompt_draws_the_image_again(webui):
    settings = {"width": 64, "height": 64, "seed": 7, "override_settings": {"sd_vae": "own"}}
    prompt, negative = "red apple <lora:styles/wild:0.8>", "blue, green"
    unit = {"image": base64_of(drawing()), "module": "canny", "model": "canny", "weight": 0.5, "guidance_end": 0.75}
    units = {"controlnet": {"args": [{**unit, "threshold_a": 50, "control_mode": 2, "resize_mode": 0}]}}
    drawn = webui.txt2img(prompt=prompt, negative_prompt=negative, alwayson_scripts=units, **settings)
    shown, told, values = drawn.image.info["parameters"].split("\n")
    assert (shown, told) == (prompt, "Negative prompt: blue, green")
    assert "VAE: own, " in values
    unit_told = values.split('ControlNet 0: "')[1].split('"')[0]
    fields = dict(field.split(": ") for field in unit_told.split(", "))
    assert fields == {
        "Module": "canny",
        "Model": "canny",
        "Weight": "0.5",
        "Resize Mode": "Just Resize",
        "Low": "50",
        "Guidance Start": "0.0",
        "Guidance End": "0.75",
        "Control Mode": "ControlNet is more important",
    }
    again = webui.txt2img(prompt=shown, negative_prompt=negative, alwayson_scripts=units, **settings)
    assert np.array_equal(np.asarray(again.image), np.asarray(drawn.image))
