"""Restore a `GenerateRequest` from the settings stored in a PNG or settings.json, and notice what has changed since."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, UnidentifiedImageError

from controlkit.errors import UserError
from controlkit.files import read_json
from controlkit.images import read_bytes, read_image
from controlkit.sampling.request import ControlUse, GenerateRequest, condition_name

if TYPE_CHECKING:
    from controlkit.sampling.generate import Generation

_RESOLVED = ("precision", "width", "height", "guidance", "sampler")
"""What was left to the base or the machine and has to be the same for the same image; the device is only told."""


@dataclasses.dataclass(frozen=True)
class SavedSettings:
    """Settings that were stored with an image."""

    asked: GenerateRequest
    """The request, with what it left open."""
    used: dict[str, Any]
    """`device`, `precision`, `width`, `height`, `guidance` and `sampler` as they were, and the `mode` of controls that
    name none; empty in files of earlier versions."""
    sha256: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Of the files that were read (`Generation.sha256`); empty in files of earlier versions."""
    folder: Path = Path()
    """Where the settings lie, with the condition images (`condition0.png`, ...); relative paths are tried from here
    where they lead nowhere."""

    def again(self, **changes: Any) -> GenerateRequest:
        """The request that draws the same, with `changes` to it.

        What was settled for one base is settled anew for another. In place of a control's image that is gone or has
        changed, its saved condition image is taken; `differences` tells so.

        Raises:
            UserError: the changes contradict the rest, or there is neither a control's image nor its condition image.
        """
        same = changes.get("base", self.asked.base) == self.asked.base
        kept = self.used if same else {}
        settled = {name: kept[name] for name in _RESOLVED if name in kept}
        before = self.asked.to_json()
        before["base"] = self._near(self.asked.base)
        for index, use in enumerate(before["controls"]):
            # Images from before there were modes were drawn in this one.
            use["mode"] = use["mode"] or (kept.get("mode", "balanced") if same else None)
            if "controls" not in changes:
                use |= {"control": self._control(use["control"]), **self._given(index)}
        return GenerateRequest.from_json({**before, **settled, **changes})

    def in_mode(self, mode: str) -> SavedSettings:
        """The same with all controls in `mode`."""
        uses = tuple(dataclasses.replace(use, mode=mode) for use in self.asked.controls)
        return dataclasses.replace(self, asked=dataclasses.replace(self.asked, controls=uses))

    def differences(self, made: Generation) -> list[str]:
        """Notes on what is not as it was when `made` was drawn from `again`: other images, controls, base, conditions.

        Nothing is said of what the settings do not record, or what `made` was given loaded.
        """
        notes = []
        recorded, found = self.sha256, made.sha256
        if made.request.base == self._near(self.asked.base) and _differ(recorded, found, "base"):
            notes.append(f"the base {made.request.base} has changed since (SHA-256), and so may the images")
        same_size = all(self.used.get(side) == made.used.get(side) for side in ("width", "height"))
        uses = zip(self.asked.controls, made.request.controls, found.get("controls", ()), strict=False)
        for index, (old, new, after) in enumerate(uses):
            before = self._recorded(index)
            if new.control != self._control(old.control):
                continue
            for part, what in (("control", "control"), ("companion", "base control of the control")):
                if _differ(before, after, part):
                    notes.append(f"the {what} {new.control} has changed since (SHA-256), and so may the images")
            for name, given in self._images(index).items():
                notes += self._image_notes(index, name, given, new, _part(after, name), same_size=same_size)
        return notes

    def _image_notes(
        self, index: int, name: str | None, given: str, new: ControlUse, after: Mapping[str, Any], *, same_size: bool
    ) -> list[str]:
        """What is not as it was of one image of a control, which was `given`."""
        before, path, saved = _part(self._recorded(index), name), _path(new, name), str(self._saved(index, name))
        if path == saved != given:
            if self._unchanged(index, name, given) is not None:
                return []  # another image of this control is not as it was, so that all are taken as prepared
            gone = "has changed since (SHA-256)" if self._places(given) else "is not there"
            return [f"{given} {gone}; its saved condition image {saved} is used"]
        if same_size and before.get("image") == after.get("image") and _differ(before, after, "condition"):
            instead = f"--control {new.control}={saved} --prepared" if name is None else saved
            return [
                f"the condition image that {new.control} makes of {path} is not as it was: another version of"
                f" controlkit, of a library or of a model; for the old one: {instead}"
            ]
        return []

    def _recorded(self, index: int) -> Mapping[str, Any]:
        controls = self.sha256.get("controls")
        one = controls[index] if isinstance(controls, list) and index < len(controls) else {}
        return one if isinstance(one, Mapping) else {}

    def _near(self, name: str) -> str:
        """A path as it is if it leads somewhere; else from the folder of the settings if it does there."""
        return name if Path(name).exists() or not (self.folder / name).exists() else str(self.folder / name)

    def _control(self, name: str) -> str:
        """Where a control lies: one that ships, a path, or the two of ADAPTER+BASE."""
        from controlkit.formats.load import find_control

        try:
            find_control(name)
            return name
        except UserError:
            near = self._near(name)
        adapter, plus, base = name.rpartition("+")
        return near if near != name or not plus else f"{self._near(adapter)}+{self._near(base)}"

    def _images(self, index: int) -> dict[str | None, str]:
        """Input -> path as it was given, of the images of a control; None is the input of one that takes one."""
        use, recorded = self.asked.controls[index], self._recorded(index).get("inputs")
        if use.inputs is None:
            return {None: use.image or ""}
        names = recorded if isinstance(recorded, Mapping) else ()
        return {name: use.inputs[name] for name in names if isinstance(use.inputs.get(name), str)}

    def _places(self, given: str) -> list[str]:
        """Where an image may lie, of those places where there is a file."""
        return [place for place in dict.fromkeys((given, str(self.folder / given))) if Path(place).is_file()]

    def _saved(self, index: int, name: str | None) -> Path:
        return self.folder / f"{condition_name(index, name)}.png"

    def _given(self, index: int) -> dict[str, Any]:
        """The images of a control as they were given, or those that were saved of all, if one is not as it was."""
        use, images = self.asked.controls[index], self._images(index)
        found = {name: self._unchanged(index, name, path) for name, path in images.items()}
        prepared = {}
        if None in found.values():
            found = {name: self._saved_unchanged(index, name, path) for name, path in images.items()}
            prepared = {"prepared": True}
        if use.inputs is None:
            return {"image": found[None], **prepared}
        return {"inputs": {**use.inputs, **{str(name): path for name, path in found.items()}}, **prepared}

    def _unchanged(self, index: int, name: str | None, path: str) -> str | None:
        """Where an image lies that is the one of then."""
        wanted = _part(self._recorded(index), name).get("image")
        for place in self._places(path):
            if wanted is None or hashlib.sha256(read_bytes(place)).hexdigest() == wanted:
                return place
        return None

    def _saved_unchanged(self, index: int, name: str | None, path: str) -> str:
        """The condition image that was made of an image.

        Raises:
            UserError: it is not there, or not the one of then.
        """
        from controlkit.sampling.identity import pixels_sha256

        use, saved = self.asked.controls[index], self._saved(index, name)
        recorded = _part(self._recorded(index), name).get("condition")
        if saved.is_file() and recorded in (None, pixels_sha256(read_image(saved))):
            return str(saved)
        state = "is not the one of then either" if saved.is_file() else "is not there either"
        role, form = ("image", "IMAGE") if name is None else (f"input {name!r}", "INPUTS.json")
        what = f"{path}, the {role} of {use.control}, " + (
            "has changed (SHA-256)" if self._places(path) else "is not there"
        )
        raise UserError(f"{what}, and its condition image {saved} {state}; give --control {use.control}={form}")


