"""Pairs, training and comparison in a browser, on nano."""

from __future__ import annotations

import json
import zipfile

import httpx
import numpy as np
import pytest
from PIL import Image, ImageDraw
from safetensors import safe_open


def _icons(folder, count: int = 20) -> list:
    """Images of shapes, with captions."""
    rng = np.random.default_rng(0)
    paths = []
    for index in range(count):
        image = Image.new("RGB", (64, 64), "white")
        left, top = (int(value) for value in rng.integers(4, 24, 2))
        draw = ImageDraw.Draw(image)
        shape = (draw.ellipse, draw.rectangle)[index % 2]
        shape((left, top, left + 34, top + 34), fill=tuple(int(value) for value in rng.integers(0, 200, 3)))
        path = folder / f"shape{index:02}.png"
        image.save(path)
        path.with_suffix(".txt").write_text(("circle", "square")[index % 2])
        paths += [path, path.with_suffix(".txt")]
    return paths


def test_pairs_are_made_trained_on_stopped_resumed_and_compared(page, served, tmp_path):
    page.click_text("button[role=tab]", "Pairs")
    page.fill("#pairs-name textarea, #pairs-name input", "shapes")
    page.click_text("button[role=tab]", "Make pairs from images")
    page.upload("#pairs-images", *_icons(tmp_path))
    page.until(lambda: "shape19" in page.text("#pairs-images"), "uploads")
    page.click("#pairs-make")
    page.until(lambda: "20 pairs of canny; nothing wrong" in page.text("#pairs-message"), "pairs", 120)
    assert page.until(lambda: page.image("#pairs-sheet"), "sheet").width > 100

    page.click_text("button[role=tab]", "Adapt")
    page.fill("#adapt-name input", "first")
    page.fill("#adapt-steps input", "100000")
    page.fill("#adapt-pairs input", "shapes")
    page.click("#adapt-start")
    page.until(lambda: "step" in page.text("#adapt-message"), "a step", 240)
    page.open(f"{served.url}/")
    page.click_text("button[role=tab]", "Adapt")
    page.fill("#adapt-name input", "first")
    shown = page.until(lambda: "first: running; step" in page.text("#adapt-message") and page.text("#adapt-message"))
    page.until(lambda: page.text("#adapt-message") != shown, "another step")
    page.click("#adapt-start")  # it runs already: it is watched
    page.until(lambda: "first runs already" in page.text("body"), "information")
    page.fill("#adapt-name input", "second")
    page.until(lambda: page.text("#adapt-message") == "", "nothing of a new name")
    page.fill("#adapt-name input", "first")
    page.until(lambda: "first: running; step" in page.text("#adapt-message"), "a step", 240)
    page.click("#adapt-stop")
    page.until(lambda: "stopping" in page.text("#adapt-message"), "stopping")
    page.click("#adapt-stop")
    page.fill("#adapt-pairs input", "shapes")
    page.until(lambda: "stopped at step" in page.text("#adapt-message"), "stop", 120)
    done = json.loads((served.work / "runs" / "first" / "log.jsonl").read_text().splitlines()[-1])["step"]

    page.fill("#adapt-steps input", str(max(20, done + 3)))
    page.click("#adapt-start")
    page.until(lambda: "first: done" in page.text("#adapt-message"), "end", 400)
    assert page.image("#adapt-preview").width > 100
    assert "canny" in page.text("#adapt-report")
    lines = [json.loads(line) for line in (served.work / "runs" / "first" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, max(20, done + 3) + 1))  # resumed, not begun again
    page.click("#adapt-download")
    file = page.until(lambda: next(iter(page.downloads.glob("*.safetensors")), None), "download")
    with safe_open(file, "pt") as adapter:
        assert list(adapter.keys())
    assert (served.work / "adapters" / "first.safetensors").read_bytes() == file.read_bytes()

    page.click_text("button[role=tab]", "Generate")
    page.click("#control-1-name input")
    page.click_text("#control-1-name [role=option]", "first")
    page.click("#draw")
    page.until(lambda: "4 images in" in page.text("#message"), "results", 240)
    models = httpx.get(f"{served.root}/controlkit/v1/models", trust_env=False).json()
    assert models["controls"]["first"]["condition"] == "canny"
    page.click_text("button[role=tab]", "Adapt")
    page.fill("#adapt-name input", "canny")  # would take the place of a control
    page.click("#adapt-start")
    page.until(lambda: "canny already" in page.text("#adapt-message .error"), "error")

    page.click_text("button[role=tab]", "Compare")
    report = json.loads((served.work / "runs" / ".first.out").read_text())["report"]
    (tmp_path / "other.json").write_text(json.dumps({"report": {**report, "title": "another title"}}))
    page.upload("#compare-right-file", tmp_path / "other.json")
    page.until(lambda: "another title" in page.text("#compare-right-report"), "report")
    page.click("#compare-refresh")
    page.click("#compare-left input")
    page.click_text("#compare-left [role=option]", "first")
    page.until(lambda: report["title"] in page.text("#compare-left-report"), "report")


def test_problems_of_pairs_are_listed_and_errors_are_sentences(page, tmp_path):
    page.click_text("button[role=tab]", "Pairs")
    archive = tmp_path / "pairs.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for index, path in enumerate(_icons(tmp_path, 4)[::2]):
            file.write(path, f"target/{index}.png")
            if index:
                file.write(path, f"source/{index}.png")
        rows = [{"source": f"source/{n}.png", "target": f"target/{n}.png", "prompt": "circle"} for n in range(4)]
        file.writestr("prompt.json", "\n".join(map(json.dumps, rows)))
    page.click("#pairs-unpack")
    page.until(lambda: "choose a ZIP" in page.text("#pairs-message .error"), "error")
    page.fill("#pairs-name textarea, #pairs-name input", "../broken")
    page.upload("#pairs-zip", archive)
    page.until(lambda: "pairs.zip" in page.text("#pairs-zip"), "upload")
    page.click("#pairs-unpack")
    page.until(lambda: "letters, digits" in page.text("#pairs-message .error"), "error")
    page.fill("#pairs-name textarea, #pairs-name input", "broken")
    page.click("#pairs-unpack")
    page.until(lambda: "problems" in page.text("#pairs-message .error"), "problems", 120)
    page.click_text("button[role=tab]", "Adapt")
    page.fill("#adapt-pairs input", "none")
    page.click("#adapt-start")
    page.until(lambda: "no pairs 'none'" in page.text("#adapt-message .error"), "error")


@pytest.mark.parametrize("path", ["http://127.0.0.1:9/x.png", "https://example.org/x.png", "file:///etc/passwd"])
def test_addresses_are_refused_in_place_of_files(served, path):
    body = {"data": [{"path": path, "meta": {"_type": "gradio.FileData"}}], "fn_index": 0, "session_hash": "x"}
    answer = httpx.post(f"{served.root}/ui/gradio_api/queue/join", json=body, trust_env=False)
    assert answer.status_code == 422 and "address" in answer.json()["detail"]
    assert httpx.get(f"{served.root}/ui/gradio_api/file={path}", trust_env=False).status_code in (403, 404, 422)
    assert httpx.get(f"{served.root}/ui/gradio_api/file=/etc/hostname", trust_env=False).status_code in (403, 404)
