"""A headless Chromium on the page, as a person uses it."""

from __future__ import annotations

import base64
import io
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

PATIENCE = 180
"""Seconds that an answer may take on a busy machine."""


def missing() -> str | None:
    """Why there is no browser, or None."""
    try:
        import gradio  # noqa: F401
        import selenium  # noqa: F401
    except ImportError as error:
        return f"{error.name} is not installed"
    for name in ("chromium", "chromedriver"):
        if shutil.which(name) is None:
            return f"{name} is not installed"
    return None


class Browser:
    """A window of the page."""

    def __init__(self, folder: Path, width: int = 1360, height: int = 1000) -> None:
        from selenium.webdriver import Chrome, ChromeOptions
        from selenium.webdriver.chrome.service import Service

        options = ChromeOptions()
        options.binary_location = shutil.which("chromium") or ""
        for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars",
                     "--enable-unsafe-swiftshader", "--disable-background-networking",
                     f"--user-data-dir={folder / 'profile'}"):  # fmt: skip
            options.add_argument(word)
        self.downloads = folder / "downloads"
        self.downloads.mkdir(exist_ok=True)
        options.add_experimental_option("prefs", {"download.default_directory": str(self.downloads)})
        options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
        self.driver = Chrome(options=options, service=Service(shutil.which("chromedriver")))
        self.driver.set_page_load_timeout(PATIENCE)
        self.resize(width, height)

    def resize(self, width: int, height: int) -> None:
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600},
        )

    def open(self, url: str) -> None:
        self.driver.get(url)
        self.until(lambda: self.all("#draw, #draw button"), "the page")

    def all(self, css: str) -> list[Any]:
        return self.driver.find_elements("css selector", css)

    def one(self, css: str) -> Any:
        return self.until(lambda: next((each for each in self.all(css) if each.is_displayed()), None), css)

    def until(self, what: Callable[[], Any], name: str = "", seconds: float = PATIENCE) -> Any:
        """The first result of `what` that is true."""
        from selenium.common.exceptions import StaleElementReferenceException

        end = time.monotonic() + seconds
        while True:
            try:
                if found := what():
                    return found
            except StaleElementReferenceException:
                pass  # redrawn meanwhile
            if time.monotonic() > end:
                raise AssertionError(f"no {name} after {seconds} s; the page says {self.text('#message')!r}")
            time.sleep(0.1)

    def text(self, css: str) -> str:
        found = self.all(css)
        return found[0].text if found else ""

    def click(self, css: str) -> None:
        found = self.one(css)
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", found)
        time.sleep(0.2)
        found.click()

    def click_text(self, css: str, text: str) -> None:
        """Click the element of this text."""
        found = self.until(lambda: next((each for each in self.all(css) if each.text.strip() == text), None), text)
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", found)
        found.click()

    def fill(self, css: str, text: str) -> None:
        """Replace the text of a field, and leave it."""
        from selenium.webdriver.common.keys import Keys

        field = self.one(css)
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", field)
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(Keys.DELETE)
        field.send_keys(text)
        field.send_keys(Keys.TAB)

    def upload(self, css: str, *paths: Path) -> None:
        """Choose files for the file field within `css`."""
        self.until(lambda: self.all(f"{css} input[type=file]"), css)[0].send_keys("\n".join(map(str, paths)))

    def image(self, css: str) -> Image.Image | None:
        """The image that an element shows, as its file is."""
        found = [each for each in self.all(f"{css} img") if each.is_displayed()]
        return self.fetch(found[0].get_attribute("src")) if found else None

    def images(self, css: str) -> list[str]:
        """Addresses of the images that are shown within an element."""
        return [each.get_attribute("src") for each in self.all(f"{css} img") if each.is_displayed()]

    def fetch(self, url: str) -> Image.Image:
        return Image.open(io.BytesIO(self.fetch_bytes(url)))

    def fetch_bytes(self, url: str) -> bytes:
        code = """
        const [url, done] = arguments;
        fetch(url).then(answer => answer.blob()).then(blob => {
            const reader = new FileReader();
            reader.onload = () => done(reader.result.split(",")[1]);
            reader.readAsDataURL(blob);
        });
        """
        return base64.b64decode(self.driver.execute_async_script(code, url))

    def stroke(self, css: str, *points: tuple[float, float]) -> None:
        """Draw with the mouse on a canvas, between points in shares of its width and height."""
        from selenium.webdriver import ActionChains

        canvas = self.one(f"{css} canvas")
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
        time.sleep(0.5)
        width, height = canvas.size["width"], canvas.size["height"]
        places = [(round((x - 0.5) * width), round((y - 0.5) * height)) for x, y in points]
        actions = ActionChains(self.driver, duration=100)
        actions.move_to_element_with_offset(canvas, *places[0]).click_and_hold()
        for place in places[1:]:
            actions.move_to_element_with_offset(canvas, *place)
        actions.release().perform()

    def screenshot(self, path: Path, colours: int = 128) -> None:
        """What the window shows, as a small PNG."""
        image = Image.open(io.BytesIO(self.driver.get_screenshot_as_png())).convert("RGB")
        image.quantize(colours, dither=Image.Dither.NONE).save(path, optimize=True)

    def requested(self) -> set[str]:
        """Addresses that the page has asked for since this was last called."""
        import json

        found = set()
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                found.add(message["params"]["request"]["url"])
        return found

    def close(self) -> None:
        self.driver.quit()
