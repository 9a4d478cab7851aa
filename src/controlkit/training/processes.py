"""Distributed training under `accelerate launch` or `torchrun`; otherwise a single process."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from controlkit.errors import UserError
from controlkit.training.launch import launch_settings, unused_settings
from controlkit.training.objective import Objective


class Processes:
    """Collective operations of the training loop; with one process, all are no-ops.

    Every process computes gradients on its slice of the global batch; they are averaged. With DDP every process has all
    weights; with FSDP (accelerate's `--use_fsdp`, or its DeepSpeed settings: `launch.py`) weights, their averages and
    the optimiser are sharded, and weights are gathered for a step only. The first process alone writes files.
    """

    def __init__(self, device: torch.device) -> None:
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self._on_cpu = device.type == "cpu"
        self._launch = launch_settings()
        self.index = self._accelerator.process_index if self.count > 1 else 0

    @staticmethod
    def is_first() -> bool:
        """Whether this process is the first; works before the process group is initialised."""
        return int(os.environ.get("RANK", "0")) == 0

    @property
    def first(self) -> bool:
        """Whether this process writes files and prints."""
        return self.index == 0

    @property
    def sharded(self) -> bool:
        """Whether the trained weights are sharded, so that saving a state takes all processes."""
        return self.count > 1 and self._launch.shards

    def wrap(self, objective: Objective) -> nn.Module:
        """A module from `step` to the loss, whose backward pass averages gradients over all processes."""
        objective.process, objective.processes = self.index, self.count
        step = _Step(objective)
        if self.count == 1:
            return step
        return self._fully_shard(step) if self.sharded else self._accelerator.prepare(step)

    def _fully_shard(self, step: _Step) -> nn.Module:
        """FSDP: shard weights, gradients and optimiser state; weights are gathered during a step."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        device = self._accelerator.device
        step.to(device)
        mesh = init_device_mesh(device.type, (self.count,))
        fully_shard(step, mesh=mesh, reshard_after_forward=self._launch.reshard)  # in place
        return step

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over all processes."""
        return self._reduce(value, "mean")

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        return self._reduce(value, "sum")

    def _reduce(self, value: Tensor, reduction: str) -> Tensor:
        value = value.detach().float()
        return value if self.count == 1 else self._accelerator.reduce(value, reduction=reduction)

    @property
    def any_is_cheap(self) -> bool:
        """Whether `any` waits for no GPU."""
        return self.count == 1 or self._on_cpu

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        if self.count == 1:
            return flag
        total = torch.tensor(float(flag), device=self._accelerator.device)
        return self._accelerator.reduce(total, reduction="sum").item() > 0

    def is_peer_failure(self, error: RuntimeError) -> bool:
        """Whether an error means that another process has ended or timed out."""
        if self.count == 1:
            return False
        # gloo raises a plain RuntimeError, which only its message identifies.
        message = str(error).lower()
        return isinstance(error, torch.distributed.DistError) or "gloo" in message or "by peer" in message

    def wait(self) -> None:
        """Wait for all processes."""
        if self.count > 1:
            self._accelerator.wait_for_everyone()

    @cached_property
    def _accelerator(self):  # type: ignore[no-untyped-def]  # noqa: ANN202
        from accelerate import Accelerator, DistributedDataParallelKwargs
        from accelerate.utils import DistributedType

        if self._launch.zero_stage is not None:
            # With this variable, accelerate would start DeepSpeed's engine.
            os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
            if self.is_first():
                engine = "FSDP, which shards the same" if self._launch.shards else "DDP"
                print(f"DeepSpeed's ZeRO stage {self._launch.zero_stage} runs as torch's {engine}", file=sys.stderr)
        if not self._launch.shards:
            os.environ.pop("ACCELERATE_USE_FSDP", None)  # FSDP without sharding is DDP
        # A step of base training uses the LoRA of one condition; the others get no gradient.
        unused = DistributedDataParallelKwargs(find_unused_parameters=True)
        if self.is_first():
            for note in unused_settings():
                print(f"accelerate's {note}", file=sys.stderr)
        accelerator = Accelerator(cpu=self._on_cpu, mixed_precision="no", kwargs_handlers=[unused])
        kind = accelerator.distributed_type
        if kind == DistributedType.MEGATRON_LM:
            raise UserError(
                f"accelerate is configured for {kind.value}; controlkit supports DDP, FSDP and DeepSpeed's ZeRO: run"
                " `accelerate config` again, or `accelerate launch --multi_gpu` or `--use_fsdp`",
                "unsupported",
            )
        return accelerator


def print_notes(notes: Sequence[str]) -> None:
    """Print notes on standard error, in the first process only."""
    if Processes.is_first():
        for note in notes:
            print(f"note: {note}", file=sys.stderr, flush=True)


class _Step(nn.Module):
    """The objective's loss as a module, which DDP needs."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.trained = objective.trained
        self._objective = objective

    def forward(self, step: int) -> Tensor:
        return self._objective.loss(step)
