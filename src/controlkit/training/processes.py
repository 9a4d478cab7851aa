"""The processes that train together: one, unless `accelerate launch` or `torchrun` started more."""

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
    """What the training loop needs to know of the other processes; with one process, everything is a no-op.

    Every process takes its share of a step's batch and computes its own gradient; the gradients are averaged. With DDP
    all hold the same weights; with FSDP (accelerate's `--use_fsdp`, or its settings for DeepSpeed: `launch.py`) each
    holds a part of weights, averages and optimiser, and they are whole only while a step needs them. Only the first
    writes.
    """

    def __init__(self, device: torch.device) -> None:
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self._on_cpu = device.type == "cpu"
        self._launch = launch_settings()
        self.index = self._accelerator.process_index if self.count > 1 else 0

    @staticmethod
    def is_first() -> bool:
        """Whether this process is the first, before any of them has spoken to the others."""
        return int(os.environ.get("RANK", "0")) == 0

    @property
    def first(self) -> bool:
        """Whether this one writes files and speaks."""
        return self.index == 0

    @property
    def shard(self) -> bool:
        """Whether each holds a part of what is trained only, so that a state takes all of them."""
        return self.count > 1 and self._launch.shards

    def wrap(self, objective: Objective) -> nn.Module:
        """The objective's loss as a module of `step`, whose backward pass averages gradients over all processes."""
        objective.process, objective.processes = self.index, self.count
        step = _Step(objective)
        if self.count == 1:
            return step
        return self._sharded(step) if self.shard else self._accelerator.prepare(step)

    def _sharded(self, step: _Step) -> nn.Module:
        """FSDP: weights, gradients and the optimiser's state split over processes; weights whole during a step."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        device = self._accelerator.device
        step.to(device)
        mesh = init_device_mesh(device.type, (self.count,))
        fully_shard(step, mesh=mesh, reshard_after_forward=self._launch.reshard)  # changes it in place
        return step

    def mean(self, value: Tensor) -> float:
        """The mean of a number over all processes."""
        value = value.detach().float()
        if self.count > 1:
            value = self._accelerator.reduce(value, reduction="mean")
        return value.item()

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all processes, on the CPU."""
        value = value.detach().float()
        if self.count > 1:
            value = self._accelerator.reduce(value, reduction="sum")
        return value.cpu()

    def any(self, wish: bool) -> bool:
        """Whether any process wishes it."""
        if self.count == 1:
            return wish
        wished = torch.tensor(float(wish), device=self._accelerator.device)
        return self._accelerator.reduce(wished, reduction="sum").item() > 0

    def is_peer_failure(self, error: RuntimeError) -> bool:
        """Whether an error means that another process is gone, or has not answered for too long."""
        if self.count == 1:
            return False
        # gloo raises a plain RuntimeError, whose words are all that tells it from others.
        words = str(error).lower()
        return isinstance(error, torch.distributed.DistError) or "gloo" in words or "by peer" in words

    def wait(self) -> None:
        """Go on when all processes have come here."""
        if self.count > 1:
            self._accelerator.wait_for_everyone()

    @cached_property
    def _accelerator(self):  # type: ignore[no-untyped-def]  # noqa: ANN202
        from accelerate import Accelerator, DistributedDataParallelKwargs
        from accelerate.utils import DistributedType

        if self._launch.zero_stage is not None:
            # accelerate would start DeepSpeed's engine for it.
            os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
            if self.is_first():
                how = "FSDP, which splits the same" if self._launch.shards else "DDP"
                print(f"DeepSpeed's ZeRO stage {self._launch.zero_stage} runs as torch's {how}", file=sys.stderr)
        if not self._launch.shards:
            os.environ.pop("ACCELERATE_USE_FSDP", None)  # FSDP that shards nothing is DDP
        # A step of base training uses the LoRA of one condition; those of the others get no gradient.
        unused = DistributedDataParallelKwargs(find_unused_parameters=True)
        if self.is_first():
            for told in unused_settings():
                print(f"accelerate's {told}", file=sys.stderr)
        accelerator = Accelerator(cpu=self._on_cpu, mixed_precision="no", kwargs_handlers=[unused])
        kind = accelerator.distributed_type
        if kind == DistributedType.MEGATRON_LM:
            raise UserError(
                f"accelerate is configured for {kind.value}; controlkit trains in several processes with DDP, FSDP or"
                " what DeepSpeed calls ZeRO: run `accelerate config` again, or give `accelerate launch --multi_gpu` or"
                " `--use_fsdp`"
            )
        return accelerator


def print_notes(notes: Sequence[str]) -> None:
    """Notes on standard error, by the first process."""
    if Processes.is_first():
        for note in notes:
            print(f"note: {note}", file=sys.stderr, flush=True)


class _Step(nn.Module):
    """DDP wraps modules: this one's forward pass is the objective's loss."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.trained = objective.trained
        self._objective = objective

    def forward(self, step: int) -> Tensor:
        return self._objective.loss(step)
