"""What `accelerate launch` asks for, as it tells the processes that it starts: variables of the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from controlkit.errors import UserError
from controlkit.files import read_json


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How the processes of a run share what is trained."""

    shards: bool = False
    """Whether each holds a part of weights, gradients and optimiser (FSDP, ZeRO); otherwise each holds all (DDP)."""
    reshard: bool = False
    """Whether weights are whole only while a pass needs them (ZeRO stage 3), not during the whole step."""
    zero_stage: int | None = None
    """The stage of DeepSpeed's ZeRO that was asked for and that the above stands for."""


def asked_for(environment: Mapping[str, str] = os.environ) -> Launch:
    """What the environment of a process asks for.

    DeepSpeed's own engine does not run: it would write its states as pickles. Its ZeRO (Rajbhandari et al. 2020) is
    what torch's FSDP does, so its stages become that.

    Raises:
        UserError: DeepSpeed's configuration cannot be read, or offloads, which FSDP is not made to do here.
    """
    if _is_true(environment, "ACCELERATE_USE_DEEPSPEED"):
        return _zero(environment)
    return Launch(shards=_is_true(environment, "ACCELERATE_USE_FSDP"))


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
        raise UserError(
            f"DeepSpeed is configured to offload to {', '.join(sorted(offload - {'none'}))}, which controlkit does not:"
            " set it to none in `accelerate config`, and use gradient_checkpointing, optimizer: adamw8bit or a smaller"
            " batch_size if memory is short"
        )
    if str(stage) not in ("0", "1", "2", "3"):
        raise UserError(f"DeepSpeed's ZeRO stage is {stage!r}; it must be 0, 1, 2 or 3")
    stage = int(stage)
    return Launch(shards=stage > 0, reshard=stage == 3, zero_stage=stage)


def _is_true(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "false").lower() in ("true", "1")
