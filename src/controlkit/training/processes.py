"""The processes that train together: one, unless `accelerate launch` or `torchrun` started more."""

from __future__ import annotations

import os
from functools import cached_property

import torch
from torch import Tensor, nn

from controlkit.training.objective import Objective


class Processes:
    """What the training loop needs to know of the other processes; with one process, everything is a no-op.

    Every process takes its share of a step's batch and computes its own gradient; the gradients are averaged, so that
    all of them hold the same weights. Only the first writes.
    """

    def __init__(self, device: torch.device) -> None:
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self._on_cpu = device.type == "cpu"
        self.index = self._accelerator.process_index if self.count > 1 else 0

    @staticmethod
    def is_first() -> bool:
        """Whether this process is the first, before any of them has spoken to the others."""
        return int(os.environ.get("RANK", "0")) == 0

    @property
    def first(self) -> bool:
        """Whether this one writes files and speaks."""
        return self.index == 0

    def wrap(self, objective: Objective) -> nn.Module:
        """The objective's loss as a module of `step`, whose backward pass averages gradients over all processes."""
        objective.process, objective.processes = self.index, self.count
        step = _Step(objective)
        return self._accelerator.prepare(step) if self.count > 1 else step

    def mean(self, value: Tensor) -> float:
        """The mean of a number over all processes."""
        value = value.detach().float()
        if self.count > 1:
            value = self._accelerator.reduce(value, reduction="mean")
        return value.item()

    def any(self, wish: bool) -> bool:
        """Whether any process wishes it."""
        if self.count == 1:
            return wish
        wished = torch.tensor(float(wish), device=self._accelerator.device)
        return self._accelerator.reduce(wished, reduction="sum").item() > 0

    def wait(self) -> None:
        """Go on when all processes have come here."""
        if self.count > 1:
            self._accelerator.wait_for_everyone()

    @cached_property
    def _accelerator(self):  # type: ignore[no-untyped-def]  # noqa: ANN202
        from accelerate import Accelerator, DistributedDataParallelKwargs

        # A step of base training uses the LoRA of one condition; those of the others get no gradient.
        unused = DistributedDataParallelKwargs(find_unused_parameters=True)
        return Accelerator(cpu=self._on_cpu, kwargs_handlers=[unused])


class _Step(nn.Module):
    """DDP wraps modules: this one's forward pass is the objective's loss."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.trained = objective.trained
        self._objective = objective

    def forward(self, step: int) -> Tensor:
        return self._objective.loss(step)
