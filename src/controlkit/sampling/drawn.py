"""What a picture of ours says about itself, turned back into the request that draws it again."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from controlkit.errors import UserError
from controlkit.files import read_json
from controlkit.sampling.request import GenerateRequest

_RESOLVED = ("precision", "width", "height", "guidance")
"""What was left to the base or the machine and has to be the same for the same picture; the device is only told."""


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What was drawn before."""

    asked: GenerateRequest
    """The request, with what it left open."""
    used: dict[str, Any]
    """`device`, `precision`, `width`, `height` and `guidance` as they were, and the `mode` of controls that name none;
    empty in files of earlier versions."""

    def again(self, **changes: Any) -> GenerateRequest:
        """The request that draws the same, with `changes` to it.

        What was settled for one base is settled anew for another.

        Raises:
            UserError: the changes contradict the rest.
        """
        same = changes.get("base", self.asked.base) == self.asked.base
        kept = self.used if same else {}
        settled = {name: kept[name] for name in _RESOLVED if name in kept}
        before = self.asked.to_json()
        for use in before["controls"]:
            # Pictures from before there were modes were drawn in this one.
            use["mode"] = use["mode"] or (kept.get("mode", "balanced") if same else None)
        return GenerateRequest.from_json({**before, **settled, **changes})


def read_drawn(path: str | Path) -> Drawn:
    """What a `settings.json`, or a PNG beside it, says about the pictures that it belongs to.

    Raises:
        UserError: it is missing, or says nothing that is understood.
    """
    path = Path(path)
    values = _of_png(path) if path.suffix.lower() == ".png" else read_json(path)
    if not isinstance(values, dict) or not isinstance(values.get("request"), dict):
        raise UserError(f"{path} does not say how a picture was drawn; give a settings.json or a PNG of generate")
    used = values.get("used", {})
    try:
        return Drawn(GenerateRequest.from_json(values["request"]), used if isinstance(used, dict) else {})
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _of_png(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"there is no picture at {path}")
    try:
        with Image.open(path) as image:
            text = getattr(image, "text", {})
            return json.loads(text.get("controlkit", "null"))
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a PNG of generate ({error})") from error
