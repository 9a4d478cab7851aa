"""Start images, inpainting, LoRAs and parameters of conditions in a browser, on nano."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from test_generate import _condition, _draw, _pixels, _seeds, _unpack_results

from controlkit import conditions
from controlkit.sampling.generate import generate
from controlkit.sampling.saved_settings import read_settings


def _open(page, name: str) -> None:
    page.click(f"#{name} > button, #{name} .label-wrap")


def _alone(page) -> None:
    """Only the prompt, with one seed."""
    _condition(page)
    page.click("#control-1-remove")
    page.until(lambda: not [each for each in page.all("#control-1") if each.is_displayed()], "removal")
    _seeds(page, "5")


def _halves(folder):
    image = Image.new("RGB", (64, 64), (250, 230, 40))
    image.paste((30, 60, 200), (0, 0, 64, 32))
    image.save(folder / "halves.png")
    return folder / "halves.png", image


def test_an_image_is_the_start_and_strength_says_how_much_remains(page, tmp_path):
    _alone(page)
    path, image = _halves(tmp_path)
    _open(page, "start")
    page.upload("#start-image", path)
    far = []
    for strength in ("0.2", "1"):
        page.fill("#start-strength input[type=number]", strength)
        far.append(np.abs(_pixels(_draw(page, 1)[0]) - _pixels(image)).mean())
    assert far[0] < 0.5 * far[1]
    # It is what a result is compared with.
    assert page.one("input[type=radio][value='start image'], label.selected input").is_selected()
    page.click("#start-take")  # the result is the next start
    page.fill("#start-strength input[type=number]", "0.05")
    taken = _pixels(page.fetch(page.images("#results")[0]))
    assert np.abs(_pixels(_draw(page, 1)[0]) - taken).mean() < 0.5 * far[1]


def test_what_is_painted_is_inpainted_and_the_rest_stays(page, tmp_path):
    _alone(page)
    path, image = _halves(tmp_path)
    _open(page, "start")
    page.upload("#start-image", path)
    page.until(lambda: page.all("#start-image canvas"), "canvas")
    page.stroke("#start-image", (0.3, 0.75), (0.5, 0.75), (0.7, 0.75))
    (free,) = _draw(page, 1)
    changed = np.abs(_pixels(free) - _pixels(image)).mean(axis=(1, 2))
    assert changed[:20].mean() < 0.25 * changed[40:56].mean()
    page.fill("#start-blur input", "-3")
    page.click("#draw")
    page.until(lambda: "mask_blur is -3" in page.text("#message .error"), "a sentence")
    page.fill("#start-blur input", "2")
    page.click("#start-only input")
    _draw(page, 1)
    _unpack_results(page, tmp_path / "result")
    saved = read_settings(tmp_path / "result" / "settings.json")
    assert (saved.request.mask_blur, saved.request.only_masked) == (2, 32)
    (made,) = generate(saved.to_request()).images
    shown = page.fetch(page.images("#results")[0])
    assert np.abs(_pixels(made.image) - _pixels(shown)).max() <= 2


def test_a_lora_a_vae_and_an_embedding_are_used(page):
    _alone(page)
    (free,) = _draw(page, 1)
    assert "wavy" in page.text("#words")
    _open(page, "loras")
    page.click("#lora-names input")
    page.click_text("#lora-names [role=option]", "wild")
    page.fill("#lora-1-weight input", "0")
    (without,) = _draw(page, 1)
    page.fill("#lora-1-weight input", "1.5")
    (styled,) = _draw(page, 1)
    assert np.array_equal(_pixels(without), _pixels(free))
    assert np.abs(_pixels(styled) - _pixels(free)).mean() > 2
    page.click("#vae input")
    page.click_text("#vae [role=option]", "own")
    assert np.array_equal(_pixels(_draw(page, 1)[0]), _pixels(styled))
    before = page.one("#prompt textarea").get_attribute("value")
    page.fill("#prompt textarea", f"{before} wavy")
    worded = _pixels(_draw(page, 1)[0])
    assert "not used" not in page.text("#message") and not np.array_equal(worded, _pixels(styled))


def test_a_task_says_what_the_image_of_a_union_is(page, tmp_path):
    before = _condition(page)
    assert not [each for each in page.all("#control-1-task") if each.is_displayed()]
    page.click("#control-1-name input")
    page.click_text("#control-1-name [role=option]", "union")
    page.until(lambda: [each for each in page.all("#control-1-task input") if each.is_displayed()], "tasks")
    _seeds(page, "5")
    page.click("#draw")
    page.until(lambda: "several tasks" in page.text("#message .error"), "error")
    page.click("#control-1-task input")
    page.click_text("#control-1-task [role=option]", "canny")
    page.until(lambda: np.array_equal(_pixels(_condition(page)), _pixels(before)), "edges")
    _draw(page, 1)
    _unpack_results(page, tmp_path / "result")
    (use,) = read_settings(tmp_path / "result" / "settings.json").request.controls
    assert use.inputs["task"] == "canny"


def test_parameters_of_a_condition_are_fields_and_change_its_image(page):
    _condition(page)
    _open(page, "control-1-parameters")
    fields = page.until(lambda: page.all("#control-1-parameters input[type=number]"), "fields")
    assert [each.get_attribute("value") for each in fields if each.is_displayed()] == ["100", "200"]
    page.fill("#control-1-parameters input[type=number]", "1000")
    page.until(lambda: "high" in page.text("#message .error"), "error")
    page.fill("#control-1-parameters input[type=number]", "9999")
    said = page.until(lambda: "from 0 to 1530" in page.text("#message .error") and page.text("#message"), "error")
    assert "Traceback" not in said
    page.click("#draw")
    page.until(lambda: "from 0 to 1530" in page.text("#message .error"), "error")
    # Another control has its own.
    page.click("#control-1-name input")
    page.click_text("#control-1-name [role=option]", "nano/palette")
    page.until(lambda: "Parameters of palette" in page.text("#control-1-parameters"), "parameters")
    cells = str(conditions.find("palette").defaults["cells"])
    page.until(lambda: page.one("#control-1-parameters input[type=number]").get_attribute("value") == cells, "default")
    page.fill("#control-1-parameters input[type=number]", "2")
    page.until(lambda: len(np.unique(_pixels(_condition(page)).reshape(-1, 3), axis=0)) <= 4, "two cells")
    page.until(lambda: not page.all("#message .error"), "no error any more")
    _seeds(page, "1")
    _draw(page, 1)
    condition = page.image("#slider")
    assert len(np.unique(_pixels(condition).reshape(-1, 3), axis=0)) <= 4
    assert conditions.find("palette").defaults["cells"] > 2


def _restore(page, path) -> str:
    """Drop a file, and what the page says then."""
    if not [each for each in page.all("#dropped") if each.is_displayed()]:
        _open(page, "restore")
    clear = "#dropped button[aria-label='Clear'], #dropped button[aria-label='Remove this file']"
    if [each for each in page.all(clear) if each.is_displayed()]:
        page.click(clear)
        page.until(lambda: not [each for each in page.all(clear) if each.is_displayed()], "removal")
    page.fill("#prompt textarea", "before")
    page.upload("#dropped", path)
    page.until(lambda: page.one("#prompt textarea").get_attribute("value") != "before", "settings")
    return page.text("#message")


def _value(page, css: str) -> str:
    return page.one(css).get_attribute("value")


def test_a_result_restores_the_parameters_it_was_drawn_with(page, tmp_path):
    low = "#control-1-parameters input[type=number]"
    request = {"prompt": "house", "seeds": [3], "steps": 4}
    given = {"control": "canny", "image": "a.png", "parameters": {"low": 40}}
    (tmp_path / "given.json").write_text(json.dumps({"request": {**request, "controls": [given]}}))
    other = {"control": "canny", "image": "a.png", "prepared": True, "weight": 2.5}
    (tmp_path / "other.json").write_text(json.dumps({"request": {**request, "vae": "vaes/own", "controls": [other]}}))
    _condition(page)
    _open(page, "settings")
    _restore(page, tmp_path / "given.json")
    _open(page, "control-1-parameters")
    page.until(lambda: _value(page, low) == "40", "parameter")
    _draw(page, 1)
    _unpack_results(page, tmp_path / "result")
    _restore(page, tmp_path / "other.json")
    assert _value(page, "#vae input") == "own" and page.one("#control-1-prepared input").is_selected()
    _restore(page, tmp_path / "result" / "seed3.png")
    page.until(lambda: _value(page, low) == "40", "parameter")
    assert _value(page, "#vae input") == "default" and not page.one("#control-1-prepared input").is_selected()


def test_values_beyond_the_sliders_are_restored_and_drawn(page, tmp_path):
    request = {"prompt": "house", "seeds": [3], "steps": 4}
    _condition(page)
    for weight in (2.5, -0.5, 0.5):
        control = {"control": "canny", "image": "a.png", "weight": weight}
        (tmp_path / f"{weight}.json").write_text(json.dumps({"request": {**request, "controls": [control]}}))
        _restore(page, tmp_path / f"{weight}.json")
        assert float(_value(page, "#control-1-weight input[type=number]")) == weight
        _draw(page, 1)
    (tmp_path / "long.json").write_text(json.dumps({"request": {**request, "steps": 200}}))
    assert "150" in _restore(page, tmp_path / "long.json")
    _open(page, "settings")
    assert _value(page, "#steps input[type=number]") == "150"


def test_the_condition_image_follows_the_size(page):
    _condition(page)
    _open(page, "settings")
    page.fill("#width input", "128")
    page.until(lambda: _condition(page).size == (128, 64), "condition image of that width")
    page.fill("#height input", "128")
    page.until(lambda: _condition(page).size == (128, 128), "condition image of that height")


def test_the_condition_image_is_what_the_control_gets(page, tmp_path):
    """Of a map of labels as of a photo: the one is scaled without new colours, the other smoothly."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 2, (100, 100, 1), dtype=np.uint8) * 255
    Image.fromarray(np.repeat(noise, 3, axis=2)).save(tmp_path / "a.png")
    _condition(page)
    page.click("#control-1-name input")
    page.click_text("#control-1-name [role=option]", "nano/silhouette")
    page.click("#control-1-image button[aria-label='Clear canvas']")
    page.upload("#control-1-image", tmp_path / "a.png")
    _seeds(page, "1")

    def is_used() -> bool:
        return np.array_equal(_pixels(page.image("#slider")), _pixels(_condition(page)))

    _draw(page, 1)
    page.until(is_used, "condition image as it was used", 20)
    before = _pixels(_condition(page))
    page.click("#control-1-prepared input")
    page.until(lambda: (_pixels(_condition(page)) != before).any(), "condition image")
    _draw(page, 1)
    page.until(is_used, "condition image as it was used", 20)
    assert set(np.unique(_pixels(_condition(page)))) == {0, 255}


