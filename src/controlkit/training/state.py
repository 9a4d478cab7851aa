"""The state of a run: one safetensors file, whole or absent."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from controlkit.errors import UserError
from controlkit.files import write_atomically


@dataclass(frozen=True)
class RunState:
    """What a run needs to go on: only what is trained, and the optimiser."""

    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    average: list[Tensor] | None
    fingerprint: str


def save_state(
    path: Path,
    *,
    step: int,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: list[Tensor] | None,
    fingerprint: str,
) -> None:
    """Write the state atomically: a run killed during the write leaves the one before."""
    tensors = {
        f"weights/{name}": parameter.detach().contiguous()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }
    state = optimizer.state_dict()
    for index, entries in state["state"].items():
        for key, value in entries.items():
            tensors[f"optimizer/{index}/{key}"] = value.detach().contiguous()
    for index, value in enumerate(average or []):
        tensors[f"average/{index:05d}"] = value.detach().contiguous()
    metadata = {
        "step": str(step),
        "fingerprint": fingerprint,
        "groups": json.dumps(state["param_groups"]),
    }
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))


def load_state(path: Path) -> RunState:
    """Read what `save_state` wrote.

    Raises:
        UserError: the file is damaged or not a state.
    """
    weights: dict[str, Tensor] = {}
    entries: dict[int, dict[str, Tensor]] = {}
    average: list[Tensor] = []
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            for name in sorted(file.keys()):
                kind, _, rest = name.partition("/")
                if kind == "weights":
                    weights[rest] = file.get_tensor(name)
                elif kind == "average":
                    average.append(file.get_tensor(name))
                else:
                    index, _, key = rest.partition("/")
                    entries.setdefault(int(index), {})[key] = file.get_tensor(name)
        return RunState(
            step=int(metadata["step"]),
            weights=weights,
            optimizer={"state": entries, "param_groups": json.loads(metadata["groups"])},
            average=average or None,
            fingerprint=metadata["fingerprint"],
        )
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise UserError(
            f"{path} is not a whole training state ({error}); delete it to start this run from the beginning"
        ) from error


def restore(state: RunState, path: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Lay `state` over the trained parameters and the optimiser.

    Raises:
        UserError: the state is of another network.
    """
    parameters = {name: value for name, value in module.named_parameters() if value.requires_grad}
    wrong = sorted(set(parameters) ^ set(state.weights)) or [
        name for name, value in parameters.items() if value.shape != state.weights[name].shape
    ]
    if wrong:
        raise UserError(
            f"{path} is the state of another network (first difference: {wrong[0]}); give the run another --set out=..."
        )
    with torch.no_grad():
        for name, value in parameters.items():
            value.copy_(state.weights[name])
    optimizer.load_state_dict(state.optimizer)
