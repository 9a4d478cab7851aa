"""The folder of a run: whose it is, and whether this run may go on in it; settled before anything is loaded."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from safetensors import SafetensorError

from controlkit.errors import UserError
from controlkit.files import held, read_json, remove_leftovers, sha256_of, writable_folder
from controlkit.training.processes import Processes
from controlkit.training.recipe import FORMER, Recipe, identifying
from controlkit.training.state import fingerprint_of, replace_truncated, step_of

# What may differ between a run and its continuation.
_MAY_CHANGE = {
    "out",
    "steps",
    "learning_rate",
    "min_lr_rate",
    "device",
    "gradient_checkpointing",
    "log_every",
    "save_every",
    "preview_every",
}

_SCHEDULE = ("steps", "learning_rate", "min_lr_rate", "warmup_steps")

_LOCK = ".lock"


@contextmanager
def run_folder(recipe: Recipe) -> Iterator[None]:
    """A block in which the folder of `recipe` is this run's; what forbids that is said before anything is loaded.

    Raises:
        UserError: the folder cannot be written, another run holds it, it holds a run of another recipe or one with more
            steps behind it, or a file that this run will write is there already.
    """
    existed = Path(recipe.out).exists()
    folder = writable_folder(recipe.out, "give this run another out")
    refusal = f"another run is writing into {folder}; wait for it, or give this run another out"
    with held(folder / _LOCK, refusal) if Processes.is_first() else nullcontext():
        if Processes.is_first():
            path = folder / "state.safetensors"
            remove_leftovers(path)
            replace_truncated(path)
            if path.exists():
                with suppress(SafetensorError, KeyError, ValueError, OSError):  # damaged: said when it is read
                    check_same_run(recipe, path, fingerprint_of(path), step_of(path))
            else:
                _refuse_overwriting(recipe, folder)
        try:
            yield
        except BaseException:
            nothing_came_of_it = not existed and {path.name for path in folder.iterdir()} <= {_LOCK}
            if nothing_came_of_it and Processes.is_first():
                (folder / _LOCK).unlink(missing_ok=True)
                with suppress(OSError):
                    folder.rmdir()
            raise


def fingerprint(recipe: Recipe) -> str:
    """Hash of the settings that a continuation must share with the run that it continues.

    Settings that are None do not count, so that runs go on when a later version has new optional ones.
    """
    settings = identifying(recipe).items()
    fixed = {key: value for key, value in settings if key not in _MAY_CHANGE and value is not None}
    return sha256_of(recipe.system, repr(sorted(fixed.items())))


def check_same_run(recipe: Recipe, path: Path, theirs: str, done: int) -> None:
    """Refuse to go on from the state at `path` where that would not be the same run."""
    if theirs != fingerprint(recipe):
        different = "; ".join(_differences(recipe, path.parent / "recipe.json"))
        raise UserError(
            f"{path.parent} holds a run of another recipe ({different or 'its settings are in recipe.json'});"
            " give this run another out"
        )
    if done > recipe.steps:
        raise UserError(
            f"the run in {path.parent} has done {done} steps, and steps is {recipe.steps}; give it {done} or more, or"
            " another out"
        )


def schedule_changes(recipe: Recipe) -> str:
    """`setting: there, now` of what the learning rate follows from and differs from the run that is in its folder."""
    path = Path(recipe.out) / "recipe.json"
    return "; ".join(_differences(recipe, path, lambda name: name in _SCHEDULE))


def _differences(
    recipe: Recipe, path: Path, counts: Callable[[str], bool] = lambda name: name not in _MAY_CHANGE
) -> list[str]:
    """`setting: there, now` of all that differ and count; by default those that a continuation must share."""
    try:
        before = read_json(path)
        mine = json.loads(json.dumps(dataclasses.asdict(recipe)))
        pairs = [
            (name, *(FORMER.get(name) if v is None else v for v in (before[name], value)))
            for name, value in mine.items()
            if counts(name) and name in before
        ]
        return [f"{name}: {there!r} there, {now!r} now" for name, there, now in pairs if there != now]
    except (UserError, TypeError):
        return []


def _refuse_overwriting(recipe: Recipe, folder: Path) -> None:
    """Refuse to begin a run that would end with writing over a file that it did not make."""
    for name in recipe.results:
        if (folder / name).exists():
            another = "another name or another out" if hasattr(recipe, "name") else "another out"
            raise UserError(
                f"{folder / name} is there already, and no state of a run that made it; give this run {another}"
            )
