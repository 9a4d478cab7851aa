"""The folder of a run: locking, and checks that this run may start or resume there, before anything is loaded."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from controlkit.errors import UserError
from controlkit.files import locked, read_json, remove_leftovers, sha256_of, writable_folder, write_json
from controlkit.training.processes import Processes
from controlkit.training.recipe import CHANGEABLE, FORMER, Recipe, identifying_settings
from controlkit.training.schedule import default_warm_up
from controlkit.training.state import fingerprint_of, replace_truncated, step_of

# Settings that may change when a run is resumed.
_MAY_CHANGE = {
    "out",
    "steps",
    "learning_rate",
    "min_lr_rate",
    "device",
    "gradient_checkpointing",
    "data_workers",
    "graphs",
    "log_every",
    "save_every",
    "preview_every",
    "patience",
    "change_on_resume",
}

_WARM_UP = "warmup_steps"
_SCHEDULE = ("steps", "learning_rate", "min_lr_rate", _WARM_UP)

_LOCK = ".lock"
_RECIPE = "recipe.json"
_PREVIOUS_RECIPE = "recipe.previous.json"
"""The recipe before `change_on_resume`: that of the previous state, until a second new state is saved."""


@contextmanager
def run_folder(recipe: Recipe) -> Iterator[None]:
    """Lock the folder of `recipe` for this run within a block.

    Raises:
        UserError: the folder is not writable, another run is using it, it has a run of another recipe or of more steps,
            or a file that this run will write exists already.
    """
    existed = Path(recipe.out).exists()
    folder = writable_folder(recipe.out, "set another out")
    refusal = f"another run is writing into {folder}; wait for it, or set another out"
    with locked(folder / _LOCK, refusal) if Processes.is_first() else nullcontext():
        if Processes.is_first():
            path = folder / "state.safetensors"
            remove_leftovers(path)
            replace_truncated(path)
            if path.exists():
                with suppress(SafetensorError, KeyError, ValueError, OSError):  # damaged: an error when it is read
                    check_same_run(recipe, path, fingerprint_of(path), step_of(path))
            else:
                _check_results(recipe, folder)
        try:
            yield
        except BaseException:
            is_empty = not existed and {path.name for path in folder.iterdir()} <= {_LOCK}
            if is_empty and Processes.is_first():
                (folder / _LOCK).unlink(missing_ok=True)
                with suppress(OSError):
                    folder.rmdir()
            raise


def fingerprint(recipe: Recipe) -> str:
    """Hash of the settings that must be the same when a run is resumed.

    Settings that are None do not count, so that later versions can add optional ones.
    """
    return sha256_of(recipe.system, repr(sorted(_fixed(dataclasses.asdict(recipe)).items())))


def _fixed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a recipe's settings that must be the same when a run is resumed."""
    known = identifying_settings(settings).items()
    return {name: value for name, value in known if name not in _MAY_CHANGE and value is not None}


def check_same_run(recipe: Recipe, path: Path, saved: str, done: int) -> None:
    """Check that the state at `path`, with the fingerprint `saved` and `done` steps, is of this run.

    Raises:
        UserError: it is of another recipe, or has more steps.
    """
    records = [path.parent / name for name in (_RECIPE, _PREVIOUS_RECIPE)]
    same = [recipe, *(_before_change(recipe, record) for record in records)]
    is_same = saved in {fingerprint(each) for known in same for each in _spellings(known)}
    # In fingerprints, no warm-up steps are those of earlier versions.
    if not is_same or _WARM_UP in _changed(recipe, records[0]):
        changed = next(filter(None, (_changed(recipe, record) for record in records)), {})
        different = "; ".join(changed.values()) or "see its recipe.json"
        resume = ""
        if changed and set(changed) <= set(CHANGEABLE):
            resume = f", or resume with the new values: change_on_resume=[{','.join(changed)}]"
        raise UserError(
            f"{path.parent} has a run of another recipe ({different}); set another out{resume}", "resume-mismatch"
        )
    if done > recipe.steps:
        raise UserError(
            f"the run in {path.parent} has done {done} steps, and steps is {recipe.steps}; set {done} or more, or"
            " another out",
            "resume-mismatch",
        )


