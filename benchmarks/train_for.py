"""Train by a recipe for a given time: as many steps as fit, with the learning rate's schedule over these.

    python benchmarks/train_for.py recipes/nano/base-concepts.yaml --seconds 300 --device cuda --out nano-base \
        --set start=nano --set batch_size=512 --set variants=24 --set learning_rate=1e-3

What is set up before the first step (icons drawn, latents encoded) counts as time. A trial of a few steps then tells
how long one takes, by steps without preview, capture or state. The folder gets what the recipe's training writes, and
`train_for.json` with steps, images and seconds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path

import measure

from controlkit.files import write_json
from controlkit.training.log import total_seconds
from controlkit.training.recipe import Recipe
from controlkit.training.recipes import read_recipe
from controlkit.training.run import run_recipe

TRIALS = 3
"""Parts of the trial, of which the second is timed."""
SPARE = 0.95
"""Fraction of the time that is left which is planned for."""


def steps_that_fit(left: float, each: float, done: int) -> int:
    """Steps in all, if `done` are done, `left` seconds remain and a step takes `each`."""
    return done + max(1, int(SPARE * left / each))


def seconds_of_a_step(folder: Path, trial: int) -> float:
    """Pace between the first and the second `trial` steps of a run; the last ones include what ends it."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    first, second = (next(line for line in lines if line["step"] == number * trial) for number in (1, 2))
    return float(second["seconds"] - first["seconds"]) / trial


def train_for(recipe: Recipe, seconds: float, trial: int) -> dict[str, object]:
    """Train for about `seconds` in all."""
    started = time.perf_counter()
    # Only the last part is long enough to be worth previews and states in between.
    quiet = dataclasses.replace(recipe, preview_every=10**6, save_every=10**6, log_every=trial)
    run_recipe(dataclasses.replace(quiet, steps=TRIALS * trial))
    first = time.perf_counter() - started
    steps = steps_that_fit(seconds - first, seconds_of_a_step(Path(recipe.out), trial), TRIALS * trial)
    before = total_seconds(Path(recipe.out))
    trained = run_recipe(dataclasses.replace(recipe, steps=steps))
    batch = recipe.batch_size * getattr(recipe, "accumulate", 1)
    return {
        "steps": steps,
        "batch_size": batch,
        "images": steps * batch,
        "seconds": time.perf_counter() - started,
        "seconds_of_first_steps": first,
        "images_a_second": (steps - TRIALS * trial) * batch / (trained.seconds - before),
        "ran": trained.base_runs,
        "files": [str(path) for path in trained.files],
    }


def main() -> None:
    """Train, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--trial", type=int, default=20, help="a third of the steps of the trial")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")
    args = parser.parse_args()
    recipe = read_recipe(args.recipe, [*args.settings, f"out={args.out}", f"device={args.device}"])
    made = train_for(recipe, args.seconds, args.trial)
    print("\n".join(f"{name}: {value}" for name, value in made.items()))
    write_json(args.out / "train_for.json", {"machine": measure.machine(args.device), **made})


if __name__ == "__main__":
    main()
