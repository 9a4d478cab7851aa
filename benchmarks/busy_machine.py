"""What one other busy process costs: the demo and a training step of nano, by how idle OpenMP threads wait.

    python benchmarks/busy_machine.py
    python benchmarks/busy_machine.py --base sd15 --size 256    # calls of its UNet, with random weights

Each way in a fresh process, in turns, alone and beside a process that computes without end on one processor:

- *ours*: as `controlkit` runs, whose idle threads sleep after a short spin;
- *spinning*: GNU OpenMP's own default of 300,000 spins;
- *passive*: `OMP_WAIT_POLICY=passive`, no spin at all;
- *one thread*: `OMP_NUM_THREADS=1`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import measure

WAYS: dict[str, dict[str, str]] = {
    "ours": {},
    "spinning": {"GOMP_SPINCOUNT": "300000"},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
"""Name -> environment variables."""

STEP = """
import sys
from controlkit.apps import cli
cli.share_processors()
import torch
from controlkit.bases.load import load_base
from controlkit.controls.apply import predict_under
from controlkit.controls.inputs import encode_images
from controlkit.controls.registry import find
base, batch = load_base("nano"), int(sys.argv[1])
control = find("controlnet").for_training(base, ["canny"], {}, name="canny", seed=0)
optimizer = torch.optim.AdamW(control.parameters())
text = base.encode_text(["sailboat"] * batch)
side = base.size // base.factor
x_t, hint = torch.randn(batch, base.latent_channels, side, side), torch.rand(batch, 3, base.size, base.size)
for _ in range(int(sys.argv[2])):
    predicted = predict_under(control, base, x_t, torch.full((batch,), 500), text, encode_images(control, hint, base))
    optimizer.zero_grad()
    predicted.square().mean().backward()
    optimizer.step()
"""
"""Training steps of a ControlNet on nano, without data."""

CALLS = """
import sys, time
from controlkit.apps import cli
cli.share_processors()
import torch
from controlkit.bases.load import load_base
base, size, calls = load_base(sys.argv[1], random_weights=sys.argv[1] != "nano"), int(sys.argv[2]), int(sys.argv[3])
text, side = base.encode_text(["a", "b"]), size // base.factor
x_t, t = torch.randn(2, base.latent_channels, side, side), torch.full((2,), 500)
with torch.inference_mode():
    base.predict(x_t, t, text)
    start = time.perf_counter()
    for _ in range(calls):
        base.predict(x_t, t, text)
    print((time.perf_counter() - start) / calls)
"""
"""Calls of a base's UNet, both branches of guidance at once; prints the seconds of one."""


def measure_all(
    rounds: int, warm_up: int, *, batch: int = 32, steps: int = 20, demo: bool = True, only: Sequence[str] = tuple(WAYS)
) -> dict[str, Any]:
    """Seconds of each command, way and company."""
    with tempfile.TemporaryDirectory() as folder:
        commands = {"train": [sys.executable, "-c", STEP, str(batch), str(steps)]}
        if demo:
            commands["demo"] = [sys.executable, "-m", "controlkit", "demo", "--out", str(Path(folder) / "demo")]
        ways: dict[str, Callable[[int], None]] = {
            f"{command}, {way}, {company}": _runner(words, variables, busy=company == "busy")
            for command, words in commands.items()
            for company in ("alone", "busy")
            for way, variables in WAYS.items()
            if way in only
        }
        turns = measure.take_turns(ways, rounds, warm_up=warm_up)
    ratios = {
        f"{command}, {way}": turns.ratio(f"{command}, {way}, busy", f"{command}, {way}, alone")
        for command in commands
        for way in only
    }
    return {"batch": batch, "steps": steps, "seconds": turns.times(), "busy / alone": ratios}


def measure_calls(
    base: str, size: int, *, calls: int = 3, rounds: int = 3, only: Sequence[str] = tuple(WAYS)
) -> dict[str, Any]:
    """Median seconds of a call of a base's UNet, by way and company."""
    words = [sys.executable, "-c", CALLS, base, str(size), str(calls)]
    seconds: dict[str, list[float]] = {}
    for _ in range(rounds):
        for company in ("alone", "busy"):
            for way in only:
                printed = _run(words, WAYS[way], busy=company == "busy")
                seconds.setdefault(f"call, {way}, {company}", []).append(float(printed))
    medians = {what: median(values) for what, values in seconds.items()}
    ratios = {f"call, {way}": medians[f"call, {way}, busy"] / medians[f"call, {way}, alone"] for way in only}
    return {"base": base, "size": size, "calls": calls, "seconds": medians, "busy / alone": ratios}


def _runner(words: list[str], variables: dict[str, str], *, busy: bool) -> Callable[[int], None]:
    def run(_: int) -> None:
        _run(words, variables, busy=busy)

    return run


def _run(words: list[str], variables: dict[str, str], *, busy: bool) -> str:
    """What a command prints, with or without a busy process beside it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}

    with _busy_process() if busy else nullcontext():
        made = subprocess.run(words, capture_output=True, text=True, env={**kept, **variables})
    if made.returncode:
        raise SystemExit(f"{words[:3]} ended with {made.returncode}:\n{made.stderr}")
    return made.stdout


@contextmanager
def _busy_process() -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm-up", type=int, default=0)
    parser.add_argument("--batch", type=int, default=32, help="of the training step")
    parser.add_argument("--steps", type=int, default=20, help="of training, with start-up")
    parser.add_argument("--base", default=None, help="measure calls of the UNet of this base instead")
    parser.add_argument("--size", type=int, default=256, help="of these calls")
    parser.add_argument("--out", default=None, help="the JSON file (default: in benchmarks/results)")
    args = parser.parse_args()
    if args.base is None:
        case = measure_all(args.rounds, args.warm_up, batch=args.batch, steps=args.steps)
    else:
        case = measure_calls(args.base, args.size, rounds=args.rounds)
    print(measure.table(["what", "seconds"], list(case["seconds"].items())))
    print(measure.table(["what", "busy / alone"], list(case["busy / alone"].items())))
    measure.finish("busy_machine", args, [case])


if __name__ == "__main__":
    main()
