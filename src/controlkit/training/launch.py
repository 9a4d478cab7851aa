"""What `accelerate launch` asks for, as it tells the processes that it starts: variables of the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from controlkit.errors import UserError
from controlkit.files import read_json

_NO_OFFLOAD = (
    "which controlkit does not: set it to {} in `accelerate config`, and use gradient_checkpointing,"
    " optimizer: adamw8bit or a smaller batch_size if memory is short"
)

_NO_SHARD, _HYBRID = ("no_shard", "3"), ("hybrid_shard", "hybrid_shard_zero2", "4", "5")
"""FSDP's strategies, by name and as accelerate numbers them."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How the processes of a run share what is trained."""

    shards: bool = False
    """Whether each holds a part of weights, gradients and optimiser (FSDP, ZeRO); otherwise each holds all (DDP)."""
    reshard: bool = False
    """Whether weights are whole only while a pass needs them (ZeRO stage 3), not during the whole step."""
    zero_stage: int | None = None
    """The stage of DeepSpeed's ZeRO that was asked for and that the above stands for."""


def launch_settings(environment: Mapping[str, str] = os.environ) -> Launch:
    """What the environment of a process asks for.

    DeepSpeed's own engine does not run: it would write its states as pickles. Its ZeRO (Rajbhandari et al. 2020) is
    what torch's FSDP does, so its stages become that.

    Raises:
        UserError: DeepSpeed's configuration cannot be read, or it or FSDP's offloads, which is not done here.
    """
    if _is_true(environment, "ACCELERATE_USE_DEEPSPEED"):
        return _zero(environment)
    if not _is_true(environment, "ACCELERATE_USE_FSDP"):
        return Launch()
    if _is_true(environment, "FSDP_OFFLOAD_PARAMS"):
        raise UserError(f"FSDP is configured to offload parameters, {_NO_OFFLOAD.format('false')}")
    if environment.get("FSDP_SHARDING_STRATEGY", "").lower() in _NO_SHARD:
        return Launch()
    # The second version of FSDP says true or false, the first the name of a strategy.
    strategy = environment.get("FSDP_RESHARD_AFTER_FORWARD", environment.get("FSDP_SHARDING_STRATEGY", "false"))
    return Launch(shards=True, reshard=strategy.lower() in ("true", "1", "full_shard"))


def unused_settings(environment: Mapping[str, str] = os.environ) -> list[str]:
    """What the environment asks for beside that and does not get, a sentence each, to follow "accelerate's"."""

    def given(name: str) -> str | None:
        value = environment.get(name, "none")
        return None if value.lower() in ("none", "no", "false", "auto", "") else value

    found = []
    asked = given("ACCELERATE_MIXED_PRECISION")
    if asked is not None:
        found.append(f"mixed precision, {asked}, is not used: the recipe's precision is")
    steps = given("ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
    if steps not in (None, "1"):
        found.append(f"gradient accumulation over {steps} steps is not used: raise batch_size")
    if given("ACCELERATE_GRADIENT_CLIPPING") is not None:
        found.append("gradient clipping is not used: the recipe's max_grad_norm is")
    if given("ACCELERATE_DYNAMO_BACKEND") is not None:
        found.append("torch.compile is not used")
    if given("ACCELERATE_USE_FSDP") is not None:
        if given("FSDP_ACTIVATION_CHECKPOINTING") is not None:
            found.append("activation checkpointing is not used: the recipe's gradient_checkpointing is")
        if environment.get("FSDP_SHARDING_STRATEGY", "").lower() in _HYBRID:
            found.append("hybrid sharding is not used: all processes share one copy")
    return found + _unused_of_deepspeed(environment)


def _unused_of_deepspeed(environment: Mapping[str, str]) -> list[str]:
    file = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if not _is_true(environment, "ACCELERATE_USE_DEEPSPEED") or file == "none":
        return []
    names = [name for name, value in read_json(Path(file)).items() if name != "zero_optimization" and value != "auto"]
    return [f"{', '.join(names)} of {file}: not used, the recipe's settings are"] if names else []


def _zero(environment: Mapping[str, str]) -> Launch:
    stage: Any = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    offload = {
        environment.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what}_DEVICE", "none") for what in ("OPTIMIZER", "PARAM")
    }
    file = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file != "none":
        zero = read_json(Path(file)).get("zero_optimization", {})
        stage = zero.get("stage", 0)
        parts = [zero.get(name) or {} for name in ("offload_optimizer", "offload_param")]
        offload = {str(part.get("device", "none")) for part in parts}
    if offload - {"none"}:
        where = ", ".join(sorted(offload - {"none"}))
        raise UserError(f"DeepSpeed is configured to offload to {where}, {_NO_OFFLOAD.format('none')}")
    if str(stage) not in ("0", "1", "2", "3"):
        raise UserError(f"DeepSpeed's ZeRO stage is {stage!r}; it must be 0, 1, 2 or 3")
    stage = int(stage)
    return Launch(shards=stage > 0, reshard=stage == 3, zero_stage=stage)


def _is_true(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "false").lower() in ("true", "1")