def test_a_mask_belongs_to_its_image_and_stays_while_it_is_hidden(page, tmp_path):
    _condition(page)
    _seeds(page, "7")
    (free,) = _draw(page, 1)
    page.click("#control-1-masked input")
    page.one("#control-1-mask canvas")
    page.click("#draw")  # the editor has its image by the time of the answer
    page.until(lambda: "mask of control 1" in page.text("#message .error"), "error")
    page.stroke("#control-1-mask", (0.3, 0.5), (0.4, 0.5), (0.7, 0.5))
    (masked,) = _draw(page, 1)
    page.click("#control-1-masked input")
    page.until(lambda: not [each for each in page.all("#control-1-mask") if each.is_displayed()], "no mask")
    assert np.array_equal(_pixels(_draw(page, 1)[0]), _pixels(free))
    page.click("#control-1-masked input")
    page.one("#control-1-mask canvas")
    assert np.array_equal(_pixels(_draw(page, 1)[0]), _pixels(masked))
    # Another image: what was painted on the one before is gone.
    Image.new("RGB", (128, 64), "white").save(tmp_path / "wide.png")
    page.click("#control-1-image button[aria-label='Clear canvas']")
    page.upload("#control-1-image", tmp_path / "wide.png")
    page.click("#draw")
    page.until(lambda: "mask of control 1" in page.text("#message .error"), "error")
    assert "empty" in page.text("#message .error")
    page.stroke("#control-1-mask", (0.3, 0.5), (0.4, 0.5), (0.7, 0.5))
    _draw(page, 1)


