"""PEFT's folder of a CtrLoRA adapter: `adapter_config.json` and `adapter_model.safetensors`.

LoRA of every linear layer, with alpha equal to the rank (a scale of 1); zero convolutions and transformer norms as
`modules_to_save`. `PeftModel.from_pretrained` loads it onto the base control's network: diffusers' `ControlNetModel`
with an identity as hint network.
"""

from __future__ import annotations

import math

from torch import Tensor

from controlkit.controls.control import Control
from controlkit.controls.file_format import (
    CONFIG_ERRORS,
    Checkpoint,
    Reference,
    TensorFile,
    Written,
    check_names,
    declared_config,
    on_one_line,
)
from controlkit.errors import UserError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""Files of the folder."""
_PREFIX = "base_model.model."
_SUFFIXES = {"lora_layer.down.weight": "lora_A.weight", "lora_layer.up.weight": "lora_B.weight"}


def detect(file: TensorFile) -> str | None:
    """Describes a folder from its config and names, if it is such an adapter."""
    if "peft_type" not in file.config or not any(".controlnet_down_blocks." in name for name in file.tensors):
        return None
    return "an adapter of CtrLoRA as PEFT's folder"


def read(kind: type[Control], file: TensorFile, reference: Reference, description: str) -> Checkpoint:
    """A folder written by PEFT or controlkit."""
    path, title = file.path, kind.title
    scale = _scale(file)
    tensors: dict[str, Tensor] = {}
    for name, value in file.tensors.items():
        own_name = name.removeprefix(_PREFIX)
        for suffix, peft_suffix in _SUFFIXES.items():
            if own_name.endswith(f".{peft_suffix}"):
                own_name = f"{own_name.removesuffix(peft_suffix)}{suffix}"
        tensors[own_name] = value * scale if scale != 1 and own_name.endswith(".up.weight") else value
    try:
        inferred = kind.config_of(tensors, reference.unet_config)
        config = {**(declared_config(file.metadata) or inferred), "rank": inferred["rank"]}
        expected = kind.shapes(config)
    except CONFIG_ERRORS as error:
        raise UserError(f"{path} looks like {title}, but {on_one_line(error)}", "damaged-file") from error
    if inferred["rank"] != file.config["r"]:
        raise UserError(
            f"{path}: {CONFIG} says rank {file.config['r']}, and its tensors have rank {inferred['rank']}",
            "damaged-file",
        )
    check_names(path, title, expected, tensors, file.others)
    ordered = {name: tensors[name] for name in expected}
    return Checkpoint(kind.kind, config, ordered, dict(file.metadata), path=path)


def write(checkpoint: Checkpoint, reference: Reference) -> Written:
    """A folder that PEFT loads."""
    tensors: dict[str, Tensor] = {}
    linear: list[str] = []
    saved_modules: dict[str, None] = {}
    for name, value in checkpoint.tensors.items():
        layer, lora, last = name.partition(".lora_layer.")
        if lora:
            tensors[f"{_PREFIX}{layer}.{_SUFFIXES[f'lora_layer.{last}']}"] = value
            if last.startswith("down"):
                linear.append(layer)
        else:
            tensors[f"{_PREFIX}{name}"] = value
            saved_modules[name.rpartition(".")[0]] = None
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": checkpoint.metadata.get("control.base_control", ""),
        "inference_mode": True,
        "r": checkpoint.config["rank"],
        "lora_alpha": checkpoint.config["rank"],
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "target_modules": linear,
        "modules_to_save": list(saved_modules),
    }
    return Written(tensors=tensors, configs={CONFIG: config})


def _scale(file: TensorFile) -> float:
    """PEFT's factor of the change, to be folded into it.

    Raises:
        UserError: it is another kind of LoRA than CtrLoRA's.
    """
    config, path = file.config, file.path
    others = [key for key in ("use_dora", "rank_pattern", "fan_in_fan_out", "lora_bias") if config.get(key)]
    if config.get("peft_type") != "LORA" or others:
        also = f" with {', '.join(others)}" if others else ""
        raise UserError(
            f"{path} is a PEFT adapter of type {config.get('peft_type')}{also}; CtrLoRA needs plain LoRA with one rank"
            " for all layers",
            "unsupported",
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    of_one = not config.get("alpha_pattern")
    if not of_one or not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise UserError(
            f"{path}/adapter_config.json has no single rank and alpha; CtrLoRA needs one of each for all layers",
            "unsupported",
        )
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
