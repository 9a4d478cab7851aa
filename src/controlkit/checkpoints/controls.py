"""Control files: what a name means, and loading any of them.

A control of ours is one safetensors file, whose metadata says what it is (`files.py`); those of other tools are
recognised by what is in them (`recognise.py`) and read in their own layout (`layouts/`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from controlkit import conditions
from controlkit.bases.base import Base
from controlkit.checkpoints.content import ARCHITECTURES, Content, Options, require_heads
from controlkit.checkpoints.ctrlora import BASE_KIND, build_adapter, build_base
from controlkit.checkpoints.files import control_metadata, write_tensors
from controlkit.checkpoints.layouts import read_content
from controlkit.checkpoints.recognise import known, recognise
from controlkit.checkpoints.tensors import as_float32
from controlkit.controls.base_control import BaseControl
from controlkit.controls.control import Control
from controlkit.controls.controlnet import ControlNet, build_controlnet
from controlkit.controls.ctrlora import CtrLoRA
from controlkit.controls.t2i_adapter import T2IAdapterControl, build_t2i_adapter
from controlkit.errors import UserError, nearest
from controlkit.files import files_of


def save_control(
    path: str | Path,
    control: ControlNet | T2IAdapterControl,
    base: Base,
    *,
    made: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float16,
) -> Path:
    """Write a ControlNet or a T2I-Adapter as one safetensors file, whole or not at all.

    Args:
        made: how it came to be (steps, seed, recipe, ...), kept as `control.made`.
        dtype: of the weights in the file.
    """
    metadata = control_metadata(
        path,
        base,
        kind=control.kind,
        architecture=ARCHITECTURES[control.kind],
        config=control.config(),
        condition=control.condition,
        made=made,
    )
    return write_tensors(path, control.diffusers_state_dict(), metadata, dtype)


def load_control(
    name: str | Path, base: Base | None = None, *, shared: dict[str, BaseControl] | None = None
) -> Control:
    """Load a control by the name of one that ships with nano (`canny`), from a file or folder in any layout.

    An adapter of CtrLoRA finds its base control beside it; `ADAPTER+BASE` names both files.

    Args:
        base: where it will be used; if given, the control must fit it, and moves to its device and dtype.
        shared: base controls that are loaded, by fingerprint; adapters loaded with the same dict share theirs.

    Raises:
        UserError: it does not exist, is damaged, is something else, or does not fit the base.
    """
    adapter, base_file = _split_pair(name)
    path = find_control(adapter)
    found = known(recognise(path))
    options = _options(base)
    if found.kind not in _BUILDERS:
        raise UserError(f"{path} is {found.says}; it can be inspected and converted, but not run yet")
    content = read_content(found, options)
    control = _BUILDERS[found.kind](path, content, {} if shared is None else shared, base_file, options)
    if base is not None:
        check_fits(control, base, str(name))
        if base.dtype == torch.bfloat16:  # which would change what adapters know it by
            for module in control.modules():
                if isinstance(module, BaseControl):
                    module.keep_fingerprint()
        control.to(device=base.device, dtype=base.dtype)
    control.eval().requires_grad_(False)
    return control


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


def control_files(name: str | Path) -> list[Path]:
    """The files that `name` means for `load_control`, in order: one, those of a folder, or of `ADAPTER+BASE` both.

    Raises:
        UserError: there is no such control.
    """
    adapter, base_file = _split_pair(name)
    return sorted(files_of(find_control(adapter))) + ([] if base_file is None else sorted(files_of(base_file)))


def check_fits(control: Control, base: Base, name: str) -> None:
    """Refuse a control that was made for a base of another shape.

    Raises:
        UserError: says what differs.
    """
    if (reason := control.misfit(base)) is not None:
        raise UserError(f"the control {name} does not fit the base {base.name}: {reason}")


def _split_pair(name: str | Path) -> tuple[str | Path, Path | None]:
    """`ADAPTER+BASE` as two, if it is that and no name of its own."""
    adapter, plus, base_file = str(name).rpartition("+")
    if not plus or Path(name).exists() or not Path(adapter).exists():
        return name, None
    return adapter, find_control(base_file)


def _options(base: Base | None) -> Options:
    if base is None:
        return Options()

    def weights() -> dict[str, torch.Tensor]:
        # Files are read on the CPU, and what they hold is added to these.
        return {name: value.cpu() for name, value in base.unet.state_dict().items()}

    return Options(unet_config=dict(base.unet.config), unet=weights)


def _build_controlnet(
    path: Path, content: Content, shared: dict[str, BaseControl], base_file: Path | None, options: Options
) -> Control:
    require_heads(path, content.config)
    return build_controlnet(content.config, as_float32(content.tensors), content.condition)


def _build_t2i_adapter(
    path: Path, content: Content, shared: dict[str, BaseControl], base_file: Path | None, options: Options
) -> Control:
    return build_t2i_adapter(content.config, as_float32(content.tensors), content.condition)


def _build_base(
    path: Path, content: Content, shared: dict[str, BaseControl], base_file: Path | None, options: Options
) -> Control:
    return build_base(path, content)


def _build_adapter(
    path: Path, content: Content, shared: dict[str, BaseControl], base_file: Path | None, options: Options
) -> Control:
    elsewhere = shipped_controls().values()
    return build_adapter(path, content, shared, elsewhere, base_file=base_file, options=options)


_BUILDERS: dict[str, Callable[[Path, Content, dict[str, BaseControl], Path | None, Options], Control]] = {
    ControlNet.kind: _build_controlnet,
    BASE_KIND: _build_base,
    CtrLoRA.kind: _build_adapter,
    T2IAdapterControl.kind: _build_t2i_adapter,
}
"""Kind of a file -> the control of its content. The arguments are those of `build_adapter`."""