@pytest.mark.parametrize("listed", [True, False])
def test_more_settings_are_restored_from_a_dropped_file(page, tmp_path, listed):
    request = {
        "prompt": "house, fluent style",
        "seeds": [3],
        "steps": 7,
        "clip_skip": 2,
        "loras": [{"file": "loras/wild" if listed else "loras/none.safetensors", "weight": 0.75}],
        "vae": "vaes/own" if listed else "none",
        "controls": [{"control": "canny", "image": "a.png", "parameters": {"low": 40}}],
    }
    (tmp_path / "settings.json").write_text(json.dumps({"request": request}))
    _condition(page)
    _open(page, "restore")
    page.upload("#dropped", tmp_path / "settings.json")
    page.until(lambda: "restored" in page.text("#message"), "settings")
    assert ("none here" in page.text("#message")) != listed
    _open(page, "control-1-parameters")
    fields = "#control-1-parameters input[type=number]"
    page.until(lambda: [each.get_attribute("value") for each in page.all(fields)][:1] == ["40"], "parameter")
    _open(page, "settings")
    assert page.one("#vae input").get_attribute("value") == ("own" if listed else "default")
    _open(page, "loras")
    if listed:
        assert float(page.one("#lora-1-weight input").get_attribute("value")) == 0.75
    _draw(page, 1)
