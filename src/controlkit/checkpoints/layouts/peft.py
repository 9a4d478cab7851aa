"""PEFT's folder of a CtrLoRA adapter: `adapter_config.json` and `adapter_model.safetensors`.

LoRA of every linear layer, with alpha equal to the rank (a scale of 1), zero convolutions and transformer norms as
`modules_to_save`. `PeftModel.from_pretrained` puts it on the base control's network: diffusers' `ControlNetModel`
with an identity in the place of its hint network.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from torch import Tensor

from controlkit.checkpoints.content import CONFIG_ERRORS, CTRLORA, KINDS, Content, Options, check_names, expected_shapes
from controlkit.checkpoints.files import write_tensors
from controlkit.checkpoints.layouts.layout import Layout
from controlkit.checkpoints.recognise import Found
from controlkit.checkpoints.structure import config_of
from controlkit.checkpoints.tensors import on_one_line
from controlkit.errors import UserError
from controlkit.files import write_json

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_SUFFIXES = {"lora_layer.down.weight": "lora_A.weight", "lora_layer.up.weight": "lora_B.weight"}


def read(found: Found, options: Options) -> Content:
    """A folder that PEFT or we wrote."""
    path, what = found.path, KINDS[CTRLORA]
    scale = _scale(found)
    tensors: dict[str, Tensor] = {}
    for name, value in found.file.tensors.items():
        mine = name.removeprefix(_PREFIX)
        for suffix, theirs in _SUFFIXES.items():
            if mine.endswith(f".{theirs}"):
                mine = f"{mine.removesuffix(theirs)}{suffix}"
        tensors[mine] = value * scale if scale != 1 and mine.endswith(".up.weight") else value
    try:
        said = json.loads(found.file.metadata.get("control.config", "null"))
    except (ValueError, RecursionError):
        said = None
    content = Content(CTRLORA, said if isinstance(said, dict) else {}, tensors, dict(found.file.metadata))
    try:
        content.config = content.config or config_of(tensors, options.unet_config)
        expected = expected_shapes(CTRLORA, content.config, content.rank)
    except CONFIG_ERRORS as error:
        raise UserError(f"{path} looks like {what}, but {on_one_line(error)}") from error
    check_names(path, what, expected, tensors, found.file.others)
    content.tensors = {name: tensors[name] for name in expected}
    return content


def write(content: Content, path: Path, options: Options) -> list[str]:
    """A folder that PEFT loads."""
    tensors: dict[str, Tensor] = {}
    linear: list[str] = []
    whole: dict[str, None] = {}
    for name, value in content.tensors.items():
        layer, lora, last = name.partition(".lora_layer.")
        if lora:
            tensors[f"{_PREFIX}{layer}.{_SUFFIXES[f'lora_layer.{last}']}"] = value
            if last.startswith("down"):
                linear.append(layer)
        else:
            tensors[f"{_PREFIX}{name}"] = value
            whole[name.rpartition(".")[0]] = None
    write_tensors(path / _WEIGHTS, tensors, content.file_metadata(path), None)
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": content.metadata.get("control.base_control", ""),
        "inference_mode": True,
        "r": content.rank,
        "lora_alpha": content.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "target_modules": linear,
        "modules_to_save": list(whole),
    }
    write_json(path / _CONFIG, config)
    return []


def _scale(found: Found) -> float:
    """The factor that PEFT multiplies the change by, to be folded into it.

    Raises:
        UserError: it is a LoRA of another kind than CtrLoRA's.
    """
    config, path = found.config, found.path
    if config.get("peft_type") != "LORA" or config.get("use_dora") or config.get("rank_pattern"):
        raise UserError(f"{path} holds another kind of PEFT adapter than plain LoRA of one rank, which CtrLoRA has")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    of_one = not config.get("alpha_pattern")
    if not of_one or not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise UserError(f"{path}/adapter_config.json does not say one rank and one alpha for all layers")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


LAYOUT = Layout(
    name="peft",
    says="PEFT's folder of an adapter",
    reads=read,
    writes=write,
    kinds=(CTRLORA,),
    files=(_CONFIG, _WEIGHTS),
)