def _part(recorded: Mapping[str, Any], name: str | None) -> Mapping[str, Any]:
    """What is recorded of one image of a control."""
    named = recorded.get("inputs")
    found = recorded if name is None else named.get(name) if isinstance(named, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _path(use: ControlUse, name: str | None) -> Any:
    """The path of one image of a control."""
    return use.image if name is None else (use.inputs or {}).get(name)


def _differ(before: Mapping[str, Any], after: Mapping[str, Any], name: str) -> bool:
    """Whether two hashes are both known and not the same."""
    return None not in (before.get(name), after.get(name)) and before[name] != after[name]


def read_settings(path: str | Path) -> SavedSettings:
    """What a `settings.json`, or a PNG beside it, says about the images that it belongs to.

    Args:
        path: one of these, or the folder of a `settings.json`.

    Raises:
        UserError: it is missing, or says nothing that is understood.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "settings.json"
    values = _of_png(path) if path.suffix.lower() == ".png" else read_json(path)
    if not isinstance(values, dict) or not isinstance(values.get("request"), dict):
        raise UserError(f"{path} does not say how an image was drawn; give a settings.json or a PNG of generate")
    used, sha256 = (values.get(name, {}) for name in ("used", "sha256"))
    try:
        request = GenerateRequest.from_json(values["request"])
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    kept, hashes = (value if isinstance(value, dict) else {} for value in (used, sha256))
    return SavedSettings(request, kept, hashes, folder=path.parent)


def _of_png(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"there is no image at {path}")
    try:
        with Image.open(path) as image:
            text = getattr(image, "text", {})
            return json.loads(text.get("controlkit", "null"))
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a PNG of generate ({error})") from error
