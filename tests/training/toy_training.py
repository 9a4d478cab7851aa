"""An objective that trains in microseconds, and a program that trains it, to be killed by the tests.

    python toy_training.py FOLDER STEPS [alone|killed|whole]

`alone` makes two runs, for one kill to end both: FOLDER/slow waits in its eighth step, meanwhile FOLDER/half has
stopped half-way through writing its second state. Both say so on standard output and then wait to be killed. `killed`
is for several processes: the second kills itself in the eighth step.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from controlkit.training.objective import Objective, torch_generator
from controlkit.training.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class ToyRecipe(Recipe):
    system: ClassVar[str] = "toy"
    width: int = 8


class Toy(Objective):
    """A small network that learns a linear map; `at` maps steps to what happens in them."""

    def __init__(self, recipe: ToyRecipe, at: dict[int, Callable[[torch.Tensor], torch.Tensor]] | None = None):
        self.recipe = recipe
        self.at = at or {}
        self.steps_seen: list[int] = []
        self.previews: list[int] = []
        torch.manual_seed(recipe.seed)
        self.network = nn.Sequential(nn.Linear(4, recipe.width), nn.Tanh(), nn.Linear(recipe.width, 2))
        self.trained = nn.ModuleDict({"network": self.network})

    def loss(self, step):
        self.steps_seen.append(step)
        x = torch.randn(16, 4, generator=torch_generator(self.recipe.seed, step))
        loss = (self.network(x) - x[:, :2] * 3).pow(2).mean()
        return self.at.get(step, lambda value: value)(loss)

    def samples(self, step):
        return [f"numbers of step {step}"]

    def preview(self, step, folder):
        self.previews.append(step)
        (folder / f"{step}.txt").write_text("seen")
        return {"score": float(step)}

    def save(self, folder, step):
        path = folder / "weights.pt"
        torch.save(self.network.state_dict(), path)
        return [path]

    def weights(self):
        return {name: value.clone() for name, value in self.network.state_dict().items()}


def toy_recipe(out: Path, steps: int = 6, **changes) -> ToyRecipe:
    settings = {"learning_rate": 0.05, "warmup_steps": 2, "log_every": 1, "save_every": 3, "preview_every": 3}
    return ToyRecipe(out=str(out), steps=steps, **{**settings, **changes})


def wait_to_be_killed(word: str) -> None:
    print(word, flush=True)
    time.sleep(120)


def stop_half_way() -> None:
    """From here on, the second state that is written ends half-way."""
    from controlkit.training import state

    whole, written = state.save_file, []

    def half(tensors, path, metadata):
        whole(tensors, path, metadata)
        written.append(path)
        if len(written) == 2:
            data = Path(path).read_bytes()
            Path(path).write_bytes(data[: len(data) // 2])
            wait_to_be_killed("half")

    state.save_file = half


def main(folder: str, steps: str, how: str) -> None:
    from controlkit.training.trainer import train

    def run(name: str, at: dict[int, Callable[[torch.Tensor], torch.Tensor]]) -> None:
        recipe = toy_recipe(Path(folder) / name, int(steps), ema=0.9)
        train(Toy(recipe, at), recipe)

    def begin_another(_loss: torch.Tensor) -> torch.Tensor:
        print("slow", flush=True)
        stop_half_way()
        run("half", {})
        raise AssertionError("nobody killed it")

    if how == "alone":
        run("slow", {7: begin_another})
    elif how == "killed" and os.environ["RANK"] == "1":
        run("", {7: lambda loss: os.kill(os.getpid(), signal.SIGKILL)})
    else:
        run("", {})


if __name__ == "__main__":
    main(*sys.argv[1:])
