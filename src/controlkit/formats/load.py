"""Control files: find, load and save them.

A controlkit file is one safetensors file whose metadata describes it (`metadata.py`); files of other tools are detected
by content (`detect.py`) and read in a format of their system (`Control.formats`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from controlkit import conditions
from controlkit.bases.base import Base
from controlkit.controls.control import Control
from controlkit.controls.file_format import Reference, declared_config
from controlkit.controls.registry import find
from controlkit.errors import UserError, nearest
from controlkit.files import files_of
from controlkit.formats.companions import load_companion, read_checkpoint
from controlkit.formats.detect import detect, known
from controlkit.formats.metadata import control_metadata, provenance_of, write_tensors
from controlkit.formats.native import require_settings

_MARKS = ("config.json", "adapter_config.json", "model_index.json")
"""Files that mark the folder of a model; pairs have other JSON files."""


def save_control(
    path: str | Path,
    control: Control,
    base: Base,
    *,
    companion: str | None = None,
    made: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float16,
    further: Mapping[str, str] | None = None,
) -> Path:
    """Write a control as one safetensors file, atomically.

    Args:
        companion: name of its companion's file, without `.safetensors`: the first candidate when loading; the
            fingerprint decides.
        made: provenance (steps, seed, recipe, ...), stored as `control.made`.
        dtype: of the weights in the file.
        further: metadata to keep beside that of every control, which overrides it.

    Raises:
        UserError: the name does not end in .safetensors, or the file cannot be written.
    """
    if Path(path).suffix != ".safetensors":
        raise UserError(f"{path} must end in .safetensors, the only file type that is written", "unsupported")
    metadata = {**(further or {}), **control_metadata(path, control, base, made)}
    if companion is not None:
        metadata[control.companion_key] = companion
    state = control.file_state()
    if (fingerprint := control.saved_fingerprint(dtype)) is not None:
        metadata["control.fingerprint"] = fingerprint
    return write_tensors(path, state, metadata, dtype)


def load_control(name: str | Path, base: Base | None = None, *, shared: dict[str, Control] | None = None) -> Control:
    """Load a control by the name of a shipped one (`canny`), or from a file or folder in any format.

    A CtrLoRA adapter finds its base control in its folder; `ADAPTER+BASE` names both files.

    Args:
        base: to use it with; if given, the control must fit it, and moves to its device and dtype.
        shared: loaded companions, by fingerprint; controls loaded with the same dict share theirs.

    Raises:
        UserError: it does not exist, is damaged, is something else, or does not fit the base.
    """
    control_name, companion_file = split_pair(name)
    path = find_control(control_name)
    reference = reference_to(base)
    checkpoint = read_checkpoint(path, reference)
    kind = find(checkpoint.kind)
    if companion_file is not None:
        require_companion(control_name, kind)
    companion = None
    if kind.companion is not None:
        shipped = shipped_controls().values()
        loaded = {} if shared is None else shared
        companion = load_companion(path, checkpoint, loaded, shipped, file=companion_file, reference=reference)
    else:
        require_settings(checkpoint)
    control = kind.from_checkpoint(checkpoint, companion)
    if base is not None:
        check_fits(control, base, str(name))
        if base.dtype == torch.bfloat16:  # which would change its fingerprint
            for module in control.modules():
                if isinstance(module, Control):
                    module.keep_identity()
        control.to(device=base.device, dtype=base.dtype)
    return control.eval().requires_grad_(False)


def shipped_controls() -> dict[str, Path]:
    """Name -> file of every control shipped for nano.

    `canny` is a ControlNet; `nano/base` is CtrLoRA's base control and `nano/NAME` are its adapters.
    """
    folder = Path(str(files("controlkit") / "assets" / "controls"))
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.safetensors"))}


def find_control(name: str | Path) -> Path:
    """The file or folder of `name`: a path, a control trained in this folder, or a shipped control.

    `mine` is `mine.safetensors`, else `runs/mine/mine.safetensors`, where `adapt --name mine` writes it.

    All of these come before a folder of that name that holds no control, such as one of pairs. Among shipped controls,
    `palette` means `nano/palette` unless there is a `palette`, and aliases of a condition mean
    its control.

    Raises:
        UserError: there is none; the message suggests similar names.
    """
    path = Path(name)
    if not str(name).strip():
        raise UserError(
            "the control is empty; pass a file, a folder, or the name of a shipped control", "missing-setting"
        )
    # A folder of pairs is named like its condition, and so are the controls of it.
    is_other = path.is_dir() and not any((path / name).is_file() for name in _MARKS)
    if path.exists() and not is_other:
        return path
    for own in (Path(f"{name}.safetensors"), Path("runs", name, f"{path.name}.safetensors")):
        if own.is_file():
            return own
    shipped = shipped_controls()
    names = [str(name)]
    with suppress(UserError):
        names.append(conditions.find(str(name)).name)
    for candidate in (form.format(wanted) for wanted in names for form in ("{}", "nano/{}")):
        if candidate in shipped:
            return shipped[candidate]
    if is_other:
        return path
    raise UserError(
        f"there is no control {str(name)!r} and no such file{nearest(str(name), list(shipped))}", "missing-file"
    )


def control_class(name: str | Path) -> type[Control]:
    """The system of the control that `load_control` finds for `name`; only names and shapes are read.

    Raises:
        UserError: there is no such control, or it is something else.
    """
    control_name, _ = split_pair(name)
    detected = known(detect(find_control(control_name)))
    assert detected.control is not None
    return detected.control.class_of(declared_config(detected.file.metadata))


def recorded_condition(name: str | Path) -> str | None:
    """The condition that the header of a control's file records, if it does.

    Raises:
        UserError: there is no such control.
    """
    control_name, _ = split_pair(name)
    return detect(find_control(control_name)).file.metadata.get("control.condition") or None


def recorded_held_out(name: str | Path) -> float | None:
    """The fraction of pairs that a control's training held out, if its file records it.

    Raises:
        UserError: there is no such control.
    """
    control_name, _ = split_pair(name)
    share = provenance_of(detect(find_control(control_name)).file.metadata).get("held_out")
    return share if isinstance(share, int | float) and 0 <= share < 1 else None


def control_files(name: str | Path) -> list[Path]:
    """The files that `load_control` reads for `name`, in order: one, those of a folder, or both of `ADAPTER+BASE`.

    Raises:
        UserError: there is no such control.
    """
    control_name, companion = split_pair(name)
    return sorted(files_of(find_control(control_name))) + ([] if companion is None else sorted(files_of(companion)))


def check_fits(control: Control, base: Base, name: str) -> None:
    """Check that a control fits a base.

    Raises:
        UserError: it does not.
    """
    if (reason := control.incompatibility(base)) is not None:
        raise UserError(f"the control {name} does not fit the base {base.name}: {reason}", "incompatible")


def require_companion(name: str | Path, kind: type[Control] | None) -> None:
    """Raise if a control named as `NAME+COMPANION` has no companion."""
    if kind is None or kind.companion is None:
        what = "not a supported control" if kind is None else kind.title
        raise UserError(
            f"{name} is {what}, which has no base control; pass it without the part from + on", "contradiction"
        )


def split_pair(name: str | Path) -> tuple[str | Path, Path | None]:
    """`ADAPTER+BASE`, of paths or names of controls, as two, if it is that and not the name of one control.

    Raises:
        UserError: ADAPTER is a control, and BASE is none.
    """
    control_name, plus, companion = str(name).rpartition("+")
    if not plus or _is_found(name) or not _is_found(control_name):
        return name, None
    return control_name, find_control(companion)


def _is_found(name: str | Path) -> bool:
    try:
        find_control(name)
    except UserError:
        return False
    return True


def reference_to(base: Base | None) -> Reference:
    """What reading a file may need of a loaded base."""
    if base is None:
        return Reference()

    def weights() -> dict[str, torch.Tensor]:
        # Files are read on the CPU, where these are added to them.
        return {name: value.cpu() for name, value in base.denoiser.state_dict().items()}

    return denoiser_reference(type(base).denoiser_component().name, dict(base.denoiser.config), weights)


def denoiser_reference(
    component: str,
    config: Mapping[str, Any] | None,
    weights: Callable[[], Mapping[str, torch.Tensor]] | None = None,
) -> Reference:
    """A reference to the denoiser of a base.

    Args:
        component: its name in the base's folder, `unet` or `transformer`.
        config: its config, as in diffusers' folder.
        weights: loads its weights.
    """
    if component == "unet":
        return Reference(unet_config=config, unet=weights)
    return Reference(transformer_config=config, transformer=weights)
