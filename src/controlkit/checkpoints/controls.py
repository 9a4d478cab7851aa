"""Control files: what a name means, and loading any of them.

A control of ours is one safetensors file, whose metadata says what it is (`files.py`); diffusers' folder of a
ControlNet is read too.
"""

from __future__ import annotations

import json
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from controlkit import conditions
from controlkit.bases.base import Base
from controlkit.checkpoints.ctrlora import BASE_KIND, build_adapter, build_base
from controlkit.checkpoints.files import control_metadata, read_tensors, short, write_tensors
from controlkit.controls.base_control import BaseControl
from controlkit.controls.control import Control
from controlkit.controls.controlnet import ControlNet, build_controlnet
from controlkit.controls.ctrlora import CtrLoRA
from controlkit.errors import UserError, nearest
from controlkit.files import read_json


def save_control(
    path: str | Path,
    control: ControlNet,
    base: Base,
    *,
    made: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float16,
) -> Path:
    """Write a ControlNet as one safetensors file, whole or not at all.

    Args:
        made: how it came to be (steps, seed, recipe, ...), kept as `control.made`.
        dtype: of the weights in the file.
    """
    metadata = control_metadata(
        path,
        base,
        kind=control.kind,
        architecture="control-net",
        config=control.config(),
        condition=control.condition,
        made=made,
    )
    return write_tensors(path, control.diffusers_state_dict(), metadata, dtype)


def load_control(
    name: str | Path, base: Base | None = None, *, shared: dict[str, BaseControl] | None = None
) -> Control:
    """Load a control by the name of one that ships with nano (`canny`), from a file, or from a diffusers folder.

    Args:
        base: where it will be used; if given, the control must fit it, and moves to its device and dtype.
        shared: base controls that are loaded, by fingerprint; adapters loaded with the same dict share theirs.

    Raises:
        UserError: it does not exist, is damaged, is something else, or does not fit the base.
    """
    path = find_control(name)
    control = _load_folder(path) if path.is_dir() else _load_file(path, {} if shared is None else shared)
    if base is not None:
        check_fits(control, base, str(name))
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


def check_fits(control: Control, base: Base, name: str) -> None:
    """Refuse a control whose shapes are not the base's.

    Raises:
        UserError: says which shape differs.
    """
    config, unet = control.config(), base.unet.config
    for key, what in (
        ("in_channels", "latent channels"),
        ("block_out_channels", "channels"),
        ("cross_attention_dim", "text width"),
    ):
        mine, theirs = config.get(key), unet.get(key)
        if json.dumps(mine) != json.dumps(theirs):
            raise UserError(
                f"the control {name} does not fit the base {base.name}: its {what} are {mine}, not {theirs}"
            )
    if isinstance(control, ControlNet):
        halvings = len(config["conditioning_embedding_out_channels"]) - 1
        if 2**halvings != base.factor:
            raise UserError(
                f"the control {name} does not fit the base {base.name}: its hint network divides the picture by"
                f" {2**halvings}, the base's autoencoder by {base.factor}"
            )


def _load_file(path: Path, shared: dict[str, BaseControl]) -> Control:
    metadata, tensors = read_tensors(path)
    kind = metadata.get("control.kind")
    if kind is None:
        raise UserError(
            f"{path} has no control.kind in its metadata: it is not one of controlkit's control files"
            f" ({len(tensors)} tensors, such as {next(iter(sorted(tensors)), 'none')})"
        )
    if kind == CtrLoRA.kind:
        return build_adapter(path, metadata, tensors, shared, shipped_controls().values())
    if kind == BASE_KIND:
        return build_base(path, metadata, tensors)
    if kind != ControlNet.kind:
        raise UserError(f"{path} is a control of kind {kind!r}, which this version does not know")
    try:
        config = json.loads(metadata["control.config"])
        return build_controlnet(config, tensors, metadata.get("control.condition") or None)
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{path} does not hold the {kind} that its metadata announces: {short(error)}") from error


def _load_folder(path: Path) -> Control:
    config_path, weights = path / "config.json", path / "diffusion_pytorch_model.safetensors"
    if not config_path.is_file() or not weights.is_file():
        raise UserError(f"{path} is not a diffusers folder of a ControlNet: config.json or its .safetensors is missing")
    config = read_json(config_path)
    if not isinstance(config, dict):
        raise UserError(f"{config_path} is not the config of a network: expected a mapping")
    if config.get("_class_name") != "ControlNetModel":
        raise UserError(f"{path} holds a {config.get('_class_name', 'model of no class')}, not a ControlNetModel")
    try:
        return build_controlnet(config, read_tensors(weights)[1], None)
    except (RuntimeError, ValueError, TypeError) as error:
        raise UserError(f"{path} does not hold the ControlNet that its config announces: {short(error)}") from error
