"""Restore a `GenerateRequest` from the settings stored in a PNG or settings.json, and report what changed since."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, UnidentifiedImageError

from controlkit.errors import UserError
from controlkit.files import read_json
from controlkit.images import read_bytes, read_image
from controlkit.sampling.axes import PATHS, is_changed, points_of
from controlkit.sampling.file_names import START_NAMES, condition_name, mask_name
from controlkit.sampling.request import GenerateRequest
from controlkit.sampling.uses import ControlUse

if TYPE_CHECKING:
    from controlkit.sampling.generation import Generation

_RESOLVED = ("precision", "width", "height", "guidance", "sampler", "strength", "hires_strength")
"""Resolved values that the same image needs; the device is only reported."""


@dataclasses.dataclass(frozen=True)
class SavedSettings:
    """Settings stored with an image."""

    request: GenerateRequest
    """The request, with None for what it left open."""
    used: dict[str, Any]
    """Resolved values (`Generation.used`); empty in files of earlier versions."""
    sha256: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Hashes of the files read (`Generation.sha256`); empty in files of earlier versions."""
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Stem of a condition image or mask -> stem of its file, if another."""
    parts: Sequence[Mapping[str, Any]] = ()
    """Of a request with axes, `values`, `images`, `used`, `sha256` and `files` of each combination."""
    folder: Path = Path()
    """Folder of the settings and the condition images (`condition0.png`, ...). Relative paths that do not exist are
    tried from here."""

    def to_request(self, **changes: Any) -> GenerateRequest:
        """The request that generates the same images, with `changes`, which are as `GenerateRequest` takes them.

        Another base resolves its own defaults. The saved condition image replaces an image that is missing or has
        changed; `differences` reports it.

        Raises:
            UserError: the changes contradict the rest, or both an image and its condition image are missing.
        """
        same_base = changes.get("base", self.request.base) == self.request.base
        used = self.used if same_base else {}
        resolved = {name: used[name] for name in _RESOLVED if name in used}
        if self.request.strength is None and "mask" in changes:
            resolved.pop("strength", None)  # its default depends on whether there is a mask
        stored = self.request.to_json()
        stored["graphs"] = "auto"  # `on` demands a device that has them; images do not depend on it
        stored["base"] = self._locate(self.request.base)
        stored["vae"] = self.request.vae and self._locate(self.request.vae)
        axes = {name: self._axes(name, changes) for name in ("vary", "xy") if name not in changes}
        stored |= self._start_files([name for name in START_NAMES if name not in changes])
        stored["embeddings"] = [self._locate_embedding(entry) for entry in self.request.embeddings]
        for lora in stored["loras"]:
            lora["file"] = self._locate(lora["file"])
        for index, use in enumerate(stored["controls"]):
            # Files from before there were modes mean this one.
            use["mode"] = use["mode"] or (used.get("mode", "balanced") if same_base else None)
            if "controls" not in changes:
                use["control"] = self._locate_control(use["control"])
                use |= self._located(use) if self.varies else {**self._inputs(index), "mask": self._mask(index)}
        changes = {name: _plain(value) for name, value in changes.items()}
        return GenerateRequest.from_json({**stored, **resolved, **axes, **changes})

    @property
    def varies(self) -> bool:
        """Whether the request has axes."""
        return bool(self.request.vary or self.request.xy)

    def _axes(self, name: str, changes: Mapping[str, Any]) -> list[dict[str, list[Any]]]:
        """The axes of one field without the settings that change, with paths as they exist now."""
        kept = []
        for axis in getattr(self.request, name):
            stays = {key: values for key, values in axis.items() if not is_changed(key, self.request, changes)}
            paths = [key for key in stays if key.rpartition(".")[2] in PATHS]
            located = {
                key: [None if value is None else self._locate(str(value)) for value in stays[key]] for key in paths
            }
            kept += [{**stays, **located}] if stays else []
        return kept

    def replaced(self, changes: Mapping[str, Any]) -> list[str]:
        """Notes on settings of axes that `changes` replace by one value for all images."""
        given = {
            key: len(values)
            for name in ("vary", "xy")
            if name not in changes
            for axis in getattr(self.request, name)
            for key, values in axis.items()
            if is_changed(key, self.request, changes)
        }
        return [f"{key} had {count} values here; the one that is given replaces them" for key, count in given.items()]

    def _located(self, use: Mapping[str, Any]) -> dict[str, Any]:
        """Paths of a control of a request with axes: as they exist, without a look at their content."""
        inputs = use["inputs"] and {
            # A text may be a task, and a folder have its name.
            name: self._locate(value) if isinstance(value, str) and (self.folder / value).is_file() else value
            for name, value in use["inputs"].items()
        }
        paths = {name: use[name] and self._locate(use[name]) for name in ("image", "mask")}
        return {**paths, "inputs": inputs}

    def _part_differences(self, generation: Generation) -> list[str]:
        """`differences` of a request with axes."""
        before, after = points_of(self.request), points_of(generation.request)
        if len(before) != len(after) or len(self.parts) != len(before):
            return []
        notes: dict[str, None] = {}
        for point, part, new in zip(before, self.parts, generation.parts, strict=True):
            old = SavedSettings(point.request, part.get("used", {}), part.get("sha256", {}), folder=self.folder)
            notes |= dict.fromkeys(old.differences(new))
            notes |= dict.fromkeys(old._file_differences(START_NAMES, old.request, new.request, old.sha256, new.sha256))
            uses = zip(old.request.controls, new.request.controls, new.sha256["controls"], strict=False)
            for index, (use, now, hashes) in enumerate(uses):
                changed = old._file_differences(("image", "mask"), use, now, old._hashes(index), hashes)
                notes |= dict.fromkeys(changed)
        return list(notes)

    def _file_differences(
        self,
        names: Sequence[str],
        old: GenerateRequest | ControlUse,
        new: GenerateRequest | ControlUse,
        before: Mapping[str, Any],
        after: Mapping[str, Any],
    ) -> list[str]:
        """Notes on files that changed under the same path.

        Args:
            names: fields of `old` and `new` that are paths, and keys of their hashes `before` and `after`.
        """
        stored = {name: path for name in names if (path := getattr(old, name)) is not None}
        return [
            _changed(path)
            for name, path in stored.items()
            if getattr(new, name) == self._locate(path) and _differ(before, after, name)
        ]

    def in_mode(self, mode: str) -> SavedSettings:
        """A copy with all controls in `mode`, also where the mode varies."""
        uses = tuple(dataclasses.replace(use, mode=mode) for use in self.request.controls)
        axes: dict[str, Any] = {}
        for name in ("vary", "xy"):
            without = (
                {key: values for key, values in axis.items() if key.rpartition(".")[2] != "mode"}
                for axis in getattr(self.request, name)
            )
            axes[name] = tuple(filter(None, without))
        return dataclasses.replace(self, request=dataclasses.replace(self.request, controls=uses, **axes))

    def differences(self, generation: Generation) -> list[str]:
        """Notes on images, controls, base and conditions that changed between these settings and `generation`.

        Args:
            generation: made from `to_request`. What it was passed loaded, or what the settings do not record, is not
                compared.
        """
        if self.varies:
            return self._part_differences(generation)
        notes = []
        before, after = self.sha256, generation.sha256
        if generation.request.base == self._locate(self.request.base) and _differ(before, after, "base"):
            notes.append(_changed(f"base {generation.request.base}"))
        if generation.request.vae is not None and _differ(before, after, "vae"):
            notes.append(_changed(f"VAE {generation.request.vae}"))
        loras = [use.file for use in generation.request.loras]
        notes += _changed_files(loras, before.get("loras"), after.get("loras"))
        notes += [note for name in START_NAMES for note in self._start_notes(name, generation.request)]
        same_size = not self._shows_part and all(
            self.used.get(side) == generation.used.get(side) for side in ("width", "height")
        )
        notes += _changed_files(generation.request.embeddings, before.get("embeddings"), after.get("embeddings"))
        uses = zip(self.request.controls, generation.request.controls, after.get("controls", ()), strict=False)
        for index, (old, new, hashes) in enumerate(uses):
            if new.control != self._locate_control(old.control):
                continue
            for part, what in (("control", "control"), ("companion", "the base control of")):
                if _differ(self._hashes(index), hashes, part):
                    notes.append(_changed(f"{what} {new.control}"))
            enlarged = _enlarged(generation.request)
            notes += [note + enlarged for note in self._mask_notes(index, new)]
            for name, path in self._images(index).items():
                hashes_of_it = _of_input(hashes, name)
                notes += self._image_notes(index, name, path, new, hashes_of_it, enlarged, same_size=same_size)
        return notes

    def _image_notes(
        self,
        index: int,
        name: str | None,
        stored: str,
        new: ControlUse,
        after: Mapping[str, Any],
        enlarged: str,
        *,
        same_size: bool,
    ) -> list[str]:
        """Notes on one image of a control, whose path in the settings is `stored`."""
        before, path, saved = _of_input(self._hashes(index), name), _path(new, name), str(self._saved(index, name))
        if path == saved != stored:
            if self._unchanged(index, name, stored) is not None:
                return []  # another image of this control changed, so that all are taken as prepared
            return [f"{stored} {self._state(stored)}; its saved condition image {saved} is used{enlarged}"]
        if same_size and before.get("image") == after.get("image") and _differ(before, after, "condition"):
            instead = f"--control {new.control}={saved} --prepared" if name is None else saved
            return [
                f"the condition image of {new.control} from {path} differs from the saved one (another version of"
                f" controlkit, a library or a model); to use the saved one: {instead}"
            ]
        return []

    def _start_notes(self, name: str, new: GenerateRequest) -> list[str]:
        """A note if the saved image or mask to start from replaces the stored one."""
        stored, saved = getattr(self.request, name), str(self._file(name))
        if stored is None or not getattr(new, name) == saved != stored:
            return []
        if self._with_hash(stored, self.sha256.get(name)) is not None:
            return []  # the other one is missing or changed, so that both are taken as saved
        return [f"{stored}, the {name} to start from, {self._state(stored)}; the saved one, {saved}, is used"]

    def _mask_notes(self, index: int, new: ControlUse) -> list[str]:
        """A note if the saved mask of a control replaces its mask."""
        stored, saved = self.request.controls[index].mask, str(self._file(mask_name(index)))
        if stored is None or not new.mask == saved != stored:
            return []
        replaced = f"{stored}, the mask of {new.control}, {self._state(stored)}"
        return [f"{replaced}; the saved one, {saved}, is used"]

    def _mask(self, index: int) -> str | None:
        """The stored mask of a control, or the saved one if it is missing or has changed.

        Raises:
            UserError: both are missing.
        """
        use, saved = self.request.controls[index], self._file(mask_name(index))
        if use.mask is None:
            return None
        found = self._with_hash(use.mask, self._hashes(index).get("mask"))
        if found is not None:
            return found
        if not self._shows_part and _has_pixels(saved, self._hashes(index).get("mask_pixels")):
            return str(saved)
        raise UserError(
            f"{use.mask}, the mask of {use.control}, {self._state(use.mask)}, and {saved}"
            f" {_saved_state(saved, shows_part=self._shows_part)}; pass --control {use.control}=IMAGE,mask=MASK",
            "missing-file",
        )

    def _start_files(self, names: Sequence[str]) -> dict[str, str | None]:
        """The stored image and mask to start from, or the saved ones if one is missing or has changed.

        Args:
            names: `image`, `mask` or both.

        Raises:
            UserError: one is missing, and so is the saved one.
        """
        stored = {name: path for name in names if (path := getattr(self.request, name)) is not None}
        if self.varies:
            return {name: self._locate(path) for name, path in stored.items()}
        found = {name: self._with_hash(path, self.sha256.get(name)) for name, path in stored.items()}
        saved = {name: self._file(name) for name in stored}
        usable = {name: _has_pixels(saved[name], self.sha256.get(f"{name}_pixels")) for name in stored}
        for name, path in stored.items():
            if found[name] is None and not usable[name]:
                raise UserError(
                    f"{path}, the {name} to start from, {self._state(path)}, and {saved[name]}"
                    f" {_saved_state(saved[name])}; pass --{name} FILE",
                    "missing-file",
                )
        if None in found.values() and self.request.only_masked is None and all(usable.values()):
            found = dict.fromkeys(found)  # saved ones are scaled and cropped, so that the other would not fit
        return {name: path or str(saved[name]) for name, path in found.items()}

    @property
    def _shows_part(self) -> bool:
        """Whether saved condition images and masks of controls show the inpainted part only, so that they replace no
        files."""
        return self.request.only_masked is not None

    def _state(self, stored: str) -> str:
        """Why a stored image cannot be used."""
        return "has changed since (SHA-256)" if self._places(stored) else "is missing"

    def _hashes(self, index: int) -> Mapping[str, Any]:
        """Stored hashes of the control at `index`."""
        controls = self.sha256.get("controls")
        hashes = controls[index] if isinstance(controls, list) and index < len(controls) else {}
        return hashes if isinstance(hashes, Mapping) else {}

    def _locate(self, name: str) -> str:
        """A path as it is, or from the folder of the settings if it exists only there."""
        return name if Path(name).exists() or not (self.folder / name).exists() else str(self.folder / name)

    def _locate_embedding(self, entry: str) -> str:
        """`[WORD=]FILE` with the file located."""
        from controlkit.sampling.embeddings import embedding_file

        word, file = embedding_file(entry)
        return f"{word}={self._locate(str(file))}"

    def _locate_control(self, name: str) -> str:
        """A control's name, path, or both paths of ADAPTER+BASE."""
        from controlkit.formats.load import find_control

        try:
            find_control(name)
            return name
        except UserError:
            found = self._locate(name)
        adapter, plus, base = name.rpartition("+")
        return found if found != name or not plus else f"{self._locate(adapter)}+{self._locate(base)}"

    def _images(self, index: int) -> dict[str | None, str]:
        """Input -> stored path, of the images of a control; None is the only input of a control that takes one."""
        use, hashes = self.request.controls[index], self._hashes(index).get("inputs")
        if use.inputs is None:
            return {None: use.image or ""}
        names = hashes if isinstance(hashes, Mapping) else ()
        return {name: use.inputs[name] for name in names if isinstance(use.inputs.get(name), str)}

    def _places(self, stored: str) -> list[str]:
        """The existing files that a stored path may mean; `mask.png` never means the saved mask."""
        saved = [str(self._file(name)) for name in START_NAMES]
        places = dict.fromkeys((stored, str(self.folder / stored)))
        return [place for place in places if place not in saved and Path(place).is_file()]

    def _saved(self, index: int, name: str | None) -> Path:
        return self._file(condition_name(index, name))

    def _file(self, stem: str) -> Path:
        return self.folder / f"{self.files.get(stem, stem)}.png"

    def _inputs(self, index: int) -> dict[str, Any]:
        """`image` or `inputs` of a control: the stored images, or all saved condition images if one changed."""
        use, images = self.request.controls[index], self._images(index)
        found = {name: self._unchanged(index, name, path) for name, path in images.items()}
        prepared = {}
        if None in found.values():
            found = {name: self._saved_unchanged(index, name, path) for name, path in images.items()}
            prepared = {"prepared": True, "parameters": None}
        if use.inputs is None:
            return {"image": found[None], **prepared}
        return {"inputs": {**use.inputs, **{str(name): path for name, path in found.items()}}, **prepared}

    def _unchanged(self, index: int, name: str | None, path: str) -> str | None:
        """Path of an image whose content has the stored hash, if there is one."""
        return self._with_hash(path, _of_input(self._hashes(index), name).get("image"))

    def _with_hash(self, path: str, expected: str | None) -> str | None:
        """Path of a file whose content has this hash, or any if None, if there is one."""
        for place in self._places(path):
            if expected is None or hashlib.sha256(read_bytes(place)).hexdigest() == expected:
                return place
        return None

    def _saved_unchanged(self, index: int, name: str | None, path: str) -> str:
        """Path of the saved condition image of an image.

        Raises:
            UserError: it is missing, or has changed.
        """
        use, saved = self.request.controls[index], self._saved(index, name)
        expected = _of_input(self._hashes(index), name).get("condition")
        if not self._shows_part and _has_pixels(saved, expected):
            return str(saved)
        role, form = ("image", "IMAGE") if name is None else (f"input {name!r}", "INPUTS.json")
        saved_state = _saved_state(saved, shows_part=self._shows_part)
        raise UserError(
            f"{path}, the {role} of {use.control}, {self._state(path)}, and its condition image {saved} {saved_state};"
            f" pass --control {use.control}={form}",
            "missing-file",
        )


