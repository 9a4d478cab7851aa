"""diffusers' folder: `config.json` and safetensors, which `from_pretrained` loads with no code of ours."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import diffusers
from diffusers import ControlNetModel, ControlNetXSAdapter, T2IAdapter

from controlkit.checkpoints.content import (
    CONFIG_ERRORS,
    CONTROLNET,
    CONTROLNET_XS,
    KINDS,
    T2I_ADAPTER,
    Content,
    Options,
    check_names,
    expected_shapes,
    require_heads,
)
from controlkit.checkpoints.files import write_tensors
from controlkit.checkpoints.layouts.layout import Layout
from controlkit.checkpoints.recognise import Found
from controlkit.checkpoints.tensors import on_one_line
from controlkit.errors import UserError
from controlkit.files import write_json

_CONFIG, _WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"

_CLASSES: dict[str, Any] = {
    CONTROLNET: ControlNetModel,
    T2I_ADAPTER: T2IAdapter,
    CONTROLNET_XS: ControlNetXSAdapter,
}


def read(found: Found, options: Options) -> Content:
    """A folder of a ControlNet, a T2I-Adapter or a ControlNet-XS."""
    kind = found.kind or ""
    what = f"the {_CLASSES[kind].__name__} that its config announces"
    config = {key: value for key, value in found.config.items() if not key.startswith("_")}
    try:
        expected = expected_shapes(kind, config)
    except CONFIG_ERRORS as error:
        raise UserError(f"{found.path} does not hold {what}: {on_one_line(error)}") from error
    check_names(found.path, KINDS[kind], expected, found.file.tensors, found.file.others)
    return Content(kind, config, dict(found.file.tensors), dict(found.file.metadata))


def write(content: Content, path: Path, options: Options) -> list[str]:
    """A folder with config and weights."""
    kind = _CLASSES[content.kind]
    if content.kind == CONTROLNET:
        require_heads(path, content.config)
    known = inspect.signature(kind.__init__).parameters
    config = {key: value for key, value in content.config.items() if key in known}
    write_tensors(path / _WEIGHTS, content.tensors, content.file_metadata(path), None)
    write_json(
        path / _CONFIG,
        {"_class_name": kind.__name__, "_diffusers_version": diffusers.__version__, **config},
    )
    return []


LAYOUT = Layout(
    name="diffusers",
    says="diffusers' folder (config.json and diffusion_pytorch_model.safetensors)",
    reads=read,
    writes=write,
    kinds=(CONTROLNET, T2I_ADAPTER, CONTROLNET_XS),
    files=(_CONFIG, _WEIGHTS),
)
