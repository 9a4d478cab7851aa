"""The tab *Generate* in a browser, on nano."""

from __future__ import annotations

import json
import re
import zipfile

import httpx
import numpy as np
import pytest
from PIL import Image

from controlkit import conditions
from controlkit.sampling.generate import generate
from controlkit.sampling.saved_settings import read_settings

CONDITION = "#control-1-condition"


def _pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB")).astype(int)


def _condition(page) -> Image.Image:
    return page.until(lambda: page.image(CONDITION), "condition image")


def _draw(page, count: int) -> list[Image.Image]:
    before = page.images("#results")
    page.click("#draw")
    page.until(
        lambda: page.images("#results") not in ([], before) and re.match(r"\d+ images? in", page.text("#message")),
        "results",
    )
    found = page.images("#results")
    assert len(found) == count
    return [page.fetch(url) for url in found]


def _unpack_results(page, folder) -> None:
    """Download the archive of the results and unpack it."""
    page.click("#download")
    archive = page.until(lambda: next(iter(page.downloads.glob("*.zip")), None), "download")
    with zipfile.ZipFile(archive) as file:
        file.extractall(folder)
    archive.unlink()


def _seeds(page, text: str) -> None:
    if not [each for each in page.all("#seeds textarea, #seeds input") if each.is_displayed()]:
        page.click("#settings > button, #settings .label-wrap")
    page.fill("#seeds textarea, #seeds input", text)


def test_it_opens_with_a_drawing_and_one_button_draws(page, served, tmp_path):
    condition = _condition(page)
    assert condition.size == (64, 64)
    edges = _pixels(condition)
    assert set(np.unique(edges)) == {0, 255} and 0.03 < (edges == 255).mean() < 0.4
    images = _draw(page, 4)
    assert all(image.size == (64, 64) for image in images)
    for image in images:  # the prompt asks for teal
        red, green, blue = np.median(_pixels(image)[:8].reshape(-1, 3), axis=0)
        assert red < green and red < blue
    outside = [url for url in page.requested() if not url.startswith((served.root, "data:", "blob:", "chrome"))]
    assert outside == []  # it works without the internet

    _unpack_results(page, tmp_path)
    made = generate(read_settings(tmp_path / "settings.json").to_request())
    assert [one.seed for one in made.images] == [0, 1, 2, 3]
    for one, shown in zip(made.images, images, strict=True):
        assert np.abs(_pixels(one.image) - _pixels(shown)).max() <= 2
    saved = read_settings(tmp_path / "seed2.png").request
    assert saved.seeds == (2,) and saved.prompt.startswith("sailboat")


def test_a_stroke_and_an_upload_change_the_condition_image(page, tmp_path):
    first = _pixels(_condition(page))
    page.stroke("#control-1-image", (0.35, 0.3), (0.5, 0.3), (0.65, 0.3))
    page.until(lambda: (_pixels(_condition(page)) != first).any(), "other condition image")
    image = Image.new("RGB", (64, 64), "white")
    image.paste("black", (16, 16, 48, 48))
    image.save(tmp_path / "square.png")
    page.click("#control-1-image button[aria-label='Clear canvas']")
    page.upload("#control-1-image", tmp_path / "square.png")
    expected = conditions.find("canny")(np.asarray(image)).astype(int)
    page.until(lambda: np.abs(_pixels(_condition(page)) - expected).mean() < 8, "condition image of the upload")


def test_a_mask_is_painted_and_used(page):
    _condition(page)
    _seeds(page, "7")
    (free,) = _draw(page, 1)
    page.click("#control-1-masked input")
    page.one("#control-1-mask canvas")
    page.click("#draw")
    page.until(lambda: "mask of control 1" in page.text("#message .error"), "error")
    page.stroke("#control-1-mask", (0.3, 0.5), (0.4, 0.5), (0.7, 0.5))
    page.click("#draw")
    page.until(lambda: "1 image in" in page.text("#message"), "result")
    masked = page.fetch(page.images("#results")[0])
    assert np.abs(_pixels(free) - _pixels(masked)).mean() > 3


