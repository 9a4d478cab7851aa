"""Learning rate schedule: linear warm-up and cosine decay, also for resumed runs."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from controlkit.training.recipe import FORMER, Recipe

_PART = 5
"""Without `warmup_steps`, warm-up takes at most 1 / 5 of a run."""


def default_warm_up(steps: int) -> int:
    """Warm-up steps of a run without `warmup_steps`: 100, or a fifth of the run if that is less."""
    return min(FORMER["warmup_steps"], max(1, steps // _PART))


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Linear warm-up times a cosine from the peak at the first step to `least` of it at the last."""

    peak: float
    """Learning rate."""
    steps: int
    warmup: int
    """Steps until the rate is on the cosine."""
    least: float
    """End of the cosine as a fraction of `peak`."""

    @classmethod
    def of(cls, recipe: Recipe) -> Schedule:
        """The schedule of a recipe."""
        warmup = default_warm_up(recipe.steps) if recipe.warmup_steps is None else recipe.warmup_steps
        return cls(peak=recipe.learning_rate, steps=recipe.steps, warmup=warmup, least=recipe.min_lr_rate)

    def at(self, step: int) -> float:
        """The rate of a step, counted from 0."""
        progress = step / self.steps
        shape = self.least + (1 - self.least) * 0.5 * (1 + math.cos(math.pi * progress))
        return self.peak * min(1.0, (step + 1) / max(1, self.warmup)) * shape

    @property
    def highest(self) -> float:
        """The maximum rate of all steps."""
        return max(self.at(step) for step in range(self.steps))


def initial_schedule(recipe: Recipe) -> tuple[Schedule, str]:
    """The schedule of a new run, and a note about it (or "")."""
    schedule = Schedule.of(recipe)
    if recipe.warmup_steps is None and schedule.warmup < FORMER["warmup_steps"]:
        return schedule, (
            f"note: the learning rate warms up over {schedule.warmup} of {recipe.steps} steps, a fifth of this short"
            " run; set warmup_steps to change it"
        )
    if schedule.warmup > recipe.steps:
        return schedule, (
            f"note: warmup_steps is {schedule.warmup}, more than the {recipe.steps} steps of this run: the learning"
            f" rate only reaches {schedule.highest:.3g}, not {recipe.learning_rate:.3g}"
        )
    return schedule, ""


def resumed_schedule(recipe: Recipe, done: int, last: float, changed: str = "") -> tuple[Schedule, str]:
    """The schedule of a run resumed after `done` steps, and a note about it (or "").

    Runs of earlier versions, whose warm-up did not depend on the run's length, keep theirs, so that they end with the
    same weights.

    Args:
        last: the rate of the last step done.
        changed: the changed settings of the schedule, for the note.
    """
    schedule = Schedule.of(recipe)
    if done >= recipe.steps or math.isclose(schedule.at(done - 1), last, rel_tol=1e-9):
        return schedule, ""
    if recipe.warmup_steps is None:
        former = dataclasses.replace(schedule, warmup=FORMER["warmup_steps"])
        if math.isclose(former.at(done - 1), last, rel_tol=1e-9):
            return former, (
                f"note: this run keeps the {former.warmup} warm-up steps with which it began: its learning rate only"
                f" reaches {former.highest:.3g}, not {recipe.learning_rate:.3g}. A new run of {recipe.steps} steps"
                f" warms up over {schedule.warmup}"
            )
    before, now = f"{last:.3g}", f"{schedule.at(done):.3g}"
    # A run that has reached the rate of the new cosine stays on it, without another warm-up.
    warm = dataclasses.replace(schedule, warmup=min(schedule.warmup, done))
    if math.isclose(warm.at(done - 1), last, rel_tol=1e-9) or f"{warm.at(done):.3g}" == before:
        return warm, ""
    return schedule, (
        f"note: the learning rate jumps from {before} at step {done} to {now} at step {done + 1}, because the schedule"
        f" changed ({changed or f'steps is {recipe.steps} now'}); to stay at {before}, set learning_rate={before}"
        " min_lr_rate=1"
    )
