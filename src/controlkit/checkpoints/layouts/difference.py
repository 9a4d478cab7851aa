"""A ControlNet as its difference from the base's UNet, with a scalar `difference` as its mark.

(Mikubill/sd-webui-controlnet, extract_controlnet_diff.py; kohya-ss/ControlNet-diff-modules.) A tool that reads it
adds the UNet of the checkpoint in use to every tensor that both have, so one file serves a family of checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from controlkit.checkpoints.content import CONTROLNET, Content, Options
from controlkit.checkpoints.files import write_tensors
from controlkit.checkpoints.layouts.layout import Layout
from controlkit.checkpoints.layouts.ldm import from_original, to_original
from controlkit.checkpoints.recognise import CONTROL_PREFIX, Found
from controlkit.errors import UserError

_MARK = "difference"


def read(found: Found, options: Options) -> Content:
    """The ControlNet: the difference plus the base's UNet."""
    if options.unet_weights is None:
        raise UserError(
            f"{found.path} holds only the difference of a ControlNet from a base's UNet; give that base, with its"
            " weights (--base)"
        )
    prefix = CONTROL_PREFIX if any(name.startswith(CONTROL_PREFIX) for name in found.file.tensors) else ""
    others = [*found.file.others]
    inside: dict[str, Tensor] = {}
    for name, value in found.file.tensors.items():
        if name.startswith(prefix) and name != _MARK:
            inside[name.removeprefix(prefix)] = value
        elif name != _MARK:
            others.append(name)
    content = from_original(
        found.path, CONTROLNET, found.says, inside, found.file.metadata, options, others=tuple(others), prefix=prefix
    )
    check_base(found.path, content, options.unet_weights)
    content.tensors = {
        name: value if name not in options.unet_weights else _sum(value, options.unet_weights[name])
        for name, value in content.tensors.items()
    }
    return content


def write(content: Content, path: Path, options: Options) -> list[str]:
    """The difference from the UNet of the base that was given."""
    if options.unet_weights is None:
        raise UserError("a difference file needs the base whose UNet is subtracted; give it, with its weights (--base)")
    unet = options.unet_weights
    check_base(path, content, unet)
    taken = {name: _sum(value, -unet[name]) for name, value in content.tensors.items() if name in unet}
    changed = [not torch.equal(_sum(value, unet[name]), content.tensors[name]) for name, value in taken.items()]
    reduced = Content(content.kind, content.config, {**content.tensors, **taken}, content.metadata)
    tensors = {f"{CONTROL_PREFIX}{name}": value for name, value in to_original(reduced).items()}
    tensors[_MARK] = torch.tensor(1.0)
    write_tensors(path, tensors, content.file_metadata(path), None)
    if any(changed):
        return [
            f"differences are rounded: {sum(changed)} of {len(taken)} tensors come back with an error in the last"
            " digits when the base is added again"
        ]
    return []


def check_base(path: Path, content: Content, unet: Mapping[str, Tensor]) -> None:
    """Refuse a base whose UNet has other shapes.

    Raises:
        UserError: says which tensor differs.
    """
    shared = [name for name in content.tensors if name in unet]
    if "conv_in.weight" not in shared:
        raise UserError(f"{path}: the base that was given has no UNet of Stable Diffusion's shape")
    for name in shared:
        if content.tensors[name].shape != unet[name].shape:
            raise UserError(
                f"{path} was not made for the base that was given: {name} is {tuple(content.tensors[name].shape)}"
                f" here and {tuple(unet[name].shape)} there"
            )


def _sum(value: Tensor, other: Tensor) -> Tensor:
    """value + other, rounded once, in the dtype of `value`."""
    return (value.double() + other.to(value.device).double()).to(value.dtype)


LAYOUT = Layout(
    name="difference",
    says="a ControlNet as its difference from the base's UNet",
    reads=read,
    writes=write,
    kinds=(CONTROLNET,),
)
