"""Settings of `accelerate launch`, read from the environment variables that it sets."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from controlkit.errors import UserError
from controlkit.files import read_json

_NO_OFFLOAD = (
    "which controlkit does not support: set it to {} in `accelerate config`. To save memory, use"
    " gradient_checkpointing, optimizer: adamw8bit or a smaller batch_size"
)

_NO_SHARD, _HYBRID = ("no_shard", "3"), ("hybrid_shard", "hybrid_shard_zero2", "4", "5")
"""FSDP's strategies, by name and by accelerate's numbers."""
_FULL, _GRADIENTS_ONLY = ("full_shard", "1"), ("shard_grad_op", "2")
_STRATEGIES = (*_FULL, *_GRADIENTS_ONLY, *_NO_SHARD, *_HYBRID)
_RESHARDS = ("true", *_FULL, "hybrid_shard", "4")
"""Settings that shard weights again after the forward pass."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How the processes of a run share the trained weights."""

    shards: bool = False
    """Whether weights, gradients and optimiser are sharded (FSDP, ZeRO); otherwise every process has all (DDP)."""
    reshard: bool = False
    """Whether weights are sharded again after each forward pass (ZeRO stage 3), not only after the step."""
    zero_stage: int | None = None
    """The ZeRO stage that DeepSpeed's settings ask for, which the above replaces."""


def launch_settings(environment: Mapping[str, str] = os.environ) -> Launch:
    """The launch settings in the environment.

    DeepSpeed's engine is not used, because it writes its states as pickles. torch's FSDP implements the same ZeRO
    (Rajbhandari et al. 2020) and runs in its place.

    Raises:
        UserError: DeepSpeed's configuration cannot be read, or offloading is configured, which is not supported.
    """
    if _is_true(environment, "ACCELERATE_USE_DEEPSPEED"):
        return _zero(environment)
    if not _is_true(environment, "ACCELERATE_USE_FSDP"):
        return Launch()
    if _is_true(environment, "FSDP_OFFLOAD_PARAMS"):
        raise UserError(f"FSDP is configured to offload parameters, {_NO_OFFLOAD.format('false')}", "unsupported")
    if environment.get("FSDP_SHARDING_STRATEGY", "").lower() in _NO_SHARD:
        return Launch()
    strategy = _strategy(environment)
    return Launch() if strategy in _NO_SHARD else Launch(shards=True, reshard=strategy in _RESHARDS)


def _strategy(environment: Mapping[str, str]) -> str:
    """What FSDP shards, in lower case: a strategy (FSDP1), or whether weights are sharded again (FSDP2)."""
    strategy = environment.get("FSDP_SHARDING_STRATEGY", "false").lower()
    reshard = environment.get("FSDP_RESHARD_AFTER_FORWARD", strategy).lower()
    # accelerate always sets both. In version 1 the boolean is FSDP2's default, but a strategy is the user's.
    is_first = environment.get("FSDP_VERSION") == "1"
    return strategy if is_first and strategy in _STRATEGIES and reshard not in _STRATEGIES else reshard


def unused_settings(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Other settings of accelerate, which are not used: sentences to follow "accelerate's"."""

    def setting(name: str) -> str | None:
        value = environment.get(name, "none")
        return None if value.lower() in ("none", "no", "false", "auto", "") else value

    notes = []
    precision = setting("ACCELERATE_MIXED_PRECISION")
    if precision is not None:
        notes.append(f"mixed precision, {precision}, is not used: the recipe's precision is")
    steps = setting("ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
    if steps not in (None, "1"):
        notes.append(f"gradient accumulation, {steps} steps, is not used: the recipe's gradient_accumulation_steps is")
    if setting("ACCELERATE_GRADIENT_CLIPPING") is not None:
        notes.append("gradient clipping is not used: the recipe's max_grad_norm is")
    if setting("ACCELERATE_DYNAMO_BACKEND") is not None:
        notes.append("torch.compile is not used")
    if setting("ACCELERATE_USE_FSDP") is not None:
        if setting("FSDP_ACTIVATION_CHECKPOINTING") is not None:
            notes.append("activation checkpointing is not used: the recipe's gradient_checkpointing is")
        if environment.get("FSDP_SHARDING_STRATEGY", "").lower() in _HYBRID:
            notes.append("hybrid sharding is not used: all processes share one copy")
    return notes + _unused_of_deepspeed(environment)


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
        raise UserError(f"DeepSpeed is configured to offload to {where}, {_NO_OFFLOAD.format('none')}", "unsupported")
    if str(stage) not in ("0", "1", "2", "3"):
        raise UserError(f"DeepSpeed's ZeRO stage is {stage!r}; it must be 0, 1, 2 or 3", "out-of-range")
    stage = int(stage)
    return Launch(shards=stage > 0, reshard=stage == 3, zero_stage=stage)


def _is_true(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "false").lower() in ("true", "1")
