"""The learning rate of every step: linear warm-up, cosine decay, and what a continued run makes of them."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from controlkit.training.recipe import FORMER, Recipe

_PART = 5
"""Without `warmup_steps`, warm-up takes one part in so many of a run at most."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Linear warm-up, times a cosine from the peak at the first step to `least` of it at the last."""

    peak: float
    """Learning rate."""
    steps: int
    warmup: int
    """Steps until the rate is on the cosine."""
    least: float
    """Where the cosine ends, as a fraction of `peak`."""

    @classmethod
    def of(cls, recipe: Recipe) -> Schedule:
        """The schedule of a recipe. Without `warmup_steps`: 100 steps, or a fifth of the run if that is less."""
        warmup = recipe.warmup_steps
        if warmup is None:
            warmup = min(FORMER["warmup_steps"], max(1, recipe.steps // _PART))
        return cls(peak=recipe.learning_rate, steps=recipe.steps, warmup=warmup, least=recipe.min_lr_rate)

    def at(self, step: int) -> float:
        """The rate of a step, which counts from 0."""
        progress = step / self.steps
        shape = self.least + (1 - self.least) * 0.5 * (1 + math.cos(math.pi * progress))
        return self.peak * min(1.0, (step + 1) / max(1, self.warmup)) * shape

    @property
    def highest(self) -> float:
        """The highest rate of any step."""
        return max(self.at(step) for step in range(self.steps))


def initial_schedule(recipe: Recipe) -> tuple[Schedule, str]:
    """The schedule of a run from its first step, and what a person should know of it before it begins (or "")."""
    schedule = Schedule.of(recipe)
    if recipe.warmup_steps is None and schedule.warmup < FORMER["warmup_steps"]:
        return schedule, (
            f"note: the learning rate warms up over {schedule.warmup} of {recipe.steps} steps, a fifth of this short"
            " run; warmup_steps sets another number"
        )
    if schedule.warmup > recipe.steps:
        return schedule, (
            f"note: warmup_steps is {schedule.warmup}, more than the {recipe.steps} steps of this run: the learning"
            f" rate reaches {schedule.highest:.3g} at most, not {recipe.learning_rate:.3g}"
        )
    return schedule, ""


def resumed_schedule(recipe: Recipe, done: int, last: float, changed: str = "") -> tuple[Schedule, str]:
    """The schedule of a run after `done` steps, and what a person should know of it before it goes on (or "").

    Args:
        last: the rate of the last step that was done.
        changed: the settings of the schedule that differ now, for the note.

    A run from before warm-up was bounded by the run's length goes on with the longer one, so that it ends with the
    weights that it would have had.
    """
    schedule = Schedule.of(recipe)
    if done >= recipe.steps or math.isclose(schedule.at(done - 1), last, rel_tol=1e-9):
        return schedule, ""
    if recipe.warmup_steps is None:
        former = dataclasses.replace(schedule, warmup=FORMER["warmup_steps"])
        if math.isclose(former.at(done - 1), last, rel_tol=1e-9):
            return former, (
                f"note: this run began with {former.warmup} steps of warm-up and goes on with them: its learning rate"
                f" reaches {former.highest:.3g} at most, not {recipe.learning_rate:.3g}. In another out, a run of"
                f" {recipe.steps} steps warms up over {schedule.warmup}"
            )
    before, now = f"{last:.3g}", f"{schedule.at(done):.3g}"
    if before == now:
        return schedule, ""
    return schedule, (
        f"note: the learning rate goes from {before} at step {done} to {now} at step {done + 1}, because the schedule"
        f" changed ({changed or f'steps is {recipe.steps} now'}); to go on at {before}, set learning_rate={before}"
        " min_lr_rate=1"
    )
