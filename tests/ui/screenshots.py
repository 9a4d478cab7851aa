"""Take the screenshots of docs/ui.md: `python tests/ui/screenshots.py docs/images`.

It serves nano's page, uses it in a headless Chromium, and trains the README's adapter on it. Needs the extra `ui`,
selenium, chromium and chromedriver.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from browser import Browser, missing

from conftest import Served

ROOT = Path(__file__).parents[2]
LONG = 1800
"""Seconds that training and evaluating may take."""


def _pairs(folder: Path) -> Path:
    """The README's pairs as a ZIP."""
    commands = (
        [sys.executable, str(ROOT / "examples" / "captioned_images.py"), "photos"],
        [sys.executable, "-m", "controlkit", "pairs", "photos", "--conditions", "palette", "--size", "64", "--copy",
         "--out", "pairs"],
    )  # fmt: skip
    for command in commands:
        subprocess.run(command, cwd=folder, check=True)
    archive = folder / "palette.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted((folder / "pairs").rglob("*")):
            file.write(path, path.relative_to(folder / "pairs"))
    return archive


def _generated(page: Browser) -> None:
    before = page.images("#results")
    page.click("#draw")
    page.until(
        lambda: page.images("#results") not in ([], before) and re.match(r"\d+ images? in", page.text("#message")),
        "results",
    )
    time.sleep(2)  # until they are drawn


def _generate(page: Browser, folder: Path) -> None:
    page.until(lambda: page.image("#control-1-condition"), "condition image")
    _generated(page)
    page.driver.execute_script("window.scrollTo(0, 0)")
    page.screenshot(folder / "ui-generate.png")
    page.click("#control-1-remove")
    page.click("#start > button, #start .label-wrap")
    page.click("#start-take")
    time.sleep(2)
    page.stroke("#start-image", (0.4, 0.2), (0.5, 0.2), (0.6, 0.25))
    _generated(page)
    page.click_text("label", "start image")
    page.driver.execute_script("document.querySelector('#start').scrollIntoView({block: 'center'})")
    time.sleep(2)
    page.screenshot(folder / "ui-inpaint.png")


def _adapt(page: Browser, archive: Path, folder: Path) -> None:
    page.click_text("button[role=tab]", "Pairs")
    page.fill("#pairs-name textarea, #pairs-name input", "palette")
    page.upload("#pairs-zip", archive)
    page.until(lambda: "palette.zip" in page.text("#pairs-zip"), "upload")
    page.click("#pairs-unpack")
    page.until(lambda: "nothing wrong" in page.text("#pairs-message"), "pairs")
    page.until(lambda: page.image("#pairs-sheet"), "sheet")
    page.driver.execute_script("window.scrollTo(0, 0)")
    time.sleep(2)
    page.screenshot(folder / "ui-pairs.png")
    page.click_text("button[role=tab]", "Adapt")
    page.fill("#adapt-name input", "mine")
    page.fill("#adapt-steps input", "100")
    page.fill("#adapt-pairs input", "palette")
    page.click("#adapt-start")
    page.until(lambda: "mine: done" in page.text("#adapt-message"), "end of the training", LONG)
    page.until(lambda: "gap closed" in page.text("#adapt-report"), "report")
    # Closes the list of pairs.
    page.driver.execute_script("const i = document.querySelector('#adapt-pairs input'); i.focus(); i.blur()")
    page.driver.execute_script("window.scrollTo(0, 0)")
    time.sleep(2)
    page.screenshot(folder / "ui-adapt.png")


def main(folder: Path) -> None:
    """Write the screenshots into `folder`."""
    if (reason := missing()) is not None:
        sys.exit(reason)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        archive = _pairs(work)
        served = Served(work)
        page = Browser(work)
        try:
            page.open(f"{served.url}/")
            _generate(page, folder)
            page.resize(390, 844)
            page.open(f"{served.url}/")
            page.until(lambda: page.image("#control-1-condition"), "condition image")
            page.screenshot(folder / "ui-phone.png")
            page.resize(1360, 1000)
            page.open(f"{served.url}/")
            _adapt(page, archive, folder)
        finally:
            page.close()
            served.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