def _spellings(recipe: Recipe) -> list[Recipe]:
    """The recipe, and those that say the same in other words: one batch per step and the default warm-up, or None."""
    words = {"gradient_accumulation_steps": 1, _WARM_UP: default_warm_up(recipe.steps)}
    spellings = [recipe]
    for name, number in words.items():
        other: dict[Any, Any] = {None: number, number: None}
        spellings += [
            dataclasses.replace(each, **{name: other[value]})
            for each in spellings
            if (value := getattr(each, name)) in other
        ]
    return spellings


def record_recipe(recipe: Recipe) -> None:
    """Write the recipe of a run into its folder; if `change_on_resume` changed it, keep the former one, too."""
    path = Path(recipe.out) / _RECIPE
    if _changed(recipe, path):
        path.replace(path.with_name(_PREVIOUS_RECIPE))
    write_json(path, {"system": recipe.system, **dataclasses.asdict(recipe)})


def _before_change(recipe: Recipe, path: Path) -> Recipe:
    """The recipe with the values of the recorded run at `path` for the settings in `change_on_resume`."""
    try:
        before = read_json(path)
        return dataclasses.replace(recipe, **{name: before[name] for name in recipe.change_on_resume})
    except (UserError, KeyError, TypeError):
        return recipe


def schedule_changes(recipe: Recipe) -> str:
    """`setting: there, now` of changed settings of the learning rate schedule."""
    path = Path(recipe.out) / _RECIPE
    return "; ".join(_changed(recipe, path, lambda name: name in _SCHEDULE).values())


def _changed(
    recipe: Recipe, path: Path, counts: Callable[[str], bool] = lambda name: name not in _MAY_CHANGE
) -> dict[str, str]:
    """Setting -> `setting: there, now` of changed settings; by default those that must stay when a run is resumed."""
    try:
        before = read_json(path)
    except UserError:
        return {}
    if not isinstance(before, dict):
        return {}
    settings = json.loads(json.dumps(dataclasses.asdict(recipe)))
    same = {_WARM_UP} if _has_same_warm_up(recipe, before) else set()
    changed = [name for name, now in settings.items() if name in before and before[name] != now and name not in same]
    return {name: f"{name}: {before[name]!r} there, {settings[name]!r} now" for name in changed if counts(name)}


def _has_same_warm_up(recipe: Recipe, before: Mapping[str, Any]) -> bool:
    """Whether the warm-up of the recorded recipe `before` is that of `recipe`, or what an earlier version recorded."""
    there, now, default = before.get(_WARM_UP), recipe.warmup_steps, default_warm_up(recipe.steps)
    by_earlier_version = "data_workers" not in before and there == FORMER[_WARM_UP] and now is None
    return by_earlier_version or (default if there is None else there) == (default if now is None else now)


def _check_results(recipe: Recipe, folder: Path) -> None:
    """Check that a new run would not overwrite files that it did not write.

    A run that ended before its first state has left its recipe and log, and begins again.
    """
    cards = [Path(name).with_suffix(".md").name for name in recipe.results if name.endswith(".safetensors")]
    begun = [] if _has_begun(recipe, folder) else [_RECIPE, "log.jsonl"]
    for name in (*recipe.results, *cards, *begun):
        if (folder / name).exists():
            named = name not in begun and hasattr(recipe, "name")
            another = "another name or another out" if named else "another out"
            different = "" if named else "; ".join(_changed(recipe, folder / _RECIPE).values())
            of_another = f" and is of another recipe ({different})" if different else ""
            raise UserError(
                f"{folder / name} exists already{of_another}, but no state of a run to resume; set {another}",
                "would-overwrite",
            )


def _has_begun(recipe: Recipe, folder: Path) -> bool:
    """Whether recipe and log in `folder` are of this run, or of one that ended before its first line of the log.

    Settings that a run may change after it ran out of memory may differ.
    """
    try:
        before = read_json(folder / _RECIPE)
    except UserError:
        return False
    if not isinstance(before, dict) or not isinstance(before.get("system"), str):
        return False
    log = folder / "log.jsonl"
    if not (log.exists() and log.stat().st_size):
        return True
    now = json.loads(json.dumps({"system": recipe.system, **dataclasses.asdict(recipe)}))
    there, here = (
        {name: value for name, value in _fixed(each).items() if name not in CHANGEABLE} for each in (before, now)
    )
    return there == here