def _has_pixels(saved: Path, expected: str | None) -> bool:
    """Whether a saved image exists and has the stored hash; settings of earlier versions have none of some images."""
    from controlkit.sampling.identity import pixels_sha256

    return saved.is_file() and expected in (None, pixels_sha256(read_image(saved)))


def _saved_state(saved: Path, *, shows_part: bool = False) -> str:
    """Why a saved image cannot be used."""
    if not saved.is_file():
        return "is missing"
    return "shows the inpainted part only" if shows_part else "has changed since (SHA-256)"


def _changed_files(entries: Sequence[str], before: Any, after: Any) -> list[str]:
    """Notes on files whose hashes differ, if as many were stored."""
    if not isinstance(before, list) or not isinstance(after, list) or len(before) != len(after):
        return []
    return [_changed(entry) for entry, old, new in zip(entries, before, after, strict=True) if old != new]


def _plain(value: Any) -> Any:
    """A value of a request's field as JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Path):
        return str(value)
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


def _changed(what: str) -> str:
    return f"{what} has changed since (SHA-256), so the images may differ"


def _enlarged(request: GenerateRequest) -> str:
    """End of notes on a saved condition image or mask, which is of the first pass."""
    return "" if request.hires is None else ", and enlarged for the second pass, so the images may differ"


def _of_input(hashes: Mapping[str, Any], name: str | None) -> Mapping[str, Any]:
    """Hashes of one image of a control."""
    named = hashes.get("inputs")
    found = hashes if name is None else named.get(name) if isinstance(named, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _path(use: ControlUse, name: str | None) -> Any:
    """The path of one image of a control."""
    return use.image if name is None else (use.inputs or {}).get(name)


def _differ(before: Mapping[str, Any], after: Mapping[str, Any], name: str) -> bool:
    """Whether two hashes are both known and different."""
    return None not in (before.get(name), after.get(name)) and before[name] != after[name]


def read_settings(path: str | Path) -> SavedSettings:
    """Read the settings of generated images.

    Args:
        path: a `settings.json`, its folder, or a PNG written by `Generation.save`.

    Raises:
        UserError: the file is missing, or holds no settings.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "settings.json"
    values = _of_png(path) if path.suffix.lower() == ".png" else read_json(path)
    if not isinstance(values, dict) or not isinstance(values.get("request"), dict):
        raise UserError(f"{path} holds no settings; expected a settings.json or a PNG of `generate`", "wrong-kind")
    used, sha256, files = (_mapping(values.get(name)) for name in ("used", "sha256", "files"))
    try:
        request = GenerateRequest.from_json(values["request"])
    except UserError as error:
        raise UserError(f"{path}: {error}", error.code) from error
    parts = values.get("parts")
    parts = [_mapping(part) for part in parts] if isinstance(parts, list) else []
    return SavedSettings(request, used, sha256, files, parts, folder=path.parent)


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _of_png(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"there is no image at {path}", "missing-file")
    try:
        with Image.open(path) as image:
            text = getattr(image, "text", {})
            return json.loads(text.get("controlkit", "null"))
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a PNG of `generate` ({error})", "bad-image") from error
