"""What accelerate's environment asks for."""

from __future__ import annotations

import json

import pytest
import torch

from controlkit.errors import UserError
from controlkit.training.launch import Launch, launch_settings, unused_settings
from controlkit.training.run import choose_device
from refusals import refused

DEEPSPEED = "ACCELERATE_USE_DEEPSPEED"
STAGE = "ACCELERATE_DEEPSPEED_ZERO_STAGE"
FILE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Launch()),
        ({"ACCELERATE_USE_FSDP": "true"}, Launch(shards=True)),
        ({"ACCELERATE_USE_FSDP": "false", DEEPSPEED: "false"}, Launch()),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_SHARDING_STRATEGY": "NO_SHARD"}, Launch()),
        ({DEEPSPEED: "true"}, Launch(shards=True, zero_stage=2)),
        ({DEEPSPEED: "true", STAGE: "0"}, Launch(zero_stage=0)),
        ({DEEPSPEED: "true", STAGE: "1"}, Launch(shards=True, zero_stage=1)),
        ({DEEPSPEED: "true", STAGE: "3"}, Launch(shards=True, reshard=True, zero_stage=3)),
        ({DEEPSPEED: "true", FILE: "none", STAGE: "1"}, Launch(shards=True, zero_stage=1)),
    ],
)
def test_what_is_asked_for(environment, expected):
    assert launch_settings(environment) == expected


def test_a_file_of_deepspeed_is_read(tmp_path):
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}, "train_batch_size": "auto"}))
    assert launch_settings({DEEPSPEED: "true", FILE: str(path)}) == Launch(shards=True, reshard=True, zero_stage=3)
    path.write_text(json.dumps({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}}))
    with refused("unsupported", "nvme", "none", "gradient_checkpointing"):
        launch_settings({DEEPSPEED: "true", FILE: str(path)})
    path.write_text("{")
    with pytest.raises(UserError, match=r"zero\.json"):
        launch_settings({DEEPSPEED: "true", FILE: str(path)})


@pytest.mark.parametrize("what", ["OPTIMIZER", "PARAM"])
def test_offloading_is_refused(what):
    with refused("unsupported", "DeepSpeed", "cpu"):
        launch_settings({DEEPSPEED: "true", f"ACCELERATE_DEEPSPEED_OFFLOAD_{what}_DEVICE": "cpu"})


def test_a_stage_that_does_not_exist_is_refused():
    with refused("out-of-range", "ZeRO", "'7'"):
        launch_settings({DEEPSPEED: "true", STAGE: "7"})


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_each_of_several_processes_has_a_gpu_of_its_own(name, monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert choose_device(name) == torch.device("cuda") and not taken
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert choose_device(name) == torch.device("cuda:1") == taken[0]
    assert choose_device("cpu") == torch.device("cpu")


def test_fsdp_is_asked_for_as_accelerate_says_it():
    fsdp = {"ACCELERATE_USE_FSDP": "true"}
    assert launch_settings({**fsdp, "FSDP_RESHARD_AFTER_FORWARD": "true"}) == Launch(shards=True, reshard=True)
    assert launch_settings({**fsdp, "FSDP_SHARDING_STRATEGY": "SHARD_GRAD_OP"}) == Launch(shards=True)
    assert launch_settings({**fsdp, "FSDP_RESHARD_AFTER_FORWARD": "NO_SHARD"}) == Launch()
    with refused("unsupported", "FSDP", "false"):
        launch_settings({**fsdp, "FSDP_OFFLOAD_PARAMS": "true"})


@pytest.mark.parametrize(
    ("version", "strategy", "reshard", "expected"),
    [
        ("1", "FULL_SHARD", "true", True),
        ("1", "SHARD_GRAD_OP", "true", False),
        ("1", "2", "true", False),
        ("1", "HYBRID_SHARD", "true", True),
        ("1", "HYBRID_SHARD_ZERO2", "true", False),
        ("1", "FULL_SHARD", "shard_grad_op", False),
        ("2", "FULL_SHARD", "true", True),
        ("2", "FULL_SHARD", "false", False),
    ],
)
def test_the_strategy_counts_in_fsdp1_and_the_boolean_in_fsdp2(version, strategy, reshard, expected):
    """`accelerate launch` sets all three, the last with FSDP2's default."""
    environment = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": version, "FSDP_SHARDING_STRATEGY": strategy}
    settings = launch_settings({**environment, "FSDP_RESHARD_AFTER_FORWARD": reshard})
    assert settings == Launch(shards=True, reshard=expected)


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "mixed precision, bf16, is not used: the recipe's precision is"),
        (
            {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
            "gradient accumulation, 4 steps, is not used: the recipe's gradient_accumulation_steps is",
        ),
        ({"ACCELERATE_GRADIENT_CLIPPING": "1.0"}, "gradient clipping is not used: the recipe's max_grad_norm is"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "torch.compile is not used"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_ACTIVATION_CHECKPOINTING": "true"},
            "activation checkpointing is not used: the recipe's gradient_checkpointing is",
        ),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_SHARDING_STRATEGY": "HYBRID_SHARD"},
            "hybrid sharding is not used: all processes share one copy",
        ),
    ],
)
def test_what_accelerate_asks_for_and_does_not_get_is_told(environment, says):
    plain = {
        "ACCELERATE_MIXED_PRECISION": "no",
        "ACCELERATE_DYNAMO_BACKEND": "no",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
        "ACCELERATE_GRADIENT_CLIPPING": "none",
        "FSDP_ACTIVATION_CHECKPOINTING": "false",
    }
    assert unused_settings({}) == unused_settings(plain) == []
    assert unused_settings({**plain, **environment}) == [says]


def test_settings_of_deepspeeds_file_that_are_not_used_are_told(tmp_path):
    path = tmp_path / "zero.json"
    path.write_text(
        json.dumps({"zero_optimization": {"stage": 3}, "train_batch_size": "auto", "fp16": {}, "optimizer": {}})
    )
    assert unused_settings({DEEPSPEED: "true", FILE: str(path)}) == [
        f"fp16, optimizer of {path}: not used, the recipe's settings are"
    ]
    assert unused_settings({DEEPSPEED: "false", FILE: str(path)}) == []
