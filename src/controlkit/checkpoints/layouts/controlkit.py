"""Ours: one safetensors file under diffusers' names, with metadata that says what it is.

A file of another tool in the same names (a ControlNet's weights out of a diffusers folder) is read too; what the
metadata does not say then follows from its shapes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from controlkit.checkpoints.content import (
    CONFIG_ERRORS,
    CONTROLNET_XS,
    CTRLORA,
    KINDS,
    T2I_ADAPTER,
    Content,
    Options,
    check_names,
    expected_shapes,
    require_heads,
)
from controlkit.checkpoints.files import write_tensors
from controlkit.checkpoints.layouts import t2i
from controlkit.checkpoints.layouts.layout import Layout
from controlkit.checkpoints.recognise import Found
from controlkit.checkpoints.structure import config_of
from controlkit.checkpoints.tensors import on_one_line
from controlkit.errors import UserError


def read(found: Found, options: Options) -> Content:
    """A file under diffusers' names."""
    kind, file = found.kind or "", found.file
    content = Content(kind, {}, dict(file.tensors), dict(file.metadata))
    announced = f"the {kind} that its metadata announces"
    if "control.kind" in file.metadata:
        try:
            content.config = _announced_config(file.metadata)
            expected = expected_shapes(kind, content.config, content.rank)
        except CONFIG_ERRORS as error:
            raise UserError(f"{found.path} does not hold {announced}: {on_one_line(error)}") from error
        try:
            check_names(found.path, f"{KINDS[kind]}", expected, file.tensors, file.others)
        except UserError as error:
            raise UserError(
                f"{found.path} does not hold {announced}: it looks {str(error).partition(' looks ')[2]}"
            ) from error
        return content
    try:
        read_config = t2i.config_of if kind == T2I_ADAPTER else config_of
        content.config = read_config(file.tensors, options.unet_config)
        expected = expected_shapes(kind, content.config, content.rank)
    except CONFIG_ERRORS as error:
        raise UserError(f"{found.path} looks like {found.says}, but {on_one_line(error)}") from error
    check_names(found.path, found.says, expected, file.tensors, file.others)
    return content


def write(content: Content, path: Path, options: Options) -> list[str]:
    """One safetensors file."""
    if content.kind not in (CTRLORA, T2I_ADAPTER, CONTROLNET_XS):
        require_heads(path, content.config)
    write_tensors(path, content.tensors, content.file_metadata(path), None)
    return []


def _announced_config(metadata: dict[str, str]) -> dict[str, Any]:
    config = json.loads(metadata["control.config"])
    if not isinstance(config, dict):
        # diffusers takes a string for the name of a model and looks for it on the hub.
        raise ValueError(f"the config is not a mapping but {config!r}")
    if metadata["control.kind"] == CTRLORA:
        config.pop("rank", None)
    return config


LAYOUT = Layout(
    name="controlkit",
    says="one safetensors file with metadata, ours",
    reads=read,
    writes=write,
    kinds=tuple(KINDS),
)
