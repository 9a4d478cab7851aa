"""The state of a run: one safetensors file, written atomically."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from controlkit.errors import UserError
from controlkit.files import write_atomically
from controlkit.training.sharding import copy_full, full_tensor, shard_like


@dataclass(frozen=True)
class RunState:
    """What a run resumes from: trained weights, optimiser and bookkeeping."""

    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    average: list[Tensor] | None
    fingerprint: str
    data: str
    frozen: str
    loss_monitor: dict[str, Any] | None = None
    """`LossMonitor.state`; None in states of earlier versions."""
    held_out: str = ""
    """Hash of the held-out data; empty in states of earlier versions."""
    batches: int | None = None
    """Batches of all steps done; None in states of earlier versions."""

    @property
    def learning_rate(self) -> float:
        """The learning rate of the last step done."""
        return float(self.optimizer["param_groups"][0]["lr"])


def save_state(
    path: Path | None,
    *,
    step: int,
    batches: int,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: list[Tensor] | None,
    fingerprint: str,
    data: str,
    held_out: str,
    frozen: str,
    loss_monitor: dict[str, Any],
) -> None:
    """Write the state atomically, so that a run killed during the write leaves the one before.

    Every process calls it, because weights may be sharded; one has a path.
    """
    parts: dict[str, Tensor] = {
        f"weights/{name}": value for name, value in module.named_parameters() if value.requires_grad
    }
    state = optimizer.state_dict()
    numbers: dict[str, float] = {}
    for index, entries in state["state"].items():
        for key, value in _entries(entries):
            if isinstance(value, Tensor):
                parts[f"optimizer/{index}/{key}"] = value
            else:
                numbers[f"{index}/{key}"] = value
    parts |= {f"average/{index:05d}": value for index, value in enumerate(average or [])}
    tensors: dict[str, Tensor] = {}
    stored: set[int] = set()
    for name, value in parts.items():
        tensor = full_tensor(value.detach())
        if path is not None:
            tensor = tensor.cpu()  # one by one, because the device may not have room for all full tensors
            # 8-bit optimisers share one table between parameters; safetensors does not store shared tensors.
            tensors[name] = tensor.clone() if tensor.data_ptr() in stored else tensor.contiguous()
            stored.add(tensor.data_ptr())
    if path is None:
        return
    metadata = {
        "step": str(step),
        "batches": str(batches),
        "fingerprint": fingerprint,
        "data": data,
        "held_out": held_out,
        "frozen": frozen,
        "groups": json.dumps(state["param_groups"]),
        "watch": json.dumps(loss_monitor),
        **({"numbers": json.dumps(numbers)} if numbers else {}),
    }
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))


def _entries(state: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Optimiser state of one parameter, flat; bitsandbytes nests a part of it, and reads either."""
    for key, value in state.items():
        if isinstance(value, dict):
            yield from _entries(value)
        else:
            yield key, value


def previous_state(path: Path) -> Path:
    """Path of the state before the one at `path`."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def keep_previous(path: Path) -> None:
    """Call before `save_state`: keeps the state at `path` as the previous one, under both names until then."""
    if not path.exists():
        return
    aside = path.with_name(f".{path.name}.previous{path.suffix}")
    aside.unlink(missing_ok=True)
    try:
        os.link(path, aside)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, aside)
    os.replace(aside, previous_state(path))


def replace_truncated(path: Path) -> None:
    """Restore the previous state if the one at `path` is truncated, with a message on standard error.

    The truncated file is renamed. Otherwise, the next save would keep it as the previous state, and no complete one
    would be left.
    """
    previous = previous_state(path)
    if not path.exists() or _is_complete(path) or not (previous.exists() and _is_complete(previous)):
        return
    damaged = path.with_name(f"{path.stem}.damaged{path.suffix}")
    path.replace(damaged)
    previous.replace(path)
    print(
        f"{path} is truncated; it is kept as {damaged.name}\n"
        f"Resuming from the state before it, of step {step_of(path)}",
        file=sys.stderr,
        flush=True,
    )


def _is_complete(path: Path) -> bool:
    """Whether a state's header is valid and matches the size of the file."""
    try:
        step_of(path)
    except (SafetensorError, KeyError, ValueError, OSError):
        return False
    return True


def load_latest(path: Path) -> RunState | None:
    """The state at `path`, or None; if it is damaged, the previous one, with a message on standard error.

    Raises:
        UserError: the state is damaged, and the previous one is, too, or missing.
    """
    if not path.exists():
        return None
    try:
        return load_state(path)
    except UserError as error:
        try:
            state = load_state(previous_state(path))
        except UserError:
            raise error from None
        print(f"{error}\nResuming from the state before it, of step {state.step}", file=sys.stderr, flush=True)
        return state


def step_of(path: Path) -> int:
    """Steps done when the state at `path` was saved."""
    with safe_open(path, framework="pt") as file:
        return int((file.metadata() or {})["step"])


def fingerprint_of(path: Path) -> str:
    """The fingerprint of the run of the state at `path`."""
    with safe_open(path, framework="pt") as file:
        return (file.metadata() or {})["fingerprint"]


def load_state(path: Path) -> RunState:
    """Read a state from `save_state`.

    Raises:
        UserError: the file is damaged or not a state.
    """
    weights: dict[str, Tensor] = {}
    entries: dict[int, dict[str, Any]] = {}
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
        for name, value in json.loads(metadata.get("numbers", "{}")).items():
            index, _, key = name.partition("/")
            entries.setdefault(int(index), {})[key] = value
        return RunState(
            step=int(metadata["step"]),
            weights=weights,
            optimizer={"state": entries, "param_groups": json.loads(metadata["groups"])},
            average=average or None,
            fingerprint=metadata["fingerprint"],
            data=metadata.get("data", ""),
            held_out=metadata.get("held_out", ""),
            frozen=metadata.get("frozen", ""),
            loss_monitor=json.loads(metadata.get("watch", "null")),
            batches=int(metadata["batches"]) if "batches" in metadata else None,
        )
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise UserError(
            f"{path} is not a complete training state ({error}); delete it to start this run from the beginning",
            "damaged-file",
        ) from error


def restore(state: RunState, path: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load `state` into the trained parameters and the optimiser.

    Raises:
        UserError: the state is of another network.
    """
    parameters = {name: value for name, value in module.named_parameters() if value.requires_grad}
    wrong = sorted(set(parameters) ^ set(state.weights)) or [
        name for name, value in parameters.items() if value.shape != state.weights[name].shape
    ]
    if wrong:
        raise UserError(
            f"{path} is the state of another network (first difference: {wrong[0]}); set another out", "resume-mismatch"
        )
    with torch.no_grad():
        for name, value in parameters.items():
            copy_full(value, state.weights[name])
    # The optimiser numbers its state in the order of its parameters.
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries = {
        index: {
            key: shard_like(value, trained[index]) if getattr(value, "ndim", 0) else value
            for key, value in parameter.items()
        }
        for index, parameter in state.optimizer["state"].items()
    }
    optimizer.load_state_dict({**state.optimizer, "state": entries})