def test_errors_are_sentences(page):
    _condition(page)
    _seeds(page, "1,1")
    page.click("#draw")
    said = page.until(lambda: page.text("#message .error"), "error")
    assert "repeat" in said and "Traceback" not in said
    _seeds(page, "one")
    page.click("#draw")
    page.until(lambda: page.text("#message .error") not in ("", said), "error")
    page.click("#control-1-image button[aria-label='Clear canvas']")
    _seeds(page, "1")
    page.click("#draw")
    page.until(lambda: "has no image" in page.text("#message .error"), "error")


def test_settings_are_restored_from_a_dropped_png(page, tmp_path):
    from PIL.PngImagePlugin import PngInfo

    request = {
        "prompt": "house, fluent style",
        "seeds": [11, 12],
        "steps": 9,
        "controls": [{"control": "nano/scribble", "image": "a.png", "weight": 0.6, "end": 0.5}],
    }
    info = PngInfo()
    info.add_itxt("controlkit", json.dumps({"request": request}))
    Image.new("RGB", (8, 8)).save(tmp_path / "made.png", pnginfo=info)
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    _condition(page)
    page.click("#restore > button, #restore .label-wrap")
    page.upload("#dropped", tmp_path / "plain.png")
    assert "no settings" in page.until(lambda: page.text("#message .error"), "error")
    page.click("#dropped button[aria-label='Clear'], #dropped button[aria-label='Remove this file']")
    page.upload("#dropped", tmp_path / "made.png")
    page.until(lambda: "restored" in page.text("#message"), "settings")
    assert page.one("#prompt textarea").get_attribute("value") == "house, fluent style"
    assert page.one("#control-1-name input").get_attribute("value") == "nano/scribble"
    assert float(page.one("#control-1-weight input[type=number]").get_attribute("value")) == pytest.approx(0.6)
    assert len(_draw(page, 2)) == 2


def test_controls_are_added_and_removed(page):
    _condition(page)
    page.click("#add-control")
    page.one("#control-2-name")
    page.click("#control-2-remove")
    page.until(lambda: not [each for each in page.all("#control-2") if each.is_displayed()], "removal")
    page.click("#control-1-remove")
    page.until(lambda: not [each for each in page.all("#control-1") if each.is_displayed()], "removal")
    _draw(page, 4)  # from the prompt alone


def test_a_sheet_is_drawn(page):
    _condition(page)
    page.click("#xy > button, #xy .label-wrap")
    page.click("#draw-sheet")
    sheet = page.until(lambda: page.image("#sheet"), "sheet")
    assert page.text("#message") == "8 cells"
    assert sheet.width > 4 * 128 and sheet.height > 2 * 128


def test_drawing_is_cancelled(page):
    _condition(page)
    _seeds(page, "0-15")
    page.fill("#steps input[type=number]", "150")
    page.click("#draw")
    page.until(lambda: "step" in page.text("#message"), "progress")
    page.click("#cancel")
    page.until(lambda: "cancelled" in page.text("#message"), "end")


@pytest.mark.parametrize("button", ["draw", "draw-sheet"])
def test_what_nobody_waits_for_is_not_drawn(page, served, button):
    def newest() -> dict:
        jobs = httpx.get(f"{served.root}/controlkit/v1/jobs", trust_env=False).json()
        return next(job for job in jobs if job["kind"] == "generate")

    _condition(page)
    _seeds(page, "0-15")
    page.fill("#steps input[type=number]", "150")
    if button == "draw-sheet":
        page.click("#xy > button, #xy .label-wrap")
    page.click(f"#{button}")
    page.until(lambda: "step" in page.text("#message"), "progress")
    name = newest()["id"]
    page.open(f"{served.url}/")
    page.until(lambda: newest()["state"] == "cancelled", "cancellation", 30)
    assert newest()["id"] == name  # no other cell of the sheet


def test_it_fits_a_phone(page):
    page.resize(390, 844)
    _condition(page)
    _draw(page, 4)
    assert page.driver.execute_script("return document.documentElement.scrollWidth") <= 390
