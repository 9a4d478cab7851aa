"""Control files: what a name means, and loading and saving any of them.

A control of ours is one safetensors file, whose metadata says what it is (`metadata.py`); those of other tools are
recognised by what is in them (`detect.py`) and read in the format that their system names (`Control.formats`).
"""

from __future__ import annotations

from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from controlkit import conditions
from controlkit.bases.base import Base
from controlkit.controls.control import Control
from controlkit.controls.file_format import Reference
from controlkit.controls.registry import find
from controlkit.errors import UserError, nearest
from controlkit.files import files_of
from controlkit.formats.companions import load_companion, read_checkpoint
from controlkit.formats.detect import detect, known
from controlkit.formats.metadata import control_metadata, write_tensors
from controlkit.formats.native import require_settings


def save_control(
    path: str | Path,
    control: Control,
    base: Base,
    *,
    companion: str | None = None,
    made: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float16,
) -> Path:
    """Write a control as one safetensors file, whole or not at all.

    Args:
        companion: what the file of its companion is called, without `.safetensors`; where it is looked for first. What
            counts is its fingerprint.
        made: how it came to be (steps, seed, recipe, ...), kept as `control.made`.
        dtype: of the weights in the file.
    """
    metadata = control_metadata(path, control, base, made)
    if companion is not None:
        metadata[control.companion_key] = companion
    state = control.file_state()
    if (fingerprint := control.saved_fingerprint(dtype)) is not None:
        metadata["control.fingerprint"] = fingerprint
    return write_tensors(path, state, metadata, dtype)


def load_control(name: str | Path, base: Base | None = None, *, shared: dict[str, Control] | None = None) -> Control:
    """Load a control by the name of one that ships with nano (`canny`), from a file or folder in any format.

    An adapter of CtrLoRA finds its base control beside it; `ADAPTER+BASE` names both files.

    Args:
        base: where it will be used; if given, the control must fit it, and moves to its device and dtype.
        shared: companions that are loaded, by fingerprint; controls loaded with the same dict share theirs.

    Raises:
        UserError: it does not exist, is damaged, is something else, or does not fit the base.
    """
    own, companion_file = _split_pair(name)
    path = find_control(own)
    reference = _reference(base)
    checkpoint = read_checkpoint(path, reference)
    kind = find(checkpoint.kind)
    companion = None
    if kind.companion is not None:
        ship = shipped_controls().values()
        loaded = {} if shared is None else shared
        companion = load_companion(path, checkpoint, loaded, ship, file=companion_file, reference=reference)
    else:
        require_settings(checkpoint)
    control = kind.from_checkpoint(checkpoint, companion)
    if base is not None:
        check_fits(control, base, str(name))
        if base.dtype == torch.bfloat16:  # which would change what others know it by
            for module in control.modules():
                if isinstance(module, Control):
                    module.keep_identity()
        control.to(device=base.device, dtype=base.dtype)
    return control.eval().requires_grad_(False)


def shipped_controls() -> dict[str, Path]:
    """Name -> file of every control that ships with nano.

    `canny` is a ControlNet; `nano/base` is CtrLoRA's base control and `nano/NAME` are its adapters.
    """
    folder = Path(str(files("controlkit") / "assets" / "controls"))
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.safetensors"))}


def find_control(name: str | Path) -> Path:
    """The file or folder that `name` means: a path, or a control that ships.

    Of those that ship, `palette` means `nano/palette` unless one is called just that, and other names of a
    condition mean its control.

    Raises:
        UserError: there is none; the message names the nearest that ship.
    """
    path = Path(name)
    if not str(name).strip():
        raise UserError("no control was named; give a file, a folder, or the name of one that ships")
    if path.exists():
        return path
    shipped = shipped_controls()
    names = [str(name)]
    with suppress(UserError):
        names.append(conditions.find(str(name)).name)
    for candidate in (form.format(wanted) for wanted in names for form in ("{}", "nano/{}")):
        if candidate in shipped:
            return shipped[candidate]
    raise UserError(f"there is no control called {str(name)!r} and no such file{nearest(str(name), list(shipped))}")


def control_class(name: str | Path) -> type[Control]:
    """The system of the control that `name` means for `load_control`, of whose file only names and shapes are read.

    Raises:
        UserError: there is no such control, or it is something else.
    """
    own, _ = _split_pair(name)
    kind = known(detect(find_control(own))).control
    assert kind is not None
    return kind


def control_files(name: str | Path) -> list[Path]:
    """The files that `name` means for `load_control`, in order: one, those of a folder, or of `ADAPTER+BASE` both.

    Raises:
        UserError: there is no such control.
    """
    own, companion = _split_pair(name)
    return sorted(files_of(find_control(own))) + ([] if companion is None else sorted(files_of(companion)))


def check_fits(control: Control, base: Base, name: str) -> None:
    """Refuse a control that was made for a base of another shape.

    Raises:
        UserError: says what differs.
    """
    if (reason := control.incompatibility(base)) is not None:
        raise UserError(f"the control {name} does not fit the base {base.name}: {reason}")


def _split_pair(name: str | Path) -> tuple[str | Path, Path | None]:
    """`ADAPTER+BASE` as two, if it is that and no name of its own."""
    own, plus, companion = str(name).rpartition("+")
    if not plus or Path(name).exists() or not Path(own).exists():
        return name, None
    return own, find_control(companion)


def _reference(base: Base | None) -> Reference:
    if base is None:
        return Reference()

    def weights() -> dict[str, torch.Tensor]:
        # Files are read on the CPU, and what they hold is added to these.
        return {name: value.cpu() for name, value in base.unet.state_dict().items()}

    return Reference(unet_config=dict(base.unet.config), unet=weights)
