"""What a control's file is."""

from __future__ import annotations

import json
from typing import Any

from controlkit.checkpoints.content import CONTROLNET_XS
from controlkit.checkpoints.controls import find_control
from controlkit.checkpoints.ctrlora import BASE_KIND
from controlkit.checkpoints.layouts import read_content
from controlkit.checkpoints.recognise import known, recognise
from controlkit.controls.control import Control
from controlkit.controls.controlnet import ControlNet
from controlkit.controls.ctrlora import CtrLoRA

_CONTROLS: dict[str, type[Control]] = {ControlNet.kind: ControlNet, CtrLoRA.kind: CtrLoRA, BASE_KIND: CtrLoRA}
_NEED_A_BASE = ("difference", "control-lora")
"""Layouts that hold only what differs from a base, so that their own tensors are counted."""


def describe(name: str) -> dict[str, Any]:
    """Facts about a control that ships, or a control's file in any layout.

    Raises:
        UserError: there is nothing of that name, or it is nothing that is known.
    """
    path = find_control(name)
    found = known(recognise(path))
    content = None if found.kind == CONTROLNET_XS or found.layout in _NEED_A_BASE else read_content(found)
    control = _CONTROLS.get(found.kind or "")
    tensors = found.file.tensors if content is None else content.tensors
    facts: dict[str, Any] = {
        "kind": found.kind,
        "layout": found.layout,
        "what": found.says,
        "path": str(path),
        "tensors": len(tensors),
        "parameters": sum(value.numel() for value in tensors.values()),
        "dtypes": ", ".join(sorted({str(value.dtype).removeprefix("torch.") for value in tensors.values()})),
    }
    if control is not None:
        facts |= {"reads": reads_of(control), "enters at": control.site.value}
    facts["condition"] = found.file.metadata.get("control.condition") or "not said"
    if content is not None and content.rank is not None:
        facts["rank"] = content.rank
    if content is not None and content.notes:
        facts["notes"] = "; ".join(content.notes)
    if path.is_file():
        facts["bytes"] = path.stat().st_size
    facts["metadata"] = {key: _plain(value) for key, value in found.file.metadata.items()}
    return facts


def reads_of(control: Control | type[Control]) -> str:
    return ", ".join(flag.name.lower() for flag in control.reads if flag.name) or "nothing"


def _plain(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value
