"""The one training loop."""

from __future__ import annotations

import dataclasses
import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
from diffusers.training_utils import EMAModel

from controlkit.errors import UserError
from controlkit.files import remove_leftovers, sha256_of, writable_folder, write_json
from controlkit.training.log import RunLog
from controlkit.training.objective import Objective
from controlkit.training.recipe import Recipe
from controlkit.training.state import load_state, restore, save_state

# What may differ between a run and its continuation.
_MAY_CHANGE = {
    "out",
    "steps",
    "learning_rate",
    "final_rate",
    "device",
    "log_every",
    "save_every",
    "preview_every",
}


def train(objective: Objective, recipe: Recipe) -> dict[str, float]:
    """Train `objective` by `recipe`; a run that was interrupted, or has fewer steps, goes on where it was.

    Every step draws its data and noise from (seed, step), so an interrupted run ends with the weights of one that
    was not. Ctrl-C saves the state and ends.

    Returns:
        The last preview's scores and the last loss.

    Raises:
        UserError: the folder holds a run of another recipe, or the loss is not finite (the last good state stays).
    """
    folder = writable_folder(recipe.out)
    parameters = objective.parameters()
    optimizer = torch.optim.AdamW(
        parameters,
        lr=recipe.learning_rate,
        betas=(0.9, recipe.beta2),
        weight_decay=recipe.weight_decay,
        fused=True,
    )
    average = EMAModel(parameters, decay=recipe.ema, use_ema_warmup=True, power=0.75) if recipe.ema else None
    path = folder / "state.safetensors"
    remove_leftovers(path)
    first = _resume(path, recipe, objective, optimizer, average)
    write_json(folder / "recipe.json", {"system": recipe.system, **dataclasses.asdict(recipe)})

    log = RunLog(folder, first, recipe.steps)
    scores: dict[str, float] = {}

    def save(step: int) -> None:
        save_state(
            path,
            step=step,
            module=objective.trained,
            optimizer=optimizer,
            average=[] if average is None else [*average.shadow_params, torch.tensor(average.optimization_step)],
            fingerprint=fingerprint(recipe),
        )

    with _interruptible() as interrupted:
        for step in range(first, recipe.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(recipe, step)
            with torch.autocast(_device_type(parameters), torch.bfloat16, enabled=recipe.precision == "bf16"):
                loss = objective.loss(step)
            value = loss.item()
            if not math.isfinite(value):
                log.close()
                raise _diverged(f"the loss is {value}", step + 1, path)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, recipe.clip).item()
            if not math.isfinite(norm):
                log.close()
                raise _diverged(f"the gradient's norm is {norm}", step + 1, path)
            optimizer.step()
            if average is not None:
                average.step(parameters)

            done, last = step + 1, step + 1 == recipe.steps
            log.estimate(done)
            previewed = done % recipe.preview_every == 0 or last
            if previewed:
                with averaged(average, parameters):
                    scores = objective.preview(done, writable_folder(folder / "previews"))
            if done % recipe.log_every == 0 or previewed:
                now = {"loss": value, **(scores if previewed else {})}
                log.write(done, {**now, "learning_rate": learning_rate_at(recipe, step)})
                log.say(done, {"loss": value, **scores})
            stop = interrupted()
            if done % recipe.save_every == 0 or last or stop:
                save(done)
            if stop:
                log.close()
                raise UserError(f"interrupted after step {done}; run the same command again to go on")
    log.close()
    with averaged(average, parameters):
        if first >= recipe.steps:
            scores = objective.preview(recipe.steps, writable_folder(folder / "previews"))
        objective.save(folder)
    return scores


def learning_rate_at(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then a cosine from the peak to `final_rate` of it at the last step."""
    progress = step / recipe.steps
    shape = recipe.final_rate + (1 - recipe.final_rate) * 0.5 * (1 + math.cos(math.pi * progress))
    return recipe.learning_rate * min(1.0, (step + 1) / max(1, recipe.warmup_steps)) * shape


def fingerprint(recipe: Recipe) -> str:
    """Hash of the settings that a continuation must share with the run that it continues."""
    fixed = {key: value for key, value in dataclasses.asdict(recipe).items() if key not in _MAY_CHANGE}
    return sha256_of(recipe.system, repr(sorted(fixed.items())))


@contextmanager
def averaged(average: EMAModel | None, parameters: list[torch.nn.Parameter]) -> Iterator[None]:
    """Run a block with the averaged weights in place."""
    if average is None:
        yield
        return
    average.store(parameters)
    average.copy_to(parameters)
    try:
        yield
    finally:
        average.restore(parameters)


def _resume(
    path: Path,
    recipe: Recipe,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    average: EMAModel | None,
) -> int:
    if not path.exists():
        return 0
    state = load_state(path)
    if state.fingerprint != fingerprint(recipe):
        raise UserError(
            f"{path.parent} holds a run of another recipe (its settings are in {path.parent / 'recipe.json'});"
            " give this run another out"
        )
    restore(state, path, objective.trained, optimizer)
    if average is not None and state.average:
        *shadow, count = state.average
        for mine, theirs in zip(average.shadow_params, shadow, strict=True):
            mine.copy_(theirs)
        average.optimization_step = int(count)
    return state.step


def _diverged(what: str, step: int, path: Path) -> UserError:
    kept = f"the last good state is kept in {path}" if path.exists() else "no state had been saved yet"
    return UserError(f"{what} at step {step}; {kept}. Lower learning_rate, or look at the data of this step")


def _device_type(parameters: list[torch.nn.Parameter]) -> str:
    return parameters[0].device.type


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into a wish that the loop sees after its step; the second ends at once."""
    wished = False

    def wish(_signal: int, _frame: FrameType | None) -> None:
        nonlocal wished
        if wished:
            raise KeyboardInterrupt
        wished = True

    try:
        before = signal.signal(signal.SIGINT, wish)
    except ValueError:  # not the main thread: whoever started us handles signals
        yield lambda: False
        return
    try:
        yield lambda: wished
    finally:
        signal.signal(signal.SIGINT, before)
