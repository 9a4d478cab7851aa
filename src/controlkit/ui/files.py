"""Files that the browser shows and downloads, in a folder that only this process uses."""

from __future__ import annotations

import atexit
import base64
import io
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from controlkit.conditions.condition import WHITE
from controlkit.errors import UserError

PAGE_FIELDS = ("prepared", "parameters")
"""Fields of a control that the settings of a result keep as they were on the page, under `page`."""
VARIABLE = "GRADIO_TEMP_DIR"
"""Where Gradio keeps what was uploaded and what is shown."""


def use_private_folder() -> None:
    """Let Gradio keep files in a new folder that only this user can read, and that is removed at the end.

    Its default is one folder for all users of the machine.
    """
    if VARIABLE not in os.environ:
        folder = tempfile.mkdtemp(prefix="controlkit-ui-")
        os.environ[VARIABLE] = folder
        atexit.register(shutil.rmtree, folder, ignore_errors=True)


def result_folder() -> Path:
    """A new folder for the files of one result."""
    shared = Path(os.environ.get(VARIABLE, tempfile.gettempdir()))
    shared.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix="result-", dir=shared))


def png_bytes(image: Image.Image) -> bytes:
    """An image as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def base64_png(image: Image.Image) -> str:
    """An image as a PNG file in base64."""
    return base64.b64encode(png_bytes(image)).decode("ascii")


def flattened(image: Image.Image | None, over: tuple[int, int, int] = WHITE) -> Image.Image | None:
    """An image of an editor over a colour, RGB; None for an empty one."""
    if image is None:
        return None
    image = image.convert("RGBA")
    if image.getchannel("A").getextrema()[1] == 0:
        return None
    return Image.alpha_composite(Image.new("RGBA", image.size, (*over, 255)), image).convert("RGB")


def painted(value: Mapping[str, Any] | None) -> Image.Image | None:
    """The strokes of an editor, white on black; None if there are none."""
    layers = [] if value is None else [layer for layer in value.get("layers", ()) if layer is not None]
    if not layers:
        return None
    mask = Image.new("L", layers[0].size, 0)
    for layer in layers:
        strokes = layer.convert("RGBA").getchannel("A").point(lambda alpha: 255 if alpha else 0)
        mask.paste(255, (0, 0), strokes)
    return None if mask.getextrema()[1] == 0 else mask.convert("RGB")


def write_result(
    images: Sequence[bytes],
    conditions: Sequence[bytes],
    seeds: Sequence[int],
    settings: Mapping[str, Any],
    sent: Mapping[str, bytes],
) -> tuple[list[Path], list[Path], Path]:
    """Write the images of a request with the settings that restore it.

    Args:
        images: PNG files.
        conditions: PNG files of the condition images, in the order of the controls.
        settings: as `controlkit generate` stores them: `request`, whose controls have the images `condition0.png` and
            so on, and `used`; and `page`, with the `PAGE_FIELDS` of each of the `controls`.
        sent: name -> bytes of the other files that `request` names, such as `mask.png`.

    Returns:
        Paths of the images, of the condition images, and of a ZIP of all, from which `controlkit generate --from` draws
        the images again.
    """
    folder = result_folder()
    drawn = []
    for seed, data in zip(seeds, images, strict=True):
        path = folder / f"seed{seed}.png"
        path.write_bytes(with_settings(data, {**settings, "request": {**settings["request"], "seeds": [seed]}}))
        drawn.append(path)
    maps = []
    for index, data in enumerate(conditions):
        path = folder / f"condition{index}.png"
        path.write_bytes(data)
        maps.append(path)
    others = []
    for name, data in sent.items():
        others.append(folder / name)
        others[-1].write_bytes(data)
    (folder / "settings.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    archive = folder / "images.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in (*drawn, *maps, *others, folder / "settings.json"):
            file.write(path, path.name)
    return drawn, maps, archive


def with_settings(data: bytes, settings: Mapping[str, Any]) -> bytes:
    """A PNG with the settings in it that `controlkit generate` writes, beside the texts that it has."""
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        info = PngInfo()
        for key, value in getattr(image, "text", {}).items():
            info.add_itxt(key, value)
        info.add_itxt("controlkit", json.dumps(settings))
        buffer = io.BytesIO()
        image.save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()


def settings_in(path: str | Path) -> dict[str, Any]:
    """The fields of `GenerateRequest` in a PNG or a `settings.json`, as plain values.

    Of a result of the page, controls are as they were on the page: its request has their condition images.

    Raises:
        UserError: it holds none.
    """
    from controlkit.sampling.request import GenerateRequest
    from controlkit.sampling.saved_settings import read_settings

    fields, own = read_settings(path).request.to_json(), _page_controls(Path(path))
    for index, use in enumerate(fields["controls"]):
        if index < len(own):
            use |= {name: own[index].get(name, use[name]) for name in PAGE_FIELDS}
        elif use["image"] == f"condition{index}.png":  # a result of an earlier version's page
            use["prepared"] = False
    return GenerateRequest.from_json(fields).to_json()


def _page_controls(path: Path) -> list[dict[str, Any]]:
    """What `write_result` was given of controls under `page`; empty for other files."""
    if path.suffix.lower() == ".png":
        with Image.open(path) as image:
            values = json.loads(getattr(image, "text", {})["controlkit"])
    else:
        values = json.loads(path.read_text(encoding="utf-8"))
    page = values.get("page")
    found = page.get("controls") if isinstance(page, dict) else None
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []


def checked_name(text: str) -> str:
    """A name that a client chose and that becomes the name of a folder.

    Raises:
        UserError: it is empty, or has other characters than ASCII letters, digits, `-` and `_`.
    """
    name = text.strip()
    if not name or len(name) > 60 or not all(char.isascii() and (char.isalnum() or char in "-_") for char in name):
        raise UserError(f"name is {text!r}; expected up to 60 letters, digits, - and _", "out-of-range")
    return name
